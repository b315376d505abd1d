package vsphere

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// findVM returns a VM of a new session.
func findVM(t *testing.T, server *vspheretest.Server, name string, change ...func(*Options)) *VM {
	t.Helper()
	vm, err := openSession(t, server, change...).Find(t.Context(), name)
	if err != nil {
		t.Fatal(err)
	}
	return vm
}

// rareLooks leaves time for something to happen between two looks at a task.
func rareLooks(o *Options) { o.Poll = 100 * time.Millisecond }

// shortTasks makes every task exceed its time limit, unless it ends at once.
func shortTasks(o *Options) { o.TaskTimeout = 100 * time.Millisecond }

// newRequest returns a request for a snapshot with a new name.
func newRequest() inventory.Request {
	name := inventory.NewName()
	mark := inventory.Mark{ID: strings.TrimPrefix(name, "vddkcp-"), Round: 1, Host: "proxy", Started: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	return inventory.Request{Name: name, Mark: mark}
}

// web01 is a VM with two snapshots of its user.
var web01 = vspheretest.VM{Name: "web01", Snapshots: []string{"base", "before update"}, Disks: []vspheretest.Disk{
	{}, {Mode: "independent_persistent"}, {Datastore: "ds 2 [x]"},
}}

func TestSnapshot(t *testing.T) {
	vm := web01
	vm.ChangeTracking = true
	server := vspheretest.New(t, vm)
	v := findVM(t, server, "web01")
	before, err := v.Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	r := newRequest()
	r.Name += "/2"
	r.Mark.Round = 2
	if _, err := v.Find(t.Context(), r.Name); !errors.Is(err, inventory.ErrSnapshotGone) {
		t.Errorf("Find before the snapshot is made: %v", err)
	}
	made, err := v.Snapshot(t.Context(), r)
	if err != nil {
		t.Fatal(err)
	}
	tree := server.Snapshots("web01")
	if len(tree) != 3 || tree[2].Name != r.Name || tree[2].Ref.Value != made.Moref || made.Name != r.Name || made.Quiesced {
		t.Errorf("snapshot %+v, tree %+v", made, tree)
	}
	if m := inventory.ParseMark(tree[2].Name, tree[2].Description); m == nil || m.Round != 2 || m.Unconsolidated {
		t.Errorf("description %s", tree[2].Description)
	}
	if len(made.Disks) != 2 {
		t.Fatalf("disks %+v", made.Disks)
	}
	after, err := v.Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 2} {
		disk := made.Disk(&after.Disks[n])
		if disk == nil || disk.File != before.Disks[n].File || disk.File == after.Disks[n].File || disk.Size != before.Disks[n].Size ||
			disk.Datastore != before.Disks[n].Datastore || disk.ChangeID == "" || disk.Verdict != inventory.Running {
			t.Errorf("disk of the snapshot %+v; the VM's disk was %+v and is %+v", disk, before.Disks[n], after.Disks[n])
		}
	}
	if made.Disk(&after.Disks[1]) != nil {
		t.Error("an independent disk is in the snapshot")
	}
	for name, f := range map[string]func() (*inventory.Snapshot, error){
		"Find":     func() (*inventory.Snapshot, error) { return v.Find(t.Context(), r.Name) },
		"Snapshot": func() (*inventory.Snapshot, error) { return findVM(t, server, "web01").Snapshot(t.Context(), r) },
	} {
		if again, err := f(); err != nil || fmt.Sprint(again) != fmt.Sprint(made) {
			t.Errorf("%s = %+v, %v; want %+v", name, again, err, made)
		}
	}
	if err := v.Remove(t.Context(), r.Name, nil); err != nil {
		t.Error(err)
	}
	if err := v.Remove(t.Context(), r.Name, nil); err != nil {
		t.Errorf("Remove without a snapshot: %v", err)
	}
	if got := server.SnapshotNames("web01"); !slices.Equal(got, []string{"base", "before update"}) {
		t.Errorf("snapshots at the end: %q", got)
	}
	if n := server.Calls()["CreateSnapshot_Task"]; n != 1 {
		t.Errorf("%d calls of CreateSnapshot_Task", n)
	}
	if _, err := v.Snapshot(t.Context(), inventory.Request{Name: "my snapshot"}); err == nil {
		t.Error("Snapshot makes a snapshot that is not vddkcp's own")
	}
}

