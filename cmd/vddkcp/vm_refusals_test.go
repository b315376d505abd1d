package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// TestVMIsRefused checks for which reasons a copy of a VM does not begin, that it has then made no
// snapshot and no file, and that it can be made when the reason has gone.
func TestVMIsRefused(t *testing.T) {
	vmStates(t)
	other := inventory.Mark{ID: "0123456789abcdef", Round: 1, Host: "proxy2"}
	for _, c := range []struct {
		name   string
		vm     vspheretest.VM
		args   []string
		before func(v *vmTest)
		exit   int
		says   []string
		after  func(v *vmTest) // mends the VM; nil: it stays as it is
		mended []string        // arguments with which the copy can be made; nil: none can
	}{
		{name: "little space", exit: 75, says: []string{"the datastore ds1 has 1.0 GiB of free space, less than --min-free 10.0 GiB", "choose a smaller --min-free"},
			before: func(v *vmTest) { v.server.FillDatastore("ds1", 1<<30) }, mended: []string{"--min-free", "1GiB"}},
		{name: "no space", args: []string{"--min-free", "0"}, exit: 1, says: []string{`no space is left on the datastore "ds1"`},
			before: func(v *vmTest) { v.server.FillDatastore("ds1", 0) }, after: func(v *vmTest) { v.server.FillDatastore("ds1", 1<<40) }, mended: []string{}},
		{name: "quiescing fails", args: []string{"--quiesce"}, exit: 1, says: []string{"quiescing the guest failed", "--quiesce=try"},
			before: func(v *vmTest) { v.server.QuiesceFails("web01", &types.ApplicationQuiesceFault{}) }, mended: []string{"--quiesce=try"}},
		{name: "question", exit: 75, says: []string{"the VM waits for an answer to a question: ", "Retry or cancel?", "answer the question"},
			before: func(v *vmTest) { v.server.Question("web01", "Retry or cancel?") }, after: func(v *vmTest) { v.server.Question("web01", "") }, mended: []string{}},
		{name: "another run", exit: 75, says: []string{`already has the snapshot "vddkcp-0123456789abcdef", which vddkcp made on the machine "proxy2" at 0001-01-01T00:00:00Z`},
			before: func(v *vmTest) {
				v.server.AddSnapshot("web01", "vddkcp-0123456789abcdef", other.String())
			},
			after: func(v *vmTest) {
				if names := v.ours(); len(names) != 1 {
					v.Errorf("the snapshots are %q, want that of the other run", names)
				}
				v.server.RemoveSnapshotBehindBack("web01", "vddkcp-0123456789abcdef")
			}, mended: []string{}},
		{name: "consolidation", exit: 2, says: []string{"the disks of the VM need consolidation", "--force-consolidate"},
			before: func(v *vmTest) { v.server.NeedConsolidation("web01") }, mended: []string{"--force-consolidate"}},
		{name: "no privilege to make a snapshot", exit: 1, says: []string{"VirtualMachine.State.CreateSnapshot", "vddkcp check --role"},
			before: func(v *vmTest) { v.server.RevokePrivilege("VirtualMachine.State.CreateSnapshot") },
			after:  func(v *vmTest) { v.server.GrantPrivilege("VirtualMachine.State.CreateSnapshot") }, mended: []string{}},
		{name: "no privilege to remove a snapshot", exit: 1, says: []string{"VirtualMachine.State.RemoveSnapshot", "vddkcp check --role"},
			before: func(v *vmTest) { v.server.RevokePrivilege("VirtualMachine.State.RemoveSnapshot") },
			after:  func(v *vmTest) { v.server.GrantPrivilege("VirtualMachine.State.RemoveSnapshot") }, mended: []string{}},
		{name: "snapshots are disabled", exit: 1, says: []string{"snapshots are disabled for the VM"},
			before: func(v *vmTest) {
				v.server.On("CreateSnapshot_Task", vspheretest.Fault{Task: &types.SnapshotDisabled{}})
			}, after: func(v *vmTest) { v.server.ClearFaults() }, mended: []string{}},
		{name: "another backup program", exit: 1, says: []string{"this operation is disabled for the VM", "another backup program"},
			before: func(v *vmTest) {
				v.server.On("CreateSnapshot_Task", vspheretest.Fault{Soap: &types.MethodDisabled{}})
			}, after: func(v *vmTest) { v.server.ClearFaults() }, mended: []string{}},
		{name: "free license", exit: 1, says: []string{"the license of the host allows programs only to read"},
			before: func(v *vmTest) {
				v.server.On("CreateSnapshot_Task", vspheretest.Fault{Soap: &types.RestrictedVersion{}})
			}, after: func(v *vmTest) { v.server.ClearFaults() }, mended: []string{}},

		{name: "physical RDM", vm: vspheretest.VM{Disks: []vspheretest.Disk{{}, {Backing: "rdm-physical", LUN: "naa.1"}}}, exit: 2,
			says: []string{"disk 2 (Hard disk 2)", "a LUN of the array", "--skip 2"}, mended: []string{"--skip", "2"}},
		{name: "persistent memory", vm: vspheretest.VM{Disks: []vspheretest.Disk{{}, {Backing: "pmem"}}}, exit: 2,
			says: []string{"no snapshot and no export for it"}, mended: []string{"--skip", "2"}},
		{name: "independent disk", vm: vspheretest.VM{Disks: []vspheretest.Disk{{}, {Mode: "independent_persistent"}}}, exit: 2,
			says: []string{"an independent disk is in no snapshot"}, after: func(v *vmTest) { v.server.PowerOff("web01") }, mended: []string{}},
		{name: "shared disk", vm: vspheretest.VM{Disks: []vspheretest.Disk{{}, {Sharing: "sharingMultiWriter"}}}, exit: 2,
			says: []string{"shared with other VMs: all must be off"}, after: func(v *vmTest) { v.server.PowerOff("web01") }, mended: []string{}},
		{name: "shared bus", vm: vspheretest.VM{Disks: []vspheretest.Disk{{}, {Bus: "physicalSharing"}}}, exit: 2,
			says: []string{"shared with other VMs: all must be off"}, after: func(v *vmTest) { v.server.PowerOff("web01") }, mended: []string{}},
		{name: "no configuration", vm: vspheretest.VM{NoConfig: true}, exit: 2, says: []string{"the VM's files are inaccessible to its host"}},
		{name: "disconnected host", vm: vspheretest.VM{Connection: "disconnected"}, exit: 2, says: []string{"the server has no connection to the VM's host"}},
		{name: "fault tolerance", vm: vspheretest.VM{FaultTolerant: true}, exit: 2, says: []string{"fault tolerance is configured for the VM"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.vm.Name = "web01"
			if c.vm.Disks == nil && !c.vm.NoConfig {
				c.vm.Disks = []vspheretest.Disk{{}, {}}
			}
			c.vm.Snapshots = []string{"of the user"}
			v := newVMs(t, c.vm)
			v.others = c.vm.Snapshots
			if c.before != nil {
				c.before(v)
			}
			before := v.server.SnapshotNames("web01")
			r := v.exits(c.exit, v.start(nil, nil, c.args...))
			v.says(r, c.says...)
			if after := v.server.SnapshotNames("web01"); !slices.Equal(before, after) {
				t.Errorf("the snapshots are %q, and were %q", after, before)
			}
			if sessions := v.server.Sessions(); len(sessions) > 0 {
				t.Errorf("sessions are left: %v", sessions)
			}
			if files, _ := filepath.Glob(filepath.Join(v.images(), "*.raw*")); len(files) > 0 {
				t.Errorf("files are left: %q", files)
			}
			if c.after != nil {
				c.after(v)
			}
			if c.mended == nil {
				return
			}
			want := v.now()
			if slices.Contains(c.mended, "--skip") {
				want = want[:1]
			}
			v.copies(append(c.mended, "--resume", "--report", "report.json")...)
			v.published(want)
			if c.name == "quiescing fails" && v.report().Quiesced {
				t.Error("the report says that the snapshot is quiesced")
			}
		})
	}
}

