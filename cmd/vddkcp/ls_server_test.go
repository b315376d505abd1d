package main

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// The inventory of bigServer.
const (
	bigVMs   = 1000
	bigDisks = 4
)

// bigServer starts a server with many VMs in several folders.
func bigServer(t testing.TB) *vspheretest.Server {
	t.Helper()
	var options []vspheretest.Option
	for i := range bigVMs {
		vm := vspheretest.VM{Name: fmt.Sprintf("vm%04d", i), Folder: fmt.Sprintf("folder%d", i%7), Datastore: fmt.Sprintf("ds%d", i%5)}
		for range bigDisks {
			vm.Disks = append(vm.Disks, vspheretest.Disk{Size: 40 << 30})
		}
		options = append(options, vm)
	}
	return vspheretest.New(t, options...)
}

// onServer returns a command that runs vddkcp with the flags for a server.
func onServer(t testing.TB, s *vspheretest.Server, args ...string) *exec.Cmd {
	t.Helper()
	program, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	args = append(args, "--server", s.Host, "--port", fmt.Sprint(s.Port), "--user", s.User, "--thumbprint", s.Thumbprint())
	c := exec.CommandContext(t.Context(), program, args...)
	c.Env = append(os.Environ(), "VDDKCP_PASSWORD="+s.Password)
	return c
}

// TestLsOfManyVMs checks that ls makes few calls and needs little memory for many VMs, and that the
// JSON has all of them.
func TestLsOfManyVMs(t *testing.T) {
	if testing.Short() {
		t.Skip("makes 1000 VMs")
	}
	s := bigServer(t)
	var out, messages bytes.Buffer
	c := onServer(t, s, "ls", "--json")
	// The peak of a child of this process would include the memory of this process at the time of the
	// fork. Program time is small.
	peer.Need(t, "time")
	peak := filepath.Join(t.TempDir(), "peak")
	c.Args = append([]string{"time", "-f", "%M", "-o", peak, c.Path}, c.Args[1:]...)
	c.Path = must(exec.LookPath("time"))
	c.Stdout, c.Stderr = &out, &messages
	if err := c.Run(); err != nil {
		t.Fatalf("%v\n%s", err, messages.String())
	}
	var list struct{ VMs []inventory.VM }
	if err := json.Unmarshal(out.Bytes(), &list); err != nil {
		t.Fatal(err)
	}
	seen := map[string]bool{}
	for _, vm := range list.VMs {
		seen[vm.Name] = true
		if len(vm.Disks) != bigDisks || vm.Host == "" || vm.Disks[3].Size != 40<<30 || vm.Disks[3].Verdict != inventory.Running || !strings.HasPrefix(vm.Path, "/DC0/vm/folder") {
			t.Errorf("%+v", vm)
			break
		}
	}
	if len(seen) != bigVMs {
		t.Errorf("%d VMs, want %d", len(seen), bigVMs)
	}
	calls := 0
	for _, n := range s.Calls() {
		calls += n
	}
	if calls > 30 {
		t.Errorf("%d calls, want at most 30: %v", calls, s.Calls())
	}
	// The limit is far above what the command needs, since the garbage collector decides when
	// memory is freed.
	text, err := os.ReadFile(peak)
	if err != nil {
		t.Fatal(err)
	}
	kib, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		t.Fatal(err)
	}
	if kib > 100<<10 {
		t.Errorf("the command used %d MiB of memory, want at most 100 MiB", kib>>10)
	} else {
		t.Logf("%d calls, %d MiB, %v of processor time", calls, kib>>10, c.ProcessState.UserTime()+c.ProcessState.SystemTime())
	}
	if left := s.Sessions(); len(left) > 0 {
		t.Errorf("sessions are left: %v", left)
	}
}

func BenchmarkLs(b *testing.B) {
	s := bigServer(b)
	for b.Loop() {
		if out, err := onServer(b, s, "ls", "--json").Output(); err != nil || len(out) == 0 {
			b.Fatal(err)
		}
	}
}