func TestSnapshotOfBusyVM(t *testing.T) {
	server := vspheretest.New(t, web01)
	first, second := newRequest(), newRequest()
	if _, err := findVM(t, server, "web01").Snapshot(t.Context(), first); err != nil {
		t.Fatal(err)
	}
	_, err := findVM(t, server, "web01").Snapshot(t.Context(), second)
	if busy := (*inventory.BusyError)(nil); !errors.As(err, &busy) || busy.VM != "web01" || busy.Name != first.Name || busy.Mark.Host != "proxy" ||
		report.Of(err).Exit != 75 {
		t.Errorf("error %v", err)
	}
	if got := server.SnapshotNames("web01"); len(got) != 3 {
		t.Errorf("snapshots %q", got)
	}
}

func TestQuiesce(t *testing.T) {
	for _, test := range []struct {
		name     string
		quiesce  inventory.Quiesce
		fault    types.BaseMethodFault
		quiesced bool
		err      string // "": the snapshot is made
		calls    int
	}{
		{name: "yes", quiesce: inventory.MustQuiesce, quiesced: true, calls: 1},
		{name: "try", quiesce: inventory.TryQuiesce, quiesced: true, calls: 1},
		{name: "yes, application", quiesce: inventory.MustQuiesce, fault: &types.ApplicationQuiesceFault{}, err: "quiescing the guest failed", calls: 1},
		{name: "try, application", quiesce: inventory.TryQuiesce, fault: &types.ApplicationQuiesceFault{}, calls: 2},
		{name: "try, file systems", quiesce: inventory.TryQuiesce, fault: &types.FilesystemQuiesceFault{}, calls: 2},
		{name: "try, no tools", quiesce: inventory.TryQuiesce, fault: &types.ToolsUnavailable{}, calls: 2},
		{name: "try, late", quiesce: inventory.TryQuiesce, fault: &types.Timedout{}, calls: 2},
		{name: "try, other fault", quiesce: inventory.TryQuiesce, fault: &types.GenericVmConfigFault{}, calls: 2},
		{name: "try, no space", quiesce: inventory.TryQuiesce, fault: &types.NoDiskSpace{Datastore: "ds1"}, err: "no space is left", calls: 1},
		{name: "no", fault: &types.ApplicationQuiesceFault{}, calls: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := vspheretest.New(t, vspheretest.VM{Name: "web01"})
			server.QuiesceFails("web01", test.fault)
			r := newRequest()
			r.Quiesce = test.quiesce
			s, err := findVM(t, server, "web01").Snapshot(t.Context(), r)
			names := server.SnapshotNames("web01")
			if test.err == "" {
				if err != nil || s.Quiesced != test.quiesced || !slices.Equal(names, []string{r.Name}) {
					t.Errorf("snapshot %+v, error %v, tree %q", s, err, names)
				}
			} else if err == nil || !strings.Contains(err.Error(), test.err) || len(names) != 0 || report.Of(err).Exit != 1 {
				t.Errorf("error %v, tree %q; want %s", err, names, test.err)
			}
			if n := server.Calls()["CreateSnapshot_Task"]; n != test.calls {
				t.Errorf("%d calls of CreateSnapshot_Task, want %d", n, test.calls)
			}
		})
	}
}

