package vsphere

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// withSnapshot returns a server with the VM web01 and a snapshot of vddkcp.
func withSnapshot(t *testing.T) (*vspheretest.Server, *VM, inventory.Request) {
	t.Helper()
	server := vspheretest.New(t, web01)
	v := findVM(t, server, "web01")
	r := newRequest()
	if _, err := v.Snapshot(t.Context(), r); err != nil {
		t.Fatal(err)
	}
	return server, v, r
}

func TestRemoveFaults(t *testing.T) {
	for _, test := range []struct {
		name  string
		fault vspheretest.Fault
		err   string // "": the snapshot is removed
		calls int
	}{
		{name: "none", calls: 1},
		{name: "answer lost", fault: vspheretest.Fault{Cut: vspheretest.After, Times: 1}, calls: 2},
		{name: "request lost", fault: vspheretest.Fault{Cut: vspheretest.Before, Times: 1}, calls: 2},
		{name: "request lost more often than a call is repeated", fault: vspheretest.Fault{Cut: vspheretest.Before, Times: 10}, calls: 11},
		{name: "answer truncated", fault: vspheretest.Fault{Truncate: true, Times: 1}, calls: 2},
		{name: "session ended", fault: vspheretest.Fault{Soap: &types.NotAuthenticated{}, Times: 1}, calls: 2},
		{name: "other task", fault: vspheretest.Fault{Soap: &types.TaskInProgress{}, Times: 10}, calls: 11},
		{name: "task fails because of another task", fault: vspheretest.Fault{Task: &types.TaskInProgress{}, Times: 2}, calls: 3},
		{name: "host lost", fault: vspheretest.Fault{Task: &types.HostCommunication{}, Times: 10}, calls: 11},
		{name: "late", fault: vspheretest.Fault{Task: &types.Timedout{}, Times: 10}, calls: 11},
		{name: "locked", fault: vspheretest.Fault{Task: &types.FileLocked{}, Times: 2}, calls: 3},
		{name: "locked for ever", fault: vspheretest.Fault{Task: &types.FileLocked{}}, err: "a file of the VM is locked", calls: 5},
		{name: "unknown", fault: vspheretest.Fault{Task: &types.GenericVmConfigFault{Reason: "x"}, Times: 4}, calls: 5},
		{name: "unknown for ever", fault: vspheretest.Fault{Task: &types.GenericVmConfigFault{Reason: "x"}}, err: "GenericVmConfigFault", calls: 5},
		{name: "cancelled", fault: vspheretest.Fault{Task: &types.RequestCanceled{}, Times: 1}, calls: 2},
		{name: "no permission", fault: vspheretest.Fault{Soap: &types.NoPermission{PrivilegeId: "VirtualMachine.State.RemoveSnapshot"}},
			err: "lacks the privilege VirtualMachine.State.RemoveSnapshot", calls: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			server, v, r := withSnapshot(t)
			server.On("RemoveSnapshot_Task", test.fault)
			err := v.Remove(t.Context(), r.Name, nil)
			want := []string{"base", "before update"}
			if test.err != "" {
				want = append(want, r.Name)
				if l := (*inventory.LeftError)(nil); !errors.As(err, &l) || l.VM != "web01" || l.Snapshot != r.Name || l.Files ||
					!strings.Contains(err.Error(), "was not removed: ") || !strings.Contains(err.Error(), test.err) || !strings.Contains(hinted.Of(err), "cleanup --remove") {
					t.Errorf("error %v, hint %q", err, hinted.Of(err))
				}
			} else if err != nil {
				t.Error(err)
			}
			if got := server.SnapshotNames("web01"); !slices.Equal(got, want) {
				t.Errorf("snapshots %q, want %q", got, want)
			}
			if n := server.Calls()["RemoveSnapshot_Task"]; n != test.calls {
				t.Errorf("%d calls of RemoveSnapshot_Task, want %d", n, test.calls)
			}
		})
	}
}

