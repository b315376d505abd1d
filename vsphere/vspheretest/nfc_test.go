package vspheretest_test

import (
	"bufio"
	"bytes"
	"crypto/sha1"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// The following types are requests and answers of methods that govmomi does not have.

type retrieveInternalContentBody struct {
	Req struct {
		This types.ManagedObjectReference `xml:"_this"`
	} `xml:"urn:vim25 RetrieveInternalContent"`
	Res *struct {
		Service types.ManagedObjectReference `xml:"returnval>nfcService"`
	} `xml:"RetrieveInternalContentResponse"`
	Fault_ *soap.Fault `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
}

func (b *retrieveInternalContentBody) Fault() *soap.Fault { return b.Fault_ }

type nfcGetVmFilesBody struct {
	Req struct {
		This types.ManagedObjectReference `xml:"_this"`
		VM   types.ManagedObjectReference `xml:"vm"`
	} `xml:"urn:vim25 NfcGetVmFiles"`
	Res *struct {
		Returnval types.HostServiceTicket `xml:"returnval"`
	} `xml:"NfcGetVmFilesResponse"`
	Fault_ *soap.Fault `xml:"http://schemas.xmlsoap.org/soap/envelope/ Fault,omitempty"`
}

func (b *nfcGetVmFilesBody) Fault() *soap.Fault { return b.Fault_ }

// nfcService returns the reference of the NFC service.
func nfcService(t *testing.T, c *govmomi.Client) types.ManagedObjectReference {
	t.Helper()
	var req, res retrieveInternalContentBody
	req.Req.This = types.ManagedObjectReference{Type: "ServiceInstance", Value: "ServiceInstance"}
	if err := c.RoundTrip(t.Context(), &req, &res); err != nil {
		t.Fatal(err)
	}
	return res.Res.Service
}

// ticket asks for a ticket for the files of a VM.
func ticket(t *testing.T, c *govmomi.Client, vm types.ManagedObjectReference) (types.HostServiceTicket, error) {
	t.Helper()
	var req, res nfcGetVmFilesBody
	req.Req.This, req.Req.VM = nfcService(t, c), vm
	if err := c.RoundTrip(t.Context(), &req, &res); err != nil {
		return types.HostServiceTicket{}, err
	}
	return res.Res.Returnval, nil
}

// greet uses a ticket: it connects to the host, checks the certificate, and asks for the service.
func greet(t *testing.T, ticket types.HostServiceTicket) string {
	t.Helper()
	address := net.JoinHostPort(ticket.Host, strconv.Itoa(int(ticket.Port)))
	socket, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	var banner []byte
	for one := make([]byte, 1); !bytes.HasSuffix(banner, []byte("\n")); banner = append(banner, one...) {
		if _, err := socket.Read(one); err != nil {
			t.Fatal(err)
		}
	}
	if !strings.HasPrefix(string(banner), "220 VMware Authentication Daemon") {
		t.Errorf("banner %q", banner)
	}
	c := tls.Client(socket, &tls.Config{InsecureSkipVerify: true, VerifyConnection: func(state tls.ConnectionState) error {
		der := state.PeerCertificates[0].Raw
		sum := strings.ReplaceAll(fmt.Sprintf("% X", sha1.Sum(der)), " ", ":")
		block, _ := pem.Decode([]byte(ticket.SslCertificate))
		if sum != ticket.SslThumbprint && (block == nil || !bytes.Equal(block.Bytes, der)) {
			return errors.New("the ticket has another certificate")
		}
		return nil
	}})
	if _, err := fmt.Fprintf(c, "SESSION %s\r\n", ticket.SessionId); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintf(c, "PROXY %s\r\n", ticket.Service); err != nil {
		t.Fatal(err)
	}
	answer, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(answer)
}

// brokenOff allows dialogues that end early.
func brokenOff(o *vspheretest.Options) {
	o.NFC = func(_ string, o *nfctest.Options) { o.AllowViolations = true }
}

func TestTickets(t *testing.T) {
	t.Parallel()
	for name, change := range map[string]func(o *vspheretest.Options){
		"vCenter": func(*vspheretest.Options) {},
		"ESXi":    func(o *vspheretest.Options) { o.ESXi = true },
		"9": func(o *vspheretest.Options) {
			o.NFC = func(_ string, o *nfctest.Options) { o.PEM, o.AllowViolations = true, true }
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := vspheretest.New(t, vspheretest.WithNFC(), vspheretest.Configure(brokenOff), vspheretest.Configure(change), vspheretest.VM{Name: "web01"})
			c := connect(t, s)
			got, err := ticket(t, c, s.Find("web01"))
			if err != nil {
				t.Fatal(err)
			}
			service, host, ref := "vpxa-nfc", "127.0.0.1", "nfcService"
			if name == "ESXi" {
				service, host, ref = "nfc", "", "ha-nfc-service"
			}
			equal(t, "ticket", []any{got.Service, got.Host, got.ServiceVersion, got.SslCertificate != "", got.SslThumbprint != ""},
				[]any{service, host, "1.1", name == "9", name != "9"})
			equal(t, "service", nfcService(t, c), "NfcService:"+ref)
			got.Host = "127.0.0.1"
			if answer := greet(t, got); !strings.HasPrefix(answer, "200 Connect ") {
				t.Errorf("answer %q", answer)
			}
			if answer := greet(t, got); !strings.HasPrefix(answer, "530 ") {
				t.Errorf("answer to a used ticket: %q", answer)
			}
			stats := s.NFC("").Stats()
			equal(t, "tickets and connections", []int{stats.Tickets, stats.Connections}, []int{1, 2})
		})
	}
}

func TestTicketFaults(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.Configure(brokenOff), vspheretest.Host{Name: "esx1"}, vspheretest.Host{Name: "esx2"}, vspheretest.Host{Name: "esx3", Disconnected: true},
		vspheretest.VM{Name: "web01"}, vspheretest.VM{Name: "db01", Host: "esx2"}, vspheretest.VM{Name: "lost", Host: "esx3"})
	c := connect(t, s)
	s.On("NfcGetVmFiles", vspheretest.Fault{VM: "db01", Times: 1, Soap: &types.InvalidArgument{InvalidProperty: "vm"}})
	if _, err := ticket(t, c, s.Find("web01")); err != nil {
		t.Errorf("a fault of another VM: %v", err)
	}
	if _, err := ticket(t, c, s.Find("db01")); !fault.Is(err, &types.InvalidArgument{}) {
		t.Errorf("a fault: %v", err)
	}
	if _, err := ticket(t, c, s.Find("lost")); !fault.Is(err, &types.HostNotConnected{}) {
		t.Errorf("a host without a connection: %v", err)
	}
	s.RevokePrivilege("VirtualMachine.Provisioning.GetVmFiles")
	_, err := ticket(t, c, s.Find("db01"))
	var denied *types.NoPermission
	if _, ok := fault.As(err, &denied); !ok || denied.PrivilegeId != "VirtualMachine.Provisioning.GetVmFiles" || *denied.Object != s.Find("db01") {
		t.Errorf("without a privilege: %v, %+v", err, denied)
	}
	s.GrantPrivilege("VirtualMachine.Provisioning.GetVmFiles")
	if _, err := ticket(t, c, s.Find("db01")); err != nil {
		t.Error(err)
	}
	s.MoveHost("db01", "esx1")
	if _, err := ticket(t, c, s.Find("db01")); err != nil {
		t.Error(err)
	}
	equal(t, "tickets", []int{s.NFC("esx1").Stats().Tickets, s.NFC("esx2").Stats().Tickets, s.NFC("").Stats().Tickets}, []int{2, 1, 2})
	gone := s.Find("db01")
	s.Destroy("db01")
	if _, err := ticket(t, c, gone); !fault.Is(err, &types.ManagedObjectNotFound{}) {
		t.Errorf("a VM that was removed: %v", err)
	}
	s.EndSessions()
	var req, res nfcGetVmFilesBody
	req.Req.This, req.Req.VM = types.ManagedObjectReference{Type: "NfcService", Value: "nfcService"}, s.Find("web01")
	if err := c.RoundTrip(t.Context(), &req, &res); !fault.Is(err, &types.NotAuthenticated{}) {
		t.Errorf("after the end of the session: %v", err)
	}
}

// recorder is a test that records its failures.
type recorder struct {
	testing.TB
	failures []string
}

func (r *recorder) Errorf(format string, args ...any) {
	r.failures = append(r.failures, fmt.Sprintf(format, args...))
}

func TestNFCViolations(t *testing.T) {
	t.Parallel()
	for _, allow := range []bool{false, true} {
		s := vspheretest.New(&recorder{TB: t}, vspheretest.VM{Name: "web01"}, vspheretest.Configure(func(o *vspheretest.Options) {
			o.NFC = func(_ string, o *nfctest.Options) { o.AllowViolations = allow }
		}))
		got, err := ticket(t, connect(t, s), s.Find("web01"))
		if err != nil {
			t.Fatal(err)
		}
		got.Service = "something else"
		greet(t, got)
		r := &recorder{TB: t}
		s.CheckNFC(r)
		if failed := len(r.failures) > 0; failed == allow {
			t.Errorf("failures %q with AllowViolations = %v", r.failures, allow)
		}
	}
}

// contentOf returns the beginning of the content of a file.
func contentOf(s *vspheretest.Server, file string) (string, error) {
	d, err := s.OpenFile(file)
	if err != nil {
		return "", err
	}
	defer d.Close()
	text := make([]byte, min(16, d.Size))
	_, err = d.Content.ReadAt(text, 0)
	return string(bytes.TrimRight(text, "\x00")), err
}

// wantFiles checks the beginnings of the contents of files. "locked" and "gone" are files that cannot
// be opened.
func wantFiles(t *testing.T, s *vspheretest.Server, files map[string]string) {
	t.Helper()
	for file, want := range files {
		got, err := contentOf(s, file)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			got = "gone"
		case err != nil:
			got = "locked"
		}
		if got != want {
			t.Errorf("%s has %q (%v), want %q", file, got, err, want)
		}
	}
}

func TestNFCFiles(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.WithNFC(), vspheretest.Datastore{Name: "ds 2/a"}, vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Content: []byte("one")}}},
		vspheretest.VM{Name: "db01", Power: "off", Disks: []vspheretest.Disk{{Content: []byte("other")}}})
	base, first, second := "[ds1] web01/web01.vmdk", "[ds1] web01/web01-000001.vmdk", "[ds1] web01/web01-000002.vmdk"
	wantFiles(t, s, map[string]string{base: "locked", "[ds1] db01/db01.vmdk": "other", "[ds1] web01/x.vmdk": "gone", "": "gone"})
	s.AddSnapshot("web01", "a", "")
	s.Write("web01", 1, []byte("two"), 0)
	wantFiles(t, s, map[string]string{base: "one", first: "locked"})
	s.AddSnapshot("web01", "b", "")
	s.Write("web01", 1, []byte("three"), 0)
	wantFiles(t, s, map[string]string{base: "one", first: "two", second: "locked"})
	s.Suspend("web01")
	wantFiles(t, s, map[string]string{second: "three"})
	s.PowerOn("web01")

	s.MoveDatastore("web01", "ds 2/a")
	moved := func(file string) string { return strings.Replace(file, "[ds1]", "[ds 2%2fa]", 1) }
	wantFiles(t, s, map[string]string{base: "gone", first: "gone", second: "gone", moved(base): "one", moved(first): "two", moved(second): "locked"})
	s.RemoveSnapshotBehindBack("web01", "a")
	wantFiles(t, s, map[string]string{moved(base): "two", moved(first): "gone", moved(second): "locked"})
	s.Revert("web01", "b")
	s.PowerOff("web01")
	wantFiles(t, s, map[string]string{moved(base): "two", s.Files("web01")[0]: "two"})
	if s.MayOpen("web01", "[ds1] db01/db01.vmdk") || !s.MayOpen("db01", "[ds1] db01/db01.vmdk") || !s.MayOpen("db01", "[ds1] nothing.vmdk") {
		t.Error("a ticket allows other files than those of its VM")
	}
	d, err := s.OpenFile(moved(base))
	if err != nil {
		t.Fatal(err)
	}
	s.Destroy("web01")
	wantFiles(t, s, map[string]string{moved(base): "gone"})
	if _, err := d.Content.ReadAt(make([]byte, 1), 0); err != nil {
		t.Errorf("a file that was open before: %v", err)
	}
	d.Close()
}

func TestNFCDisk(t *testing.T) {
	t.Parallel()
	image := filepath.Join(t.TempDir(), "image")
	if err := os.WriteFile(image, []byte("0123456789"), 0o644); err != nil {
		t.Fatal(err)
	}
	s := vspheretest.New(t, vspheretest.WithNFC(), vspheretest.VM{Name: "web01", Power: "off", Disks: []vspheretest.Disk{
		{Image: image, Size: 2048, UUID: "6000C293-7ba0-3a03-9f22-56c52993b727", Controller: "ide"}, {Image: image}, {UUID: vspheretest.NoUUID}}})
	open := func(file string) *nfctest.Disk {
		t.Helper()
		d, err := s.OpenFile(file)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		return d
	}
	d := open("[ds1] web01/web01.vmdk")
	equal(t, "size", d.Size, 2048)
	content, err := io.ReadAll(io.NewSectionReader(d.Content, 0, d.Size))
	if err != nil || len(content) != 2048 || strings.TrimRight(string(content), "\x00") != "0123456789" {
		t.Errorf("content %q, %v", content, err)
	}
	before := d.DDB["longContentID"]
	equal(t, "DDB", []string{d.DDB["uuid"], d.DDB["adapterType"], d.DDB["virtualHWVersion"], fmt.Sprint(len(before))},
		[]string{"60 00 C2 93 7b a0 3a 03-9f 22 56 c5 29 93 b7 27", "ide", "19", "32"})
	d = open("[ds1] web01/web01_1.vmdk")
	if _, ok := d.Content.(*os.File); !ok || d.Size != 10 {
		t.Errorf("an image of the size of the disk is not served directly: %T of %d bytes", d.Content, d.Size)
	}
	if uuid, ok := open("[ds1] web01/web01_2.vmdk").DDB["uuid"]; ok {
		t.Errorf("UUID %q of a disk without one", uuid)
	}
	s.AddSnapshot("web01", "a", "")
	s.Write("web01", 1, []byte("x"), 0)
	equal(t, "content ID of the snapshot", open("[ds1] web01/web01.vmdk").DDB["longContentID"], before)
	now := open("[ds1] web01/web01-000001.vmdk").DDB
	if now["longContentID"] == before || now["uuid"] == "" {
		t.Errorf("the changed disk has the content ID of the snapshot: %v", now)
	}
}

// TestNFCUUID compares the UUID of each disk in the inventory with the one in the file of the disk.
func TestNFCUUID(t *testing.T) {
	t.Parallel()
	edited := func(d *types.VirtualDisk) {
		d.Backing.(*types.VirtualDiskFlatVer2BackingInfo).Uuid = "6000C29e-1234-5678-9abc-def012345678"
	}
	s := vspheretest.New(t, vspheretest.WithNFC(), vspheretest.VM{Name: "web01", Power: "off", Disks: []vspheretest.Disk{
		{}, {UUID: "6000C293-7ba0-3a03-9f22-56c52993b727"}, {Edit: edited}, {UUID: vspheretest.NoUUID}, {UUID: "6000-1"},
		{Backing: "sparse"}, {Backing: "sesparse"}, {Backing: "rdm-virtual"}, {File: "shared.vmdk"},
	}}, vspheretest.VM{Name: "web02", Power: "off", Disks: []vspheretest.Disk{{File: "shared.vmdk"}}})
	c := connect(t, s)
	for vm, want := range map[string]int{"web01": 9, "web02": 1} {
		devices, err := object.NewVirtualMachine(c.Client, s.Find(vm)).Device(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		disks := devices.SelectByType((*types.VirtualDisk)(nil))
		equal(t, "disks", len(disks), want)
		for i, d := range disks {
			name := fmt.Sprintf("%s disk %d: ", vm, i+1)
			backing := reflect.ValueOf(d.GetVirtualDevice().Backing).Elem()
			inventory := backing.FieldByName("Uuid").String()
			file, err := s.OpenFile(backing.FieldByName("FileName").String())
			if err != nil {
				t.Fatal(err)
			}
			file.Close()
			if len(inventory) != 36 {
				inventory = ""
			}
			equal(t, name+"UUID", strings.NewReplacer(" ", "", "-", "").Replace(file.DDB["uuid"]), strings.ReplaceAll(inventory, "-", ""))
		}
	}
}

// Without images, the server gives tickets too.
func TestNFCWithoutContent(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01", Power: "off", Disks: make([]vspheretest.Disk, 1)})
	_, err := s.OpenFile("[ds1] web01/web01.vmdk")
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error %v", err)
	}
}

// The library and the NFC services have the same content.
func TestNFCWithLibrary(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.WithNFC(), vspheretest.WithLibrary(), vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Content: []byte("one")}}})
	s.AddSnapshot("web01", "a", "")
	s.Write("web01", 1, []byte("two"), 0)
	file := "[ds1] web01/web01.vmdk"
	wantFiles(t, s, map[string]string{file: "one"})
	content, err := os.ReadFile(s.Library.Disk(file))
	if err != nil || !strings.HasPrefix(string(content), "one\x00") {
		t.Errorf("the library has %q, %v", content[:min(3, len(content))], err)
	}
}
