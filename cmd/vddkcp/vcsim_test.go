package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"net/url"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// TestAgainstVcsim runs the commands about a server against govmomi's simulator as it is. Package
// vspheretest changes much of the simulator, so a test with that package alone could miss what
// vddkcp expects of a server.
func TestAgainstVcsim(t *testing.T) {
	if testing.Short() {
		t.Skip("builds vcsim and govc")
	}
	address, environment := startVcsim(t, "-dc", "2", "-vm", "3")
	run := func(want int, args ...string) (stdout, stderr string) {
		t.Helper()
		var out, messages bytes.Buffer
		c := command(t, args...)
		c.Env = append(os.Environ(), "VDDKCP_PASSWORD=any")
		c.Stdout, c.Stderr = &out, &messages
		c.Run()
		if got := c.ProcessState.ExitCode(); got != want {
			t.Fatalf("vddkcp %s: status %d, want %d\n%s%s", strings.Join(args, " "), got, want, out.String(), messages.String())
		}
		return out.String(), messages.String()
	}
	text, _ := run(0, "thumbprint", "--json", address.Host)
	var certificate struct{ SHA256 string }
	if err := json.Unmarshal([]byte(text), &certificate); err != nil {
		t.Fatal(err)
	}
	server := []string{"--server", address.Hostname(), "--port", address.Port(), "--user", "any", "--thumbprint", certificate.SHA256}
	on := func(args ...string) []string { return append(args, server...) }

	text, _ = run(0, on("ls", "--json")...)
	var list struct{ VMs []inventory.VM }
	if err := json.Unmarshal([]byte(text), &list); err != nil {
		t.Fatal(err)
	}
	if len(list.VMs) != 12 { // three in each of two clusters or standalone hosts of each datacenter
		t.Errorf("%d VMs, want 12\n%s", len(list.VMs), text)
	}
	for _, vm := range list.VMs {
		if !strings.HasPrefix(vm.Path, "/DC") || vm.Host == "" || len(vm.Disks) == 0 || vm.Disks[0].Datastore == "" || vm.Disks[0].Size == 0 {
			t.Errorf("%+v", vm)
		}
	}
	text, _ = run(0, on("jobs", "/DC1/*/*", "--target", "images/")...)
	if n := strings.Count(text, `"source": "vm:moref=`); n != 6 {
		t.Errorf("%d jobs, want 6\n%s", n, text)
	}
	_, text = run(0, on("cleanup")...)
	if !strings.Contains(text, "no snapshot of vddkcp") {
		t.Error(text)
	}
	text, _ = run(1, on("check", list.VMs[0].Path, "--libdir", t.TempDir())...)
	for _, want := range []string{"login            ok ", "vm               ok ", "privileges       ok ", "space            ok ", "library          FAILED "} {
		if !strings.Contains(text, want) {
			t.Errorf("%s\nwant %q", text, want)
		}
	}

	// govc makes the role.
	text, _ = run(0, "check", "--role", "--json")
	r := new(role)
	if err := json.Unmarshal([]byte(text), r); err != nil {
		t.Fatal(err)
	}
	govc := func(args ...string) string {
		t.Helper()
		c := exec.Command(testTool(t, "govc"), args...)
		c.Env = environment
		out, err := c.CombinedOutput()
		if err != nil {
			t.Fatalf("govc %s: %v\n%s", strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	govc(strings.Fields(r.Govc)[1:]...)
	made := govc("role.ls", "vddkcp")
	for _, p := range r.Privileges {
		if !p.Optional && !strings.Contains(made, p.ID+"\n") {
			t.Errorf("the role does not have %s:\n%s", p.ID, made)
		}
	}
	// Only the session of the command itself is open.
	if sessions := govc("session.ls"); strings.Count(strings.TrimSpace(sessions), "\n") > 1 {
		t.Errorf("sessions are left:\n%s", sessions)
	}
}

// startVcsim starts govmomi's simulator of vCenter until the end of the test. The second result is
// the environment for govc.
func startVcsim(t *testing.T, args ...string) (*url.URL, []string) {
	t.Helper()
	c := exec.Command(testTool(t, "vcsim"), append(args, "-l", "127.0.0.1:0")...)
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Process.Signal(os.Interrupt)
		c.Wait()
	})
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	variables := strings.Fields(line)[1:] // export GOVC_URL=... GOVC_INSECURE=1
	address, err := url.Parse(strings.TrimPrefix(variables[0], "GOVC_URL="))
	if err != nil {
		t.Fatal(err)
	}
	return address, append(os.Environ(), variables...)
}