func TestRemoveOfWhatIsGone(t *testing.T) {
	for name, act := range map[string]func(server *vspheretest.Server, snapshot string){
		"before the call": func(server *vspheretest.Server, snapshot string) { server.RemoveSnapshotBehindBack("web01", snapshot) },
		"during the call": func(server *vspheretest.Server, snapshot string) {
			server.On("RemoveSnapshot_Task", vspheretest.Fault{Do: func() { server.RemoveSnapshotBehindBack("web01", snapshot) }})
		},
		"the VM": func(server *vspheretest.Server, _ string) { server.Destroy("web01") },
		"the VM during the call": func(server *vspheretest.Server, _ string) {
			server.On("RemoveSnapshot_Task", vspheretest.Fault{Do: func() { server.Destroy("web01") }})
		},
		"the sessions": func(server *vspheretest.Server, _ string) { server.EndSessions() },
		"the task": func(server *vspheretest.Server, _ string) {
			onceCalled(server, "RemoveSnapshot_Task", countdown(1, func() {
				server.Settle()
				server.Restart()
			}))
		},
		"the server for a moment": func(server *vspheretest.Server, _ string) {
			server.On("RemoveSnapshot_Task", vspheretest.Fault{Do: server.Restart, Times: 1})
		},
	} {
		t.Run(name, func(t *testing.T) {
			server, v, r := withSnapshot(t)
			act(server, r.Name)
			if err := v.Remove(t.Context(), r.Name, nil); err != nil {
				t.Error(err)
			}
			if strings.Contains(name, "VM") {
				return
			}
			if got := server.SnapshotNames("web01"); !slices.Equal(got, []string{"base", "before update"}) {
				t.Errorf("snapshots %q", got)
			}
		})
	}
}

// Two snapshots of one name exist if the server has carried out two requests after all. A snapshot
// that a user has made above them stays.
func TestRemoveAllOfOneName(t *testing.T) {
	server, v, r := withSnapshot(t)
	server.AddSnapshot("web01", r.Name, r.Mark.String())
	server.AddSnapshot("web01", "of the user", "")
	if err := v.Remove(t.Context(), r.Name, nil); err != nil {
		t.Error(err)
	}
	if got := server.SnapshotNames("web01"); !slices.Equal(got, []string{"base", "before update", "of the user"}) {
		t.Errorf("snapshots %q", got)
	}
}

func TestRemoveOfForeignSnapshots(t *testing.T) {
	server, v, r := withSnapshot(t)
	foreign := server.Snapshots("web01")[0]
	for _, name := range []string{foreign.Name, ""} {
		if err := v.Remove(t.Context(), name, nil); err == nil {
			t.Errorf("Remove(%q) returns no error", name)
		}
	}
	if err := v.RemoveMoref(t.Context(), foreign.Ref.Value, nil); err != nil {
		t.Error(err)
	}
	if got := server.SnapshotNames("web01"); len(got) != 3 || server.Calls()["RemoveSnapshot_Task"] != 0 {
		t.Errorf("snapshots %q", got)
	}
	if err := v.RemoveMoref(t.Context(), server.Snapshots("web01")[2].Ref.Value, nil); err != nil {
		t.Error(err)
	}
	if got := server.SnapshotNames("web01"); slices.Contains(got, r.Name) {
		t.Errorf("snapshots %q", got)
	}
}

func TestConsolidate(t *testing.T) {
	for _, test := range []struct {
		name   string
		before bool // the disks need consolidation before the snapshot is made
		again  bool // the removal is that of another process
		fault  vspheretest.Fault
		err    string
		calls  int
	}{
		{name: "once", calls: 1},
		{name: "in another process", again: true, calls: 1},
		{name: "needed before", before: true, calls: 0},
		{name: "needed before, in another process", before: true, again: true, calls: 0},
		{name: "locked", fault: vspheretest.Fault{Task: &types.FileLocked{}, Times: 1}, calls: 2},
		{name: "locked for ever", fault: vspheretest.Fault{Task: &types.FileLocked{}}, calls: 5, err: "a file of the VM is locked"},
		{name: "other task", fault: vspheretest.Fault{Soap: &types.TaskInProgress{}, Times: 10}, calls: 11},
		{name: "no permission", fault: vspheretest.Fault{Soap: &types.NoPermission{}}, calls: 1, err: "lacks a privilege"},
		{name: "answer lost", fault: vspheretest.Fault{Cut: vspheretest.After, Times: 1}, calls: 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := vspheretest.New(t, web01)
			if test.before {
				server.NeedConsolidation("web01")
			}
			v := findVM(t, server, "web01")
			r := newRequest()
			if _, err := v.Snapshot(t.Context(), r); err != nil {
				t.Fatal(err)
			}
			if !test.before {
				server.KeepFiles("web01")
			}
			if test.again {
				v = findVM(t, server, "web01")
			}
			server.On("ConsolidateVMDisks_Task", test.fault)
			err := v.Remove(t.Context(), r.Name, nil)
			d, describeErr := v.Describe(t.Context())
			if describeErr != nil {
				t.Fatal(describeErr)
			}
			if n := server.Calls()["ConsolidateVMDisks_Task"]; n != test.calls {
				t.Errorf("%d calls of ConsolidateVMDisks_Task, want %d", n, test.calls)
			}
			if want := test.before || test.err != ""; d.ConsolidationNeeded != want || len(d.Snapshots) != 2 {
				t.Errorf("consolidation is needed: %v, want %v; snapshots %+v", d.ConsolidationNeeded, want, d.Snapshots)
			}
			if test.err == "" {
				if err != nil {
					t.Error(err)
				}
			} else if l := (*inventory.LeftError)(nil); !errors.As(err, &l) || !l.Files || !strings.Contains(err.Error(), test.err) || hinted.Of(err) == "" {
				t.Errorf("error %v", err)
			}
		})
	}
}