// TestVMQuiesced checks that the report says that the guest was quiesced.
func TestVMQuiesced(t *testing.T) {
	vmStates(t)
	v := newVM(t)
	v.copies("--quiesce", "--report", "report.json")
	if !v.report().Quiesced {
		t.Error("the report says that the guest was not quiesced")
	}
}

// TestVMUncommon copies VMs that are not like most others, and that can be copied all the same.
func TestVMUncommon(t *testing.T) {
	vmStates(t)
	for name, vm := range map[string]vspheretest.VM{
		"template":          {Template: true},
		"suspended":         {Power: "suspended"},
		"off":               {Power: "off"},
		"encrypted":         {Disks: []vspheretest.Disk{{KeyID: "key-1"}}},
		"virtual RDM":       {Disks: []vspheretest.Disk{{}, {Backing: "rdm-virtual", LUN: "naa.1"}}},
		"kinds of disks":    {Disks: []vspheretest.Disk{{Backing: "sparse"}, {Backing: "sesparse"}, {Zero: true}, {Controller: "nvme"}, {Controller: "sata"}, {Controller: "ide"}}},
		"no UUID":           {Disks: []vspheretest.Disk{{UUID: vspheretest.NoUUID}, {UUID: vspheretest.NoUUID}}},
		"equal UUIDs":       {Disks: []vspheretest.Disk{{UUID: "6000-1"}, {UUID: "6000-1"}}},
		"equal labels":      {Disks: []vspheretest.Disk{{Label: "disk"}, {Label: "disk"}}},
		"other datastores":  {Disks: []vspheretest.Disk{{Datastore: "ds2"}, {Datastore: "ds3"}}},
		"many snapshots":    {Snapshots: []string{"a", "b", "c", "d", "e", "f", "g", "h"}},
		"without VM Tools":  {ToolsStopped: true},
		"old hardware":      {Version: "vmx-04", NoTracking: true},
		"independent disks": {Power: "off", Disks: []vspheretest.Disk{{Mode: "independent_persistent"}, {Mode: "independent_nonpersistent"}}},
	} {
		t.Run(name, func(t *testing.T) {
			vm.Name = "web01"
			if vm.Disks == nil {
				vm.Disks = []vspheretest.Disk{{}, {}}
			}
			v := newVMs(t, vm)
			v.others = vm.Snapshots
			v.copies()
			v.published(v.now())
		})
	}
}