// Whatever happens to the call and its task, one snapshot is made or none, and Remove removes it.
func TestSnapshotFaults(t *testing.T) {
	for _, test := range []struct {
		name  string
		fault vspheretest.Fault
		err   string // "": the snapshot is made
		exit  int
		calls int
	}{
		{name: "answer lost", fault: vspheretest.Fault{Cut: vspheretest.After, Times: 1}, calls: 1},
		{name: "request lost", fault: vspheretest.Fault{Cut: vspheretest.Before, Times: 1}, calls: 2},
		{name: "request lost again and again", fault: vspheretest.Fault{Cut: vspheretest.Before}, err: "it is unknown whether", exit: 75, calls: 3},
		{name: "answer truncated", fault: vspheretest.Fault{Truncate: true, Times: 1}, calls: 1},
		{name: "server too busy", fault: vspheretest.Fault{Status: 503, Times: 1}, calls: 2},
		{name: "session ended", fault: vspheretest.Fault{Soap: &types.NotAuthenticated{}, Times: 1}, calls: 2},
		{name: "other task", fault: vspheretest.Fault{Soap: &types.TaskInProgress{}, Times: 2}, calls: 3},
		{name: "host lost", fault: vspheretest.Fault{Task: &types.HostCommunication{}, Times: 1}, calls: 2},
		{name: "host lost for ever", fault: vspheretest.Fault{Task: &types.HostNotConnected{}}, err: "not connected to vCenter", exit: 75, calls: 6},
		{name: "changed by another client", fault: vspheretest.Fault{Task: &types.ConcurrentAccess{}, Times: 1}, calls: 2},
		{name: "no permission", fault: vspheretest.Fault{Soap: &types.NoPermission{PrivilegeId: "VirtualMachine.State.CreateSnapshot"}},
			err: "lacks the privilege VirtualMachine.State.CreateSnapshot", exit: 1, calls: 1},
		{name: "free license", fault: vspheretest.Fault{Soap: &types.RestrictedVersion{}}, err: "license", exit: 1, calls: 1},
		{name: "no space", fault: vspheretest.Fault{Task: &types.NoDiskSpace{Datastore: "ds1"}}, err: `no space is left on the datastore "ds1"`, exit: 1, calls: 1},
		{name: "too many", fault: vspheretest.Fault{Task: &types.TooManySnapshotLevels{}}, err: "too many snapshots", exit: 1, calls: 1},
		{name: "unknown", fault: vspheretest.Fault{Task: &types.SystemError{Reason: "x"}}, err: "SystemError", exit: 1, calls: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := vspheretest.New(t, web01)
			v := findVM(t, server, "web01")
			server.On("CreateSnapshot_Task", test.fault)
			r := newRequest()
			s, err := v.Snapshot(t.Context(), r)
			want := []string{"base", "before update"}
			if test.err == "" {
				want = append(want, r.Name)
			}
			server.Settle()
			if got := server.SnapshotNames("web01"); !slices.Equal(got, want) {
				t.Errorf("snapshots %q, want %q", got, want)
			}
			if (err == nil) != (test.err == "") || err == nil && s.Name != r.Name {
				t.Errorf("snapshot %+v, error %v", s, err)
			}
			if err != nil && (!strings.Contains(err.Error(), test.err) || report.Of(err).Exit != test.exit) {
				t.Errorf("error %v, exit %d; want %s, %d", err, report.Of(err).Exit, test.err, test.exit)
			}
			if n := server.Calls()["CreateSnapshot_Task"]; n != test.calls {
				t.Errorf("%d calls of CreateSnapshot_Task, want %d", n, test.calls)
			}
			server.ClearFaults()
			if err := v.Remove(t.Context(), r.Name, nil); err != nil {
				t.Error(err)
			}
			if got := server.SnapshotNames("web01"); !slices.Equal(got, want[:2]) {
				t.Errorf("snapshots at the end %q", got)
			}
		})
	}
}

// onceCalled makes the server call f at each request for properties after the first call of the
// given method.
func onceCalled(server *vspheretest.Server, method string, f func()) *vspheretest.Rule {
	return server.On("RetrievePropertiesEx", vspheretest.Fault{Do: func() {
		if server.Calls()[method] > 0 {
			f()
		}
	}})
}

// countdown returns a function that calls f when it is called for the n-th time.
func countdown(n int, f func()) func() {
	return func() {
		if n--; n == 0 {
			f()
		}
	}
}

// While another task runs, the server is not asked for a snapshot again and again.
func TestSnapshotWaitsForOtherTask(t *testing.T) {
	server := vspheretest.New(t, web01)
	v := findVM(t, server, "web01")
	end := server.StartTask("web01", "backup")
	onceCalled(server, "CreateSnapshot_Task", countdown(10, end))
	r := newRequest()
	if _, err := v.Snapshot(t.Context(), r); err != nil {
		t.Error(err)
	}
	if n := server.Calls()["CreateSnapshot_Task"]; n != 2 {
		t.Errorf("%d calls of CreateSnapshot_Task", n)
	}
}