// A removal can fail after the snapshot has left the tree. The files are consolidated then.
func TestRemovalThatFailsLate(t *testing.T) {
	server, v, r := withSnapshot(t)
	server.KeepFiles("web01")
	server.On("RemoveSnapshot_Task", vspheretest.Fault{Task: &types.FileLocked{}, Do: func() { server.RemoveSnapshotBehindBack("web01", r.Name) }})
	if err := v.Remove(t.Context(), r.Name, nil); err != nil {
		t.Error(err)
	}
	if d, err := v.Describe(t.Context()); err != nil || d.ConsolidationNeeded || server.Calls()["ConsolidateVMDisks_Task"] != 1 {
		t.Errorf("consolidation is needed: %v, error %v, calls %v", d.ConsolidationNeeded, err, server.Calls())
	}
}

// Another process has asked for the snapshot, and was killed before the server has made it.
func TestRemoveWaitsForSnapshot(t *testing.T) {
	server := vspheretest.New(t, web01)
	other := findVM(t, server, "web01")
	r, rule := askForSnapshot(t, server)
	if err := other.Remove(t.Context(), r.Name, nil); err != nil {
		t.Error(err)
	}
	rule.Release()
	server.Settle()
	if got := server.SnapshotNames("web01"); len(got) != 2 {
		t.Errorf("snapshots %q", got)
	}
}

// While another task runs, the server is not asked for the removal again and again.
func TestRemoveWaitsForOtherTask(t *testing.T) {
	server, v, r := withSnapshot(t)
	onceCalled(server, "RemoveSnapshot_Task", countdown(10, server.StartTask("web01", "backup")))
	if err := v.Remove(t.Context(), r.Name, nil); err != nil {
		t.Error(err)
	}
	if n := server.Calls()["RemoveSnapshot_Task"]; n != 2 || len(server.SnapshotNames("web01")) != 2 {
		t.Errorf("%d calls of RemoveSnapshot_Task", n)
	}
}

func TestRemoveProgress(t *testing.T) {
	server, v, r := withSnapshot(t)
	rule := server.On("RemoveSnapshot_Task", vspheretest.Fault{HangTask: true})
	var got []int
	err := v.Remove(t.Context(), r.Name, func(percent int) {
		got = append(got, percent)
		if percent == 50 {
			rule.Release()
		}
	})
	if err != nil || got[len(got)-1] != 50 || !slices.IsSorted(got) || len(got) > 2 {
		t.Errorf("progress %v, error %v", got, err)
	}
}

func TestRemoveInterrupted(t *testing.T) {
	server, v, r := withSnapshot(t)
	rule := server.On("RemoveSnapshot_Task", vspheretest.Fault{HangTask: true})
	ctx, cancel := context.WithCancelCause(t.Context())
	stopped := errors.New("second signal")
	onceCalled(server, "RemoveSnapshot_Task", func() { cancel(stopped) })
	err := v.Remove(ctx, r.Name, nil)
	if l := (*inventory.LeftError)(nil); !errors.As(err, &l) || !errors.Is(err, stopped) || !strings.Contains(err.Error(), "the task to remove the snapshot still runs on the server") {
		t.Errorf("error %v", err)
	}
	server.ClearFaults()
	rule.Release()
	if err := v.Remove(t.Context(), r.Name, nil); err != nil {
		t.Error(err)
	}
	if got := server.SnapshotNames("web01"); len(got) != 2 {
		t.Errorf("snapshots %q", got)
	}
}

