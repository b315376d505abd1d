package vspheretest_test

import (
	"crypto/tls"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi"
	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// run waits for a task and returns its error.
func run(t *testing.T, c *govmomi.Client, ref func() (types.ManagedObjectReference, error)) error {
	t.Helper()
	task, err := ref()
	if err != nil {
		return err
	}
	return object.NewTask(c.Client, task).Wait(t.Context())
}

func createSnapshot(t *testing.T, c *govmomi.Client, vm types.ManagedObjectReference, name string, quiesce bool) error {
	t.Helper()
	return run(t, c, func() (types.ManagedObjectReference, error) {
		res, err := methods.CreateSnapshot_Task(t.Context(), c.Client, &types.CreateSnapshot_Task{This: vm, Name: name, Quiesce: quiesce})
		if err != nil {
			return vm, err
		}
		return res.Returnval, nil
	})
}

func removeSnapshot(t *testing.T, c *govmomi.Client, ref types.ManagedObjectReference) error {
	t.Helper()
	return run(t, c, func() (types.ManagedObjectReference, error) {
		res, err := methods.RemoveSnapshot_Task(t.Context(), c.Client, &types.RemoveSnapshot_Task{This: ref})
		if err != nil {
			return ref, err
		}
		return res.Returnval, nil
	})
}

func TestConsolidation(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.WithLibrary(), vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Content: []byte("one")}}})
	c := connect(t, s)
	ref := s.Find("web01")
	snapshot := s.AddSnapshot("web01", "a", "")
	s.Write("web01", 1, []byte("two"), 0)
	s.KeepFiles("web01")
	if err := removeSnapshot(t, c, snapshot); err != nil {
		t.Fatal(err)
	}
	_, vm := machine(t, c, s, "web01")
	if !vm.Runtime.ConsolidationNeeded || vm.Snapshot != nil {
		t.Errorf("consolidation needed: %v, snapshots: %v", vm.Runtime.ConsolidationNeeded, vm.Snapshot)
	}
	equal(t, "files", s.Files("web01"), []string{"[ds1] web01/web01-000001.vmdk"})
	consolidate := func() error {
		return run(t, c, func() (types.ManagedObjectReference, error) {
			res, err := methods.ConsolidateVMDisks_Task(t.Context(), c.Client, &types.ConsolidateVMDisks_Task{This: ref})
			if err != nil {
				return ref, err
			}
			return res.Returnval, nil
		})
	}
	s.On("ConsolidateVMDisks_Task", vspheretest.Fault{Task: &types.FileLocked{}, Times: 1})
	if err := consolidate(); !fault.Is(err, &types.FileLocked{}) {
		t.Errorf("consolidation of locked files: %v", err)
	}
	if err := consolidate(); err != nil {
		t.Error(err)
	}
	_, vm = machine(t, c, s, "web01")
	if vm.Runtime.ConsolidationNeeded {
		t.Error("still needed")
	}
	equal(t, "files", s.Files("web01"), []string{"[ds1] web01/web01.vmdk"})
	text, err := os.ReadFile(s.Library.Disk("[ds1] web01/web01.vmdk"))
	if err != nil || string(text[:3]) != "two" {
		t.Errorf("content %q, %v", text[:3], err)
	}
	links, err := filepath.Glob(filepath.Join(s.Library.Dir, "disks", "*", "*", "*"))
	if err != nil || len(links) != 1 {
		t.Errorf("files of the library: %v, %v", links, err)
	}
}