// The server is restarted while it makes the snapshot. It has forgotten the task, not the snapshot.
func TestSnapshotAfterRestart(t *testing.T) {
	server := vspheretest.New(t, web01)
	v := findVM(t, server, "web01")
	onceCalled(server, "CreateSnapshot_Task", countdown(1, func() {
		server.Settle()
		server.Restart()
	}))
	if _, err := v.Snapshot(t.Context(), newRequest()); err != nil {
		t.Error(err)
	}
	if n := server.Calls()["CreateSnapshot_Task"]; n != 1 || len(server.SnapshotNames("web01")) != 3 {
		t.Errorf("%d calls of CreateSnapshot_Task, snapshots %q", n, server.SnapshotNames("web01"))
	}
}

// The server carries out the request some time after the connection was lost.
func TestSnapshotMadeLate(t *testing.T) {
	server := vspheretest.New(t, web01)
	v := findVM(t, server, "web01", rareLooks)
	r := newRequest()
	server.On("CreateSnapshot_Task", vspheretest.Fault{Cut: vspheretest.Before, Times: 1})
	onceCalled(server, "CreateSnapshot_Task", countdown(3, func() { server.AddSnapshot("web01", r.Name, r.Mark.String()) }))
	if made, err := v.Snapshot(t.Context(), r); err != nil || made.Name != r.Name {
		t.Errorf("snapshot %+v, error %v", made, err)
	}
	if got := server.SnapshotNames("web01"); len(got) != 3 || server.Calls()["CreateSnapshot_Task"] != 1 {
		t.Errorf("snapshots %q, calls %v", got, server.Calls())
	}
}

// The same, after Snapshot was interrupted.
func TestRemoveOfSnapshotMadeLate(t *testing.T) {
	server := vspheretest.New(t, web01)
	v := findVM(t, server, "web01", rareLooks)
	r := newRequest()
	ctx, cancel := context.WithCancel(t.Context())
	server.On("CreateSnapshot_Task", vspheretest.Fault{Cut: vspheretest.Before, Do: cancel})
	if made, err := v.Snapshot(ctx, r); err == nil {
		t.Errorf("snapshot %+v", made)
	}
	made := false
	server.On("RetrievePropertiesEx", vspheretest.Fault{Do: countdown(3, func() {
		made = true
		server.AddSnapshot("web01", r.Name, r.Mark.String())
	})})
	if err := v.Remove(t.Context(), r.Name, nil); err != nil {
		t.Error(err)
	}
	if got := server.SnapshotNames("web01"); len(got) != 2 || !made {
		t.Errorf("snapshots %q, made late: %v", got, made)
	}
}

// The context ends while the server makes the snapshot. Snapshot waits a little for it. Remove finds
// the snapshot, even if it is only made after Snapshot has returned.
func TestSnapshotInterrupted(t *testing.T) {
	for _, test := range []struct {
		name  string
		fault vspheretest.Fault
	}{
		{"task", vspheretest.Fault{HangTask: true}},
		{"call", vspheretest.Fault{Hang: true}},
		{"answer", vspheretest.Fault{Late: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			server := vspheretest.New(t, web01)
			v := findVM(t, server, "web01")
			rule := server.On("CreateSnapshot_Task", test.fault)
			ctx, cancel := context.WithCancelCause(t.Context())
			stopped := errors.New("stopped by a signal")
			go func() {
				<-rule.Arrived()
				cancel(stopped)
			}()
			r := newRequest()
			if s, err := v.Snapshot(ctx, r); !errors.Is(err, stopped) {
				t.Errorf("snapshot %+v, error %v", s, err)
			}
			server.On("RetrievePropertiesEx", vspheretest.Fault{Do: rule.Release})
			if err := v.Remove(t.Context(), r.Name, nil); err != nil {
				t.Error(err)
			}
			server.Settle()
			if got := server.SnapshotNames("web01"); len(got) != 2 {
				t.Errorf("snapshots at the end %q", got)
			}
		})
	}
}

func TestSnapshotLingers(t *testing.T) {
	server := vspheretest.New(t, web01)
	v := findVM(t, server, "web01", rareLooks)
	rule := server.On("CreateSnapshot_Task", vspheretest.Fault{HangTask: true})
	ctx, cancel := context.WithCancel(t.Context())
	looks := 0
	onceCalled(server, "CreateSnapshot_Task", func() {
		switch looks++; looks {
		case 1:
			cancel()
		case 2: // the task is asked for after the end of ctx
			rule.Release()
		}
	})
	r := newRequest()
	if s, err := v.Snapshot(ctx, r); !errors.Is(err, context.Canceled) {
		t.Errorf("snapshot %+v, error %v", s, err)
	}
	if got := server.SnapshotNames("web01"); len(got) != 3 {
		t.Errorf("snapshots after an interrupted call %q", got)
	}
}

