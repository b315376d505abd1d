package main

import (
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// checkNFC runs vddkcp check with --via nfc, and returns its output. The check of the host's name
// always fails, because nothing knows the name.
func checkNFC(t *testing.T, server *vspheretest.Server, flags ...string) string {
	t.Helper()
	args := append([]string{"check", "web01", "--via", "nfc", "--server", server.Host, "--port", strconv.Itoa(int(server.Port)),
		"--user", server.User, "--thumbprint", server.Thumbprint()}, flags...)
	command := exec.Command(chaosBinary(t), args...)
	command.Env = append(os.Environ(), "VDDKCP_PASSWORD="+server.Password)
	out, _ := command.CombinedOutput()
	return string(out)
}

// TestCheckWithoutEncryption follows the hint of vddkcp check about a host that does not offer
// encryption.
func TestCheckWithoutEncryption(t *testing.T) {
	withoutSSL := vspheretest.Configure(func(o *vspheretest.Options) { o.NFC = func(_ string, o *nfctest.Options) { o.NoSSL = true } })
	server := vspheretest.New(t, vspheretest.WithNFC(), withoutSSL,
		vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Size: 1 << 20}}})
	for _, c := range []struct {
		flags []string
		want  []string
	}{
		{nil, []string{"nfc              FAILED   ", "--transports nbd"}},
		{[]string{"--transports", "nbdssl:nbd"}, []string{"nfc              FAILED   "}},
		{[]string{"--transports", "nbd"}, []string{"nfc              ok       the host 127.0.0.1:", " opens a session without encryption (NFC version"}},
		{[]string{"--transports", "nbd", "--read"}, []string{"read             ok       disk 1 (Hard disk 1) can be read"}},
	} {
		out := checkNFC(t, server, c.flags...)
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%v: no %q in\n%s", c.flags, want, out)
			}
		}
	}
}

// TestCheckOverNFC checks how far vddkcp check says that a connection has come.
func TestCheckOverNFC(t *testing.T) {
	server := vspheretest.New(t, vspheretest.WithNFC(),
		vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Size: 1 << 20}, {Size: 1 << 20}}})
	const dialogue = "ticket, connect, banner, tls, session, thumbprint, proxy, second tls, handshake 36, handshake 51, handshake 52, open session, socket options, resource pool"
	host := server.NFC("")
	for _, c := range []struct {
		fault nfctest.Fault
		read  bool
		want  []string
	}{
		{want: []string{"nfc              ok       the host 127.0.0.1:", "(NFC version 11.0); these steps succeeded: " + dialogue + "\n"}},
		{read: true, want: []string{
			"read             ok       disk 1 (Hard disk 1) can be read; these steps succeeded: " + dialogue + ", open file, disk database, read\n",
			"read             ok       disk 2 (Hard disk 2) can be read; these steps succeeded: ",
		}},
		{nfctest.Fault{Step: nfctest.StepProxy, Kind: nfctest.Line, Text: "530 Please login with USER and PASS"}, false, []string{
			"nfc              FAILED   nfc: proxy: expected an answer with the code 200, found 530 Please login with USER and PASS",
			"; these steps succeeded: ticket, connect, banner, tls, session, thumbprint\n",
			"hint: the host does not accept the ticket",
		}},
		{nfctest.Fault{Step: nfctest.StepOpenFile, Kind: nfctest.ErrorThenZeros, Code: 11, Text: "denied"}, true, []string{
			"nfc              ok       ",
			"read             FAILED   disk 1 (Hard disk 1): ", "nfc: open file: the host reports error 11: denied",
			"; these steps succeeded: " + dialogue + "\n",
		}},
	} {
		if c.fault.Step != "" {
			host.On(c.fault)
		}
		var flags []string
		if c.read {
			flags = append(flags, "--read")
		}
		out := checkNFC(t, server, flags...)
		host.ClearFaults()
		for _, want := range c.want {
			if !strings.Contains(out, want) {
				t.Errorf("%v %v at %q: no %q in\n%s", flags, c.fault.Kind, c.fault.Step, want, out)
			}
		}
		if strings.Contains(out, "library") {
			t.Errorf("the library was checked:\n%s", out)
		}
	}
	if left := server.SnapshotNames("web01"); len(left) > 0 {
		t.Errorf("snapshots are left: %q", left)
	}
}