func TestRefusedSnapshots(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"}, vspheretest.VM{Name: "template", Template: true},
		vspheretest.VM{Name: "lost", NoConfig: true}, vspheretest.VM{Name: "shared", Disks: []vspheretest.Disk{{Bus: "virtualSharing"}}})
	c := connect(t, s)
	ref := s.Find("web01")
	want := func(what string, err error, f types.BaseMethodFault) {
		t.Helper()
		if !fault.Is(err, f) {
			t.Errorf("%s: error %v, want %T", what, err, f)
		}
	}
	end := s.StartTask("web01", "backup")
	err := createSnapshot(t, c, ref, "x", false)
	want("during another task", err, &types.TaskInProgress{})
	_, vm := machine(t, c, s, "web01")
	fault.In(err, func(f types.BaseMethodFault, _ string, _ []types.LocalizableMessage) bool {
		if p, ok := f.(*types.TaskInProgress); ok && (len(vm.RecentTask) == 0 || p.Task != vm.RecentTask[len(vm.RecentTask)-1]) {
			t.Errorf("task %v, recent tasks %v", p.Task, vm.RecentTask)
		}
		return false
	})
	end()
	s.Settle()
	want("after another task", createSnapshot(t, c, ref, "x", false), nil)

	s.QuiesceFails("web01", &types.ApplicationQuiesceFault{})
	want("quiesced", createSnapshot(t, c, ref, "x", true), &types.ApplicationQuiesceFault{})
	want("not quiesced", createSnapshot(t, c, ref, "x", false), nil)
	s.QuiesceFails("web01", nil)
	want("quiesced again", createSnapshot(t, c, ref, "x", true), nil)

	s.FillDatastore("ds1", 0)
	want("full datastore", createSnapshot(t, c, ref, "x", false), &types.NoDiskSpace{})
	s.FillDatastore("ds1", 1<<30)

	s.RevokePrivilege("VirtualMachine.State.CreateSnapshot")
	want("without a privilege", createSnapshot(t, c, ref, "x", false), &types.NoPermission{})
	s.GrantPrivilege("VirtualMachine.State.CreateSnapshot")

	for range 32 - 3 {
		want("deeper", createSnapshot(t, c, ref, "x", false), nil)
	}
	want("too deep", createSnapshot(t, c, ref, "x", false), &types.TooManySnapshotLevels{})
	want("template", createSnapshot(t, c, s.Find("template"), "x", false), &types.InvalidState{})
	want("no configuration", createSnapshot(t, c, s.Find("lost"), "x", false), &types.InvalidState{})
	want("shared bus", createSnapshot(t, c, s.Find("shared"), "x", false), &types.SnapshotIncompatibleDeviceInVm{})
	s.PowerOff("shared")
	want("shared bus, powered off", createSnapshot(t, c, s.Find("shared"), "x", false), nil)
}

