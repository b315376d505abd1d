package vspheretest_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/object"
	task_ "github.com/vmware/govmomi/task"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// connect logs in to a server.
func connect(t *testing.T, s *vspheretest.Server) *govmomi.Client {
	t.Helper()
	c, err := govmomi.NewClient(t.Context(), s.URL, true)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// machine returns a VM with its properties.
func machine(t *testing.T, c *govmomi.Client, s *vspheretest.Server, name string) (*object.VirtualMachine, mo.VirtualMachine) {
	t.Helper()
	vm := object.NewVirtualMachine(c.Client, s.Find(name))
	var properties mo.VirtualMachine
	if err := vm.Properties(t.Context(), vm.Reference(), nil, &properties); err != nil {
		t.Fatal(err)
	}
	return vm, properties
}

// disks returns the files and change IDs of the disks in a list of devices, and the parents of the
// files.
func disks(devices []types.BaseVirtualDevice) (list [][]string) {
	for _, d := range devices {
		if disk, ok := d.(*types.VirtualDisk); ok {
			b := disk.Backing.(*types.VirtualDiskFlatVer2BackingInfo)
			chain := []string{b.FileName, b.ChangeId}
			for p := b.Parent; p != nil; p = p.Parent {
				chain = append(chain, p.FileName)
			}
			list = append(list, chain)
		}
	}
	return list
}

func TestSnapshots(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.WithLibrary(), vspheretest.VM{Name: "web01", ChangeTracking: true, Disks: []vspheretest.Disk{
		{Content: []byte("first")}, {Size: 8 << 20}, {Mode: "independent_persistent"}}})
	c := connect(t, s)
	vm, before := machine(t, c, s, "web01")
	read := func(file string) string {
		t.Helper()
		text, err := os.ReadFile(s.Library.Disk(file))
		if err != nil {
			t.Fatal(err)
		}
		return string(bytes.TrimRight(text[:16], "\x00"))
	}
	equal(t, "disks", len(disks(before.Config.Hardware.Device)), 3)
	if read("[ds1] web01/web01.vmdk") != "first" {
		t.Error("the disk has another content")
	}

	create := func(name string) types.ManagedObjectReference {
		t.Helper()
		task, err := vm.CreateSnapshot(t.Context(), name, "by a test", false, false)
		if err != nil {
			t.Fatal(err)
		}
		info, err := task.WaitForResult(t.Context(), nil)
		if err != nil {
			t.Fatal(err)
		}
		return info.Result.(types.ManagedObjectReference)
	}
	one := create("one")
	var snapshot mo.VirtualMachineSnapshot
	if err := c.RetrieveOne(t.Context(), one, nil, &snapshot); err != nil {
		t.Fatal(err)
	}
	old := disks(before.Config.Hardware.Device)
	equal(t, "disks of the snapshot", disks(snapshot.Config.Hardware.Device), old[:2])
	_, after := machine(t, c, s, "web01")
	now := disks(after.Config.Hardware.Device)
	equal(t, "file of the VM", now[0][0], "[ds1] web01/web01-000001.vmdk")
	equal(t, "its parent", now[0][2:], []string{"[ds1] web01/web01.vmdk"})
	equal(t, "independent disk", now[2], old[2])
	if now[0][1] == old[0][1] || now[0][1] == "" {
		t.Errorf("change ID %q after %q", now[0][1], old[0][1])
	}

	s.Write("web01", 1, []byte("second"), 0)
	two := create("two")
	s.Write("web01", 1, []byte("third"), 0)
	for file, want := range map[string]string{"web01.vmdk": "first", "web01-000001.vmdk": "second", "web01-000002.vmdk": "thirdd"} {
		if got := read("[ds1] web01/" + file); got != want {
			t.Errorf("%s has %q, want %q", file, got, want)
		}
	}
	equal(t, "tree", s.Snapshots("web01"), []vspheretest.Snapshot{{"one", "by a test", one, 0}, {"two", "by a test", two, 1}})

	remove := func(ref types.ManagedObjectReference) {
		t.Helper()
		res, err := methods.RemoveSnapshot_Task(t.Context(), c.Client, &types.RemoveSnapshot_Task{This: ref, Consolidate: types.NewBool(true)})
		if err != nil {
			t.Fatal(err)
		}
		if err := object.NewTask(c.Client, res.Returnval).Wait(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	remove(one)
	equal(t, "tree", s.SnapshotNames("web01"), []string{"two"})
	equal(t, "content of two", read("[ds1] web01/web01.vmdk"), "second")
	if _, err := os.Lstat(s.Library.Disk("[ds1] web01/web01-000001.vmdk")); err == nil {
		t.Error("the file of the removed snapshot is still there")
	}
	if _, err := methods.RemoveSnapshot_Task(t.Context(), c.Client, &types.RemoveSnapshot_Task{This: one}); !fault.Is(err, &types.ManagedObjectNotFound{}) {
		t.Errorf("removing a snapshot for a second time: %v", err)
	}
	remove(two)
	_, after = machine(t, c, s, "web01")
	equal(t, "file of the VM", disks(after.Config.Hardware.Device)[0][0], "[ds1] web01/web01.vmdk")
	equal(t, "content of the VM", read("[ds1] web01/web01.vmdk"), "thirdd")
	if after.Snapshot != nil {
		t.Errorf("the VM has snapshots: %v", after.Snapshot)
	}
}

func TestFaults(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	c := connect(t, s)
	vm, _ := machine(t, c, s, "web01")
	create := func() error {
		task, err := vm.CreateSnapshot(t.Context(), "x", "", false, false)
		if err != nil {
			return err
		}
		return task.Wait(t.Context())
	}
	for _, tt := range []struct {
		name     string
		fault    vspheretest.Fault
		executed bool
		check    func(error) bool
	}{
		{"soap", vspheretest.Fault{Soap: &types.NoPermission{PrivilegeId: "X"}}, false, func(err error) bool { return fault.Is(err, &types.NoPermission{}) && !task(err) }},
		{"task", vspheretest.Fault{Task: &types.ApplicationQuiesceFault{}}, false, func(err error) bool { return fault.Is(err, &types.ApplicationQuiesceFault{}) && task(err) }},
		{"status", vspheretest.Fault{Status: 503}, false, func(err error) bool { return err != nil && !soap.IsSoapFault(err) }},
		{"before", vspheretest.Fault{Cut: vspheretest.Before}, false, func(err error) bool { return err != nil && !soap.IsSoapFault(err) }},
		{"after", vspheretest.Fault{Cut: vspheretest.After}, true, func(err error) bool { return err != nil && !soap.IsSoapFault(err) }},
		{"truncated", vspheretest.Fault{Truncate: true}, true, func(err error) bool { return err != nil && !soap.IsSoapFault(err) }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.fault.Times, tt.fault.Skip, tt.fault.VM = 1, 1, "web01"
			rule := s.On("CreateSnapshot_Task", tt.fault)
			tt.fault.VM = "another VM"
			s.On("CreateSnapshot_Task", tt.fault)
			tt.fault.VM, tt.fault.Where = "", func(c vspheretest.Call) bool { return strings.Contains(c.Body, "another name") }
			s.On("CreateSnapshot_Task", tt.fault)
			if err := create(); err != nil || rule.Hits() != 0 {
				t.Fatalf("skipped call: %v, %d hits", err, rule.Hits())
			}
			if err := create(); !tt.check(err) {
				t.Errorf("error %v", err)
			}
			if err := create(); err != nil || rule.Hits() != 1 {
				t.Fatalf("call after the fault: %v, %d hits", err, rule.Hits())
			}
			want := 2
			if tt.executed {
				want = 3
			}
			s.Settle()
			if n := len(s.SnapshotNames("web01")); n != want {
				t.Errorf("%d snapshots, want %d", n, want)
			}
			s.RemoveSnapshotBehindBack("web01", "")
		})
	}
}

// task reports whether err is the error of a task.
func task(err error) bool {
	var e task_.Error
	return errors.As(err, &e)
}

func TestHanging(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	c := connect(t, s)
	vm, _ := machine(t, c, s, "web01")
	for _, tt := range []struct {
		name     string
		fault    vspheretest.Fault
		executed bool // before the release
	}{
		{"call", vspheretest.Fault{Hang: true}, false},
		{"answer", vspheretest.Fault{Late: true}, true},
		{"task", vspheretest.Fault{HangTask: true}, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			rule := s.On("CreateSnapshot_Task", tt.fault)
			done := make(chan error)
			go func() {
				task, err := vm.CreateSnapshot(context.Background(), "x", "", false, false)
				if err == nil {
					err = task.Wait(context.Background())
				}
				done <- err
			}()
			<-rule.Arrived()
			if tt.executed {
				s.Settle()
				equal(t, "snapshots before the release", s.SnapshotNames("web01"), []string{"x"})
			} else {
				machine(t, c, s, "web01") // can be read while the task hangs
				if len(s.SnapshotNames("web01")) != 0 {
					t.Error("executed before the release")
				}
			}
			rule.Remove()
			if err := <-done; err != nil {
				t.Error(err)
			}
			equal(t, "snapshots", s.SnapshotNames("web01"), []string{"x"})
			s.RemoveSnapshotBehindBack("web01", "x")
		})
	}
}