// TestVMChangesWithoutSnapshot checks that a disk that is read without a snapshot counts as complete
// only if the VM was off and unchanged.
func TestVMChangesWithoutSnapshot(t *testing.T) {
	vmStates(t)
	for name, c := range map[string]struct {
		change func(v *vmTest)
		says   string
	}{
		"powered on":            {func(v *vmTest) { v.server.PowerOn("web01") }, "the VM was powered on"},
		"powered on and off":    {func(v *vmTest) { v.server.PowerOn("web01"); v.server.PowerOff("web01") }, "the VM was changed"},
		"snapshot by a user":    {func(v *vmTest) { v.server.AddSnapshot("web01", "s", ""); v.others = []string{"s"} }, "the VM was changed"},
		"moved":                 {func(v *vmTest) { v.server.MoveDatastore("web01", "ds2") }, "the VM was changed"},
		"killed, and unchanged": {nil, "the earlier copy cannot be continued"},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVMs(t, vspheretest.Datastore{Name: "ds2"},
				vspheretest.VM{Name: "web01", Power: "off", Disks: []vspheretest.Disk{{Mode: "independent_persistent"}, {Mode: "independent_persistent"}}})
			p, release := v.midway()
			if c.change == nil {
				p.kill()
			} else {
				c.change(v)
				release()
				os.Remove(filepath.Join(p.stops, "machine-whole:2"))
				v.says(v.exits(1, p), c.says, "run again with --resume, which copies the disks from the beginning")
			}
			v.left(0)
			if n := v.named(); n > 0 {
				t.Errorf("%d files have their names", n)
			}
			v.server.PowerOff("web01")
			r := v.copies("--resume")
			if c.change == nil {
				v.says(r, c.says)
			}
			v.published(v.now())
		})
	}
}

// TestVMTwice runs two copies of a VM at the same time.
func TestVMTwice(t *testing.T) {
	vmStates(t)
	for name, c := range map[string]struct {
		args []string
		says string
	}{
		"the same folder": {nil, "another run copies this VM to the same targets"},
		"another folder":  {[]string{"other/"}, "which vddkcp made on the machine"},
	} {
		t.Run(name, func(t *testing.T) {
			v := newVM(t)
			then := v.now()
			p, release := v.midway()
			args := append([]string{"vm", "web01"}, c.args...)
			if c.args == nil {
				args = append(args, v.images())
			}
			for _, more := range [][]string{nil, {"--resume"}, {"--force"}} {
				r := v.exits(75, v.startCommand(nil, nil, slices.Concat(args, more)...))
				v.says(r, c.says)
			}
			if names := v.ours(); len(names) != 1 {
				t.Errorf("the snapshots are %q, want one", names)
			}
			release()
			p.at("machine-whole:2")()
			v.exits(0, p)
			v.published(then)
			v.exits(0, v.startCommand(nil, nil, append([]string{"vm", "web01"}, "other/")...))
		})
	}
}