func TestPrivileges(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	c := connect(t, s)
	ref := s.Find("web01")
	session, err := c.SessionManager.UserSession(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.RevokePrivilege("VirtualMachine.State.RemoveSnapshot")
	m := object.NewAuthorizationManager(c.Client)
	ids := []string{"VirtualMachine.State.CreateSnapshot", "VirtualMachine.State.RemoveSnapshot"}
	res, err := methods.HasPrivilegeOnEntities(t.Context(), c.Client, &types.HasPrivilegeOnEntities{
		This: m.Reference(), Entity: []types.ManagedObjectReference{ref}, SessionId: session.Key, PrivId: ids})
	if err != nil {
		t.Fatal(err)
	}
	equal(t, "privileges", res.Returnval[0].PrivAvailability, []types.PrivilegeAvailability{{PrivId: ids[0], IsGranted: true}, {PrivId: ids[1]}})
	for _, tt := range []struct{ session, id string }{{session.Key, "VirtualMachine.Fly"}, {"other", ids[0]}} {
		_, err := methods.HasPrivilegeOnEntities(t.Context(), c.Client, &types.HasPrivilegeOnEntities{
			This: m.Reference(), Entity: []types.ManagedObjectReference{ref}, SessionId: tt.session, PrivId: []string{tt.id}})
		if !fault.Is(err, &types.InvalidArgument{}) {
			t.Errorf("%v: %v", tt, err)
		}
	}
}

func TestPower(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"}, vspheretest.VM{Name: "quiet", ToolsStopped: true})
	c := connect(t, s)
	vm, _ := machine(t, c, s, "web01")
	if err := vm.ShutdownGuest(t.Context()); err != nil {
		t.Fatal(err)
	}
	s.Settle()
	state, err := vm.PowerState(t.Context())
	if err != nil || state != types.VirtualMachinePowerStatePoweredOff {
		t.Errorf("%v, %v", state, err)
	}
	if err := vm.ShutdownGuest(t.Context()); !fault.Is(err, &types.InvalidPowerState{}) {
		t.Errorf("shutdown when off: %v", err)
	}
	task, err := vm.PowerOff(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := task.Wait(t.Context()); !fault.Is(err, &types.InvalidPowerState{}) {
		t.Errorf("power off when off: %v", err)
	}
	s.PowerOn("web01")
	if state, _ := vm.PowerState(t.Context()); state != types.VirtualMachinePowerStatePoweredOn {
		t.Errorf("state %v", state)
	}
	quiet, _ := machine(t, c, s, "quiet")
	if err := quiet.ShutdownGuest(t.Context()); !fault.Is(err, &types.ToolsUnavailable{}) {
		t.Errorf("shutdown without tools: %v", err)
	}
}

func TestMoves(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.WithLibrary(), vspheretest.Datastore{Name: "other store"},
		vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Content: []byte("one")}}, Snapshots: []string{"theirs"}})
	c := connect(t, s)
	_, before := machine(t, c, s, "web01")
	s.MoveHost("web01", "esx2.test")
	s.MoveDatastore("web01", "other store")
	s.Rename("web01", "web/02")
	s.Question("web/02", "Was it moved or copied?")
	_, after := machine(t, c, s, "web/02")
	equal(t, "files", s.Files("web/02"), []string{"[other store] web01/web01-000001.vmdk"})
	equal(t, "name", after.Name, "web%2f02")
	equal(t, "question", after.Runtime.Question.Text, "Was it moved or copied?")
	if *after.Runtime.Host == *before.Runtime.Host || after.Config.ChangeVersion == before.Config.ChangeVersion {
		t.Errorf("host %v, version %v", after.Runtime.Host, after.Config.ChangeVersion)
	}
	for _, name := range []string{"web01.vmdk", "web01-000001.vmdk"} {
		text, err := os.ReadFile(s.Library.Disk("[other store] web01/" + name))
		if err != nil || string(text[:3]) != "one" {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := os.Lstat(s.Library.Disk("[ds1] web01/" + name)); err == nil {
			t.Errorf("%s is still where it was", name)
		}
	}
	ref := s.Find("web/02")
	s.Destroy("web/02")
	if err := createSnapshot(t, c, ref, "x", false); !fault.Is(err, &types.ManagedObjectNotFound{}) {
		t.Errorf("snapshot of a VM that was removed: %v", err)
	}
	if links, _ := filepath.Glob(filepath.Join(s.Library.Dir, "disks", "*", "*", "*")); len(links) != 0 {
		t.Errorf("files of a VM that was removed: %v", links)
	}
}

func TestCertificate(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	dial := func() string {
		t.Helper()
		c, err := tls.Dial("tcp", s.URL.Host, &tls.Config{InsecureSkipVerify: true})
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		return soap.ThumbprintSHA1(c.ConnectionState().PeerCertificates[0])
	}
	old := dial()
	equal(t, "SHA-1", s.ThumbprintSHA1(), old)
	if n := len(s.Thumbprint()); n != 32*3-1 {
		t.Errorf("SHA-256 %q", s.Thumbprint())
	}
	c := connect(t, s)
	s.RenewCertificate()
	if now := dial(); now == old || now != s.ThumbprintSHA1() {
		t.Errorf("thumbprint %s after %s", now, old)
	}
	if _, err := methods.GetCurrentTime(t.Context(), c.Client); err != nil { // the session lives on
		t.Error(err)
	}
}

func TestIdleLimit(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"}, vspheretest.Configure(func(o *vspheretest.Options) { o.IdleLimit = time.Millisecond }))
	connect(t, s)
	for len(s.Sessions()) > 0 {
		time.Sleep(time.Millisecond) // the simulator's clock is the real one
	}
}

func TestStrictLogin(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.WithLibrary(), vspheretest.Configure(func(o *vspheretest.Options) { o.StrictLogin = true }))
	s.Library.Conf("latency read 1")
	c := connect(t, s)
	cookie := func() string {
		t.Helper()
		text, err := os.ReadFile(filepath.Join(s.Library.Dir, "vddktest.conf"))
		if err != nil || strings.Count(string(text), "cookie ") != 1 || !strings.Contains(string(text), "latency read 1\n") {
			t.Fatalf("script %q, %v", text, err)
		}
		_, rest, _ := strings.Cut(string(text), "cookie ")
		line, _, _ := strings.Cut(rest, "\n")
		return line
	}
	want := s.Sessions()[0].Key
	equal(t, "cookie", cookie(), want)
	s.EndSessions()
	if cookie() == want {
		t.Error("the cookie of an ended session is accepted")
	}
	if err := c.Login(t.Context(), s.URL.User); err != nil {
		t.Fatal(err)
	}
	equal(t, "cookie", cookie(), s.Sessions()[0].Key)
}