// askForSnapshot asks for a snapshot of web01 and is interrupted, like a process that is killed. The
// server makes the snapshot at the sixth request for properties after that, or when the rule is
// released.
func askForSnapshot(t *testing.T, server *vspheretest.Server) (inventory.Request, *vspheretest.Rule) {
	t.Helper()
	rule := server.On("CreateSnapshot_Task", vspheretest.Fault{HangTask: true})
	ctx, cancel := context.WithCancel(t.Context())
	called := onceCalled(server, "CreateSnapshot_Task", cancel)
	r := newRequest()
	if s, err := findVM(t, server, "web01").Snapshot(ctx, r); err == nil {
		t.Errorf("snapshot %+v", s)
	}
	called.Remove()
	server.On("RetrievePropertiesEx", vspheretest.Fault{Do: countdown(6, rule.Release)})
	return r, rule
}

// A process that was killed has asked for the snapshot. The next one finds it as soon as it is made.
func TestFindWaitsForSnapshot(t *testing.T) {
	server := vspheretest.New(t, web01)
	other := findVM(t, server, "web01")
	r, _ := askForSnapshot(t, server)
	if s, err := other.Find(t.Context(), r.Name); err != nil || s.Name != r.Name {
		t.Errorf("Find = %+v, %v", s, err)
	}
}

func TestSnapshotTimeout(t *testing.T) {
	server := vspheretest.New(t, web01)
	v := findVM(t, server, "web01", shortTasks)
	rule := server.On("CreateSnapshot_Task", vspheretest.Fault{HangTask: true})
	defer rule.Release()
	_, err := v.Snapshot(t.Context(), newRequest())
	want := `cannot make a snapshot of the VM "web01": the task to make a snapshot still runs on the server: the time limit for tasks of the server, 100ms, has passed`
	if o := report.Of(err); err == nil || err.Error() != want || o.Exit != 75 || !strings.Contains(o.Hint, "--task-timeout") {
		t.Errorf("error %v, outcome %+v", err, o)
	}
}

func TestSnapshotOfVMThatIsGone(t *testing.T) {
	server := vspheretest.New(t, web01)
	v := findVM(t, server, "web01")
	server.Destroy("web01")
	if _, err := v.Snapshot(t.Context(), newRequest()); !errors.Is(err, inventory.ErrVMGone) {
		t.Error(err)
	}
	if _, err := v.Find(t.Context(), inventory.NewName()); !errors.Is(err, inventory.ErrVMGone) {
		t.Error(err)
	}
	if err := v.Remove(t.Context(), inventory.NewName(), nil); err != nil {
		t.Error(err)
	}
}

// TestSnapshotThatCannotBeRemoved checks that no snapshot is made if the user may not remove it, and
// that a server which does not tell the privileges prevents no snapshot.
func TestSnapshotThatCannotBeRemoved(t *testing.T) {
	server := vspheretest.New(t, web01)
	vm := findVM(t, server, "web01")
	server.RevokePrivilege("VirtualMachine.State.RemoveSnapshot")
	_, err := vm.Snapshot(t.Context(), newRequest())
	if o := report.Of(err); err == nil || o.Exit != 1 || o.Transient || o.Hint != hintPrivileges || !strings.Contains(err.Error(), "VirtualMachine.State.RemoveSnapshot") {
		t.Errorf("%v, %+v", err, report.Of(err))
	}
	if calls := server.Calls()["CreateSnapshot_Task"]; calls != 0 {
		t.Errorf("%d calls of CreateSnapshot_Task", calls)
	}
	server.GrantPrivilege("VirtualMachine.State.RemoveSnapshot")
	server.On("HasPrivilegeOnEntities", vspheretest.Fault{Soap: &types.SystemError{}})
	r := newRequest()
	if _, err := vm.Snapshot(t.Context(), r); err != nil {
		t.Error(err)
	}
	if err := vm.Remove(t.Context(), r.Name, nil); err != nil {
		t.Error(err)
	}
}