// TestVMIsNotRemoved copies a VM whose snapshot cannot be removed.
func TestVMIsNotRemoved(t *testing.T) {
	vmStates(t)
	for _, how := range []string{"resume", "cleanup", "start over"} {
		t.Run(how, func(t *testing.T) {
			v := newVM(t)
			then := v.now()
			v.server.On("RemoveSnapshot_Task", vspheretest.Fault{Soap: &types.NoPermission{PrivilegeId: "VirtualMachine.State.RemoveSnapshot"}})
			r := v.exits(5, v.start(nil, nil, "--report", "report.json"))
			names := v.ours()
			if len(names) != 1 {
				t.Fatalf("the snapshots are %q", names)
			}
			v.says(r, "the copy is complete, but the snapshot", names[0], "VirtualMachine.State.RemoveSnapshot")
			if rep := v.report(); rep.Exit != 5 || rep.Status != "ok" || !slices.Equal(rep.Left, names) || len(rep.Files) != 2 {
				t.Errorf("%+v", rep)
			}
			if step, name := v.state(); step != "done" || name != names[0] || v.named() != 2 {
				t.Errorf("the state is %q with %q, %d files", step, name, v.named())
			}
			v.exits(5, v.start(nil, nil, "--resume")) // it still can't be removed
			v.server.ClearFaults()
			switch how {
			case "resume":
				v.copies("--resume")
				v.published(then)
			case "cleanup":
				v.server.On("RemoveSnapshot_Task", vspheretest.Fault{Soap: &types.SystemError{}})
				_, hint, ok := strings.Cut(v.exits(5, v.start(nil, nil, "--resume")).stderr, "or with: vddkcp ")
				v.server.ClearFaults()
				if !ok {
					t.Fatal("there is no hint to cleanup")
				}
				v.exits(0, v.startCommand(nil, nil, strings.Fields(hint)...))
				v.left(0)
				v.copies("--resume")
				v.published(then)
			case "start over":
				now := v.write()
				v.copies("--force")
				v.published(now)
			}
		})
	}
}

// TestVMFailsAndIsNotRemoved checks that a copy that fails names the snapshot that it cannot remove.
func TestVMFailsAndIsNotRemoved(t *testing.T) {
	vmStates(t)
	v := newVM(t)
	then := v.now()
	v.server.On("RemoveSnapshot_Task", vspheretest.Fault{Soap: &types.SystemError{}})
	v.server.Library.Conf("fault ReadAsync from=1 global do=fail code=13")
	r := v.exits(75, v.start(nil, nil, "--retries", "0", "--report", "report.json"))
	names := v.ours()
	if len(names) != 1 || !slices.Equal(v.report().Left, names) || !strings.Contains(r.stderr, names[0]) {
		t.Fatalf("the snapshots are %q, the report has %q\n%s", names, v.report().Left, r.stderr)
	}
	v.server.ClearFaults()
	v.server.Library.Reset()
	v.write()
	v.copies("--resume") // the snapshot is still there, and the copy goes on from it
	v.published(then)
}

// TestVMDiskFails checks what happens to the other disks if one disk cannot be read.
func TestVMDiskFails(t *testing.T) {
	vmStates(t)
	for _, keep := range []bool{false, true} {
		t.Run(map[bool]string{false: "removed", true: "kept"}[keep], func(t *testing.T) {
			v := newVM(t)
			then := v.now()
			args := []string{"--report", "report.json", "--parallel", "1"}
			if keep {
				args = append(args, "--keep-snapshot")
			}
			p := v.start([]string{"machine-copy"}, nil, args...)
			release := p.at("machine-copy")
			hidden := v.server.Library.Disk("[ds1] web01/web01.vmdk")
			if err := os.Rename(hidden, hidden+".hidden"); err != nil {
				t.Fatal(err)
			}
			release()
			r := p.wait()
			v.says(r, "disk 1 (Hard disk 1)")
			if err := os.Rename(hidden+".hidden", hidden); err != nil {
				t.Fatal(err)
			}
			if n := v.named(); n > 0 {
				t.Errorf("%d files have their names", n)
			}
			disks := v.report().Rounds[0].Disks
			if text, err := json.Marshal(disks); err != nil || len(disks) != 2 || disks[0].Error == "" {
				t.Errorf("%v: the disks are %s", err, text)
			}
			now := v.write()
			if keep {
				if r.exit != 75 || disks[1].Status != "ok" {
					t.Errorf("exit status %d, want 75; the other disk is %s, want ok\n%s", r.exit, disks[1].Status, r.stderr)
				}
				v.left(1)
				v.copies("--resume")
				v.published(then)
			} else {
				if r.exit != 1 {
					t.Errorf("exit status %d, want 1\n%s", r.exit, r.stderr)
				}
				v.left(0)
				v.copies("--resume")
				v.published(now)
			}
		})
	}
}

// TestVMTargetIsFull copies a VM to a file system that gets full.
func TestVMTargetIsFull(t *testing.T) {
	vmStates(t)
	v := newVM(t)
	mounted := mount(t, "-t", "tmpfs", "-o", "size=900k", "none")
	if err := os.Symlink(mounted, filepath.Join(v.dir, "images")); err != nil {
		t.Fatal(err)
	}
	r := v.exits(75, v.start(nil, nil, "--parallel", "1"))
	v.says(r, "no space left on device")
	v.left(0)
	if out, err := exec.Command("mount", "-o", "remount,size=64m", mounted).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	now := v.write()
	v.copies("--resume")
	v.published(now)
}