func TestStopped(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	c := connect(t, s)
	s.Stop()
	if _, err := methods.GetCurrentTime(t.Context(), c.Client); err == nil || soap.IsSoapFault(err) {
		t.Errorf("call of a stopped server: %v", err)
	}
	s.Resume()
	if _, err := methods.GetCurrentTime(t.Context(), c.Client); err != nil {
		t.Error(err)
	}
	if err := connectAs(t, s, "nobody"); !fault.Is(err, &types.InvalidLogin{}) {
		t.Errorf("wrong login: %v", err)
	}
}

func connectAs(t *testing.T, s *vspheretest.Server, user string) error {
	u := *s.URL
	u.User = nil
	c, err := govmomi.NewClient(t.Context(), &u, true)
	if err != nil {
		return err
	}
	_, err = methods.Login(t.Context(), c.Client, &types.Login{This: *c.ServiceContent.SessionManager, UserName: user, Password: "x"})
	return err
}

func TestChangedAreas(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.WithLibrary(), vspheretest.VM{Name: "web01", Disks: []vspheretest.Disk{{Size: 1 << 20}}})
	c := connect(t, s)
	ref := s.Find("web01")
	reconfigure := func(on bool) {
		t.Helper()
		err := run(t, c, func() (types.ManagedObjectReference, error) {
			res, err := methods.ReconfigVM_Task(t.Context(), c.Client, &types.ReconfigVM_Task{This: ref, Spec: types.VirtualMachineConfigSpec{ChangeTrackingEnabled: types.NewBool(on)}})
			if err != nil {
				return ref, err
			}
			return res.Returnval, nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	reconfigure(true)
	id := func(snapshot types.ManagedObjectReference) string {
		t.Helper()
		list, err := snapshotDisks(t, c, snapshot)
		if err != nil {
			t.Fatal(err)
		}
		return list[0][1]
	}
	query := func(snapshot types.ManagedObjectReference, since string, start int64) (string, error) {
		res, err := methods.QueryChangedDiskAreas(t.Context(), c.Client, &types.QueryChangedDiskAreas{This: ref, Snapshot: &snapshot, DeviceKey: 2000, ChangeId: since, StartOffset: start})
		if err != nil {
			return "", err
		}
		return fmt.Sprint(res.Returnval.StartOffset, "+", res.Returnval.Length, " ", res.Returnval.ChangedArea), nil
	}
	one := s.AddSnapshot("web01", "one", "")
	first := id(one)
	s.Write("web01", 1, []byte("x"), 70000)
	s.RemoveSnapshotBehindBack("web01", "one")
	two := s.AddSnapshot("web01", "two", "")
	s.Write("web01", 1, []byte("x"), 1<<20-1)
	for _, tt := range []struct {
		since string
		start int64
		want  string
	}{
		{first, 0, "0+1048576 [{{} 65536 65536}]"},
		{first, 70000, "70000+978576 [{{} 70000 61072}]"},
		{id(two), 0, "0+1048576 []"},
		{"*", 0, "0+1048576 [{{} 0 1048576}]"},
		{first, 1 << 20, "startOffset"},
		{"other/1", 0, "changeId"},
		{first[:len(first)-1] + "9", 0, "changeId"},
	} {
		got, err := query(two, tt.since, tt.start)
		if err != nil {
			fault.In(err, func(f types.BaseMethodFault, _ string, _ []types.LocalizableMessage) bool {
				if a, ok := f.(*types.InvalidArgument); ok {
					got = a.InvalidProperty
				}
				return false
			})
		}
		if got != tt.want {
			t.Errorf("since %s from %d: %s (%v), want %s", tt.since, tt.start, got, err, tt.want)
		}
	}
	if _, err := query(one, first, 0); !fault.Is(err, &types.ManagedObjectNotFound{}) {
		t.Errorf("a removed snapshot: %v", err)
	}
	reconfigure(false)
	equal(t, "change ID without tracking", id(s.AddSnapshot("web01", "three", "")), "")
}