func TestRemoveTimeout(t *testing.T) {
	server, _, r := withSnapshot(t)
	v := findVM(t, server, "web01", shortTasks)
	server.On("RemoveSnapshot_Task", vspheretest.Fault{Task: &types.HostCommunication{}})
	err := v.Remove(t.Context(), r.Name, nil)
	if l := (*inventory.LeftError)(nil); !errors.As(err, &l) || !strings.Contains(err.Error(), "100ms, has passed") {
		t.Errorf("error %v", err)
	}
}

func TestMarked(t *testing.T) {
	server := vspheretest.New(t, web01, vspheretest.VM{Name: "db/01", Folder: "prod"}, vspheretest.VM{Name: "empty"})
	r := []inventory.Request{newRequest(), newRequest(), newRequest()}
	server.AddSnapshot("web01", r[0].Name, r[0].Mark.String())
	server.AddSnapshot("web01", r[1].Name, "not a mark")
	server.AddSnapshot("db/01", r[2].Name+"/7", r[2].Mark.String())
	s := openSession(t, server)
	for pattern, want := range map[string][]string{
		"":          {"/DC0/vm/prod/db%2f01 " + r[2].Name + "/7", "/DC0/vm/web01 " + r[0].Name},
		"web*":      {"/DC0/vm/web01 " + r[0].Name},
		"empty":     nil,
		"nothing*":  nil,
		"prod/db/*": nil,
	} {
		marked, _, err := s.Marked(t.Context(), pattern)
		var got []string
		for _, m := range marked {
			got = append(got, m.Path+" "+m.Name)
			if m.VM.Moref() != server.Find(m.VM.Name()).Value || m.Age < 0 || m.Age > time.Hour || m.Mark.Host != "proxy" {
				t.Errorf("%+v", m)
			}
		}
		if err != nil || !slices.Equal(got, want) {
			t.Errorf("Marked(%q) = %q, %v; want %q", pattern, got, err, want)
		}
	}
	if _, _, err := s.Marked(t.Context(), "nothing"); err == nil {
		t.Error("no error for a VM that is not there")
	}
}

func TestMissing(t *testing.T) {
	server := vspheretest.New(t, web01)
	s := openSession(t, server)
	vms, err := s.List(t.Context(), "web01")
	if err != nil {
		t.Fatal(err)
	}
	all := []inventory.Use{inventory.UseSnapshot, inventory.UseVDDK, inventory.UseEncrypted, inventory.UseHTTPS, inventory.UsePrepareAccess}
	if missing, err := s.Missing(t.Context(), vms[0], all...); err != nil || len(missing) != 0 {
		t.Errorf("missing %+v, error %v", missing, err)
	}
	server.RevokePrivilege("VirtualMachine.State.CreateSnapshot")
	server.RevokePrivilege("Datastore.Browse")
	server.RevokePrivilege("Global.DisableMethods")
	var got []string
	for _, test := range []struct {
		vm   *inventory.VM
		uses []inventory.Use
		want []string
	}{
		{vms[0], all, []string{"VirtualMachine.State.CreateSnapshot web01", "Datastore.Browse ds 2 [x]", "Datastore.Browse ds1", "Global.DisableMethods "}},
		{vms[0], []inventory.Use{inventory.UseVDDK}, nil},
		{nil, []inventory.Use{inventory.UseSnapshot}, []string{"VirtualMachine.State.CreateSnapshot "}},
	} {
		missing, err := s.Missing(t.Context(), test.vm, test.uses...)
		got = nil
		for _, m := range missing {
			got = append(got, m.ID+" "+m.Object)
		}
		if err != nil || !slices.Equal(got, test.want) {
			t.Errorf("missing %q, error %v; want %q", got, err, test.want)
		}
	}
	server.EndSessions()
	if missing, err := s.Missing(t.Context(), vms[0], inventory.UseSnapshot); err != nil || len(missing) != 1 {
		t.Errorf("after the end of the session: missing %+v, error %v", missing, err)
	}
}