// A session that was ended does not come back because of calls that ran at that time.
func TestEndedSessionsStayEnded(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	c := connect(t, s)
	for range 50 {
		var stop atomic.Bool
		var calls sync.WaitGroup
		for range 4 {
			calls.Go(func() {
				for !stop.Load() {
					methods.GetCurrentTime(t.Context(), c.Client)
				}
			})
		}
		s.EndSessions()
		stop.Store(true)
		calls.Wait()
		if _, err := methods.GetCurrentTime(t.Context(), c.Client); !fault.Is(err, &types.NotAuthenticated{}) {
			t.Fatalf("call of an ended session: %v", err)
		}
		if err := c.Login(t.Context(), s.URL.User); err != nil {
			t.Fatal(err)
		}
	}
}

func TestSessions(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	c := connect(t, s)
	if list := s.Sessions(); len(list) != 1 || list[0].User != s.User {
		t.Errorf("sessions %v", list)
	}
	s.EndSessions()
	if _, err := methods.GetCurrentTime(t.Context(), c.Client); !fault.Is(err, &types.NotAuthenticated{}) {
		t.Errorf("call of an ended session: %v", err)
	}
	if list := s.Sessions(); len(list) != 0 {
		t.Errorf("sessions %v", list)
	}
	if err := c.Login(t.Context(), s.URL.User); err != nil {
		t.Error(err)
	}
	s.Restart()
	if _, err := methods.GetCurrentTime(t.Context(), c.Client); err == nil {
		t.Error("the session has survived a restart")
	}
	if n := s.Calls()["CurrentTime"]; n < 1 {
		t.Errorf("calls %v", s.Calls())
	}
}
