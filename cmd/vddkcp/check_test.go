package main

import (
	"bytes"
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/vsphere"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// checkLines returns the results as check prints them.
func checkLines(t *testing.T, results []checkResult) string {
	t.Helper()
	var out bytes.Buffer
	for _, r := range results {
		if err := printCheck(&out, r); err != nil {
			t.Fatal(err)
		}
	}
	return out.String()
}

func TestRunChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		result := func(r []checkResult) func(context.Context) []checkResult {
			return func(context.Context) []checkResult { return r }
		}
		steps := []checkStep{
			{name: "server", limit: time.Minute, run: result(checkOK("open"))},
			{name: "login", needs: []string{"server"}, limit: time.Minute, run: func(ctx context.Context) []checkResult {
				<-ctx.Done()
				return checkError(ctx, errors.New("interrupted\n"))
			}},
			{name: "vm", needs: []string{"server", "login"}, limit: time.Minute, run: func(context.Context) []checkResult { panic("called") }},
			{name: "disks", needs: []string{"vm"}, limit: time.Minute, run: func(context.Context) []checkResult { panic("called") }},
			{name: "library", limit: time.Minute, run: result(checkWarning("use another", "old\x1b"))},
			{name: "space", needs: []string{"library"}, limit: time.Minute, run: result([]checkResult{{Check: "one", Hint: "a hint"}, {Check: "two", OK: true}})},
			{name: "last", needs: []string{"space"}, limit: time.Minute, run: func(context.Context) []checkResult { panic("called") }},
		}
		var shown []checkResult
		began := time.Now()
		results, err := runChecks(t.Context(), steps, func(r checkResult) { shown = append(shown, r) })
		if err != nil || len(shown) != len(results) {
			t.Fatalf("%d of %d results were shown, %v", len(shown), len(results), err)
		}
		if took := time.Since(began); took != time.Minute {
			t.Errorf("the step that hangs ended after %v, want 1m", took)
		}
		want := `server           ok       open
login            FAILED   no answer within 1m
vm               -        not checked, because the check "login" has failed
disks            -        not checked, because the check "vm" has failed
library          WARNING  old\x1b
                          hint: use another
one              FAILED   ` + `
                          hint: a hint
two              ok       ` + `
last             -        not checked, because the check "space" has failed
`
		if got := checkLines(t, results); got != want {
			t.Errorf("got\n%s\nwant\n%s", got, want)
		}
		if err := checkStatus(results); err == nil || err.Error() != "5 of 8 checks did not succeed" {
			t.Errorf("%v", err)
		}
		if err := checkStatus(results[:1]); err != nil {
			t.Errorf("%v", err)
		}
	})
}

func TestRunChecksEnds(t *testing.T) {
	stopped := errors.New("stopped")
	ctx, cancel := context.WithCancelCause(t.Context())
	steps := []checkStep{
		{name: "first", limit: time.Hour, run: func(context.Context) []checkResult { return checkOK("") }},
		{name: "second", limit: time.Hour, run: func(ctx context.Context) []checkResult {
			cancel(stopped)
			return checkError(ctx, errors.New("anything"))
		}},
	}
	if results, err := runChecks(ctx, steps, func(checkResult) {}); err != stopped || len(results) != 1 {
		t.Errorf("%+v, %v; want one result and %v", results, err, stopped)
	}
}

func TestCheckError(t *testing.T) {
	if r := checkError(t.Context(), hinted.Error(errors.New("refused"), "try"))[0]; r.OK || r.Detail != "refused" || r.Hint != "try" {
		t.Errorf("%+v", r)
	}
}

func TestCheckVM(t *testing.T) {
	vm := func(change func(*inventory.VM)) *inventory.VM {
		v := &inventory.VM{
			Name: "web01", Path: "/DC0/vm/web01", Moref: "vm-1", Power: inventory.On, Host: "esx1", Version: "vmx-19",
			Disks: []inventory.Disk{{N: 1, Label: "Hard disk 1", Size: 1 << 30, Datastore: "ds1", Verdict: inventory.Running}},
		}
		v.Stores = []inventory.Store{{Name: "ds1", Type: "VMFS", Free: 20 << 30}}
		if change != nil {
			change(v)
		}
		return v
	}
	for _, c := range []struct {
		check  func(*inventory.VM) []checkResult
		change func(*inventory.VM)
		ok     bool
		want   string // in the details or the hints
	}{
		{checkVM, nil, true, "/DC0/vm/web01 is the VM vm-1 on the host esx1, powered on"},
		{checkVM, func(v *inventory.VM) { v.Template = true }, true, "the template vm-1"},
		{checkDisks, nil, true, "Hard disk 1, 1.0 GiB on the datastore ds1, can be copied"},
		{checkDisks, func(v *inventory.VM) { v.Disks = nil }, false, "no disk can be copied: no disks"},
		{checkDisks, func(v *inventory.VM) { v.Disks, v.Verdict, v.Reason = nil, inventory.Never, "lost" }, false, "no disk can be copied: lost"},
		{checkDisks, func(v *inventory.VM) { v.Disks[0].Verdict, v.Disks[0].Reason = inventory.WhenOff, "shared" }, false, "can be copied only while the VM is off: shared"},
		{checkDisks, func(v *inventory.VM) { v.Disks[0].Verdict, v.Disks[0].Reason = inventory.Never, "a LUN" }, false, "cannot be copied: a LUN"},
		{checkDisks, func(v *inventory.VM) { v.Disks[0].Verdict, v.Power = inventory.WhenOff, inventory.Off }, true, "can be copied"},
		{checkTracking, nil, true, "does not support change tracking (virtual hardware vmx-19)"},
		{checkTracking, func(v *inventory.VM) { v.Tracking.Supported = true }, true, "supported, and off"},
		{checkTracking, func(v *inventory.VM) { v.Tracking = inventory.Tracking{Supported: true, Enabled: true} }, true, "no change ID of disk 1 (Hard disk 1)"},
		{checkTracking, func(v *inventory.VM) {
			v.Tracking = inventory.Tracking{Supported: true, Enabled: true}
			v.Disks[0].ChangeID = "a/1"
		}, true, "change tracking is on"},
		{checkSnapshots, nil, true, "no snapshots"},
		{checkSnapshots, func(v *inventory.VM) { v.Snapshots = []inventory.Node{{Name: "x"}} }, true, "1 snapshot, which"},
		{checkSnapshots, func(v *inventory.VM) { v.Snapshots = []inventory.Node{{Name: "x", Mark: &inventory.Mark{Host: "h"}}} }, false, `already has the snapshot "x"`},
		{checkSnapshots, func(v *inventory.VM) { v.ConsolidationNeeded = true }, false, "need to be consolidated"},
		{checkQuestion, nil, true, "does not wait"},
		{checkQuestion, func(v *inventory.VM) { v.Question = "moved or copied?" }, false, "waits for an answer: moved or copied?"},
		{checkSpace, nil, true, "ds1 (VMFS) has 20.0 GiB of free space"},
		{checkSpace, func(v *inventory.VM) { v.Stores[0].Free = 1 << 30 }, false, "1.0 GiB of free space, and a snapshot should have 10.0 GiB"},
		{checkSpace, func(v *inventory.VM) { v.Stores[0].Free = -1 }, false, "is not accessible"},
		{checkSpace, func(v *inventory.VM) { v.Stores = nil }, false, "does not show the datastores"},
	} {
		results := c.check(vm(c.change))
		if (checkStatus(results) == nil) != c.ok || !strings.Contains(checkLines(t, results), c.want) {
			t.Errorf("%s; want %v and %q", checkLines(t, results), c.ok, c.want)
		}
	}
}

func TestCheckLacking(t *testing.T) {
	results := checkLacking([]inventory.Lacking{
		{Privilege: inventory.Privilege{ID: "VirtualMachine.State.CreateSnapshot", On: inventory.OnVM, For: inventory.UseSnapshot}, Object: "web\n01"},
		{Privilege: inventory.Privilege{ID: "Global.DisableMethods", On: inventory.OnRoot, For: inventory.UsePrepareAccess}},
	})
	for _, want := range []string{`lacks VirtualMachine.State.CreateSnapshot on the VM "web\n01", for making and removing snapshots`, "on the root folder, for forbidding", "check --role"} {
		if got := checkLines(t, results); !strings.Contains(got, want) {
			t.Errorf("%s; want %q", got, want)
		}
	}
	if checkStatus(results) == nil || checkStatus(checkLacking(nil)) != nil {
		t.Error("the wrong status")
	}
	encrypted := usesOf(&inventory.VM{Disks: []inventory.Disk{{}, {Encrypted: true}}})
	if n := len(usesOf(&inventory.VM{Disks: []inventory.Disk{{}}})); n != 2 || len(encrypted) != 3 {
		t.Errorf("%d uses, and %d for encrypted disks", n, len(encrypted))
	}
}

func TestCheckVersions(t *testing.T) {
	for _, c := range []struct {
		library int
		host    string
		warning bool
		want    string
	}{
		{8, "8.0.2", false, "VDDK 8 supports ESXi 8.0.2"},
		{8, "6.7.0", false, "supports"},
		{8, "6.5.0", true, "VDDK 8 does not support ESXi 6.5.0"},
		{7, "6.5.0", false, "supports"},
		{7, "8.0.2", true, "VDDK 7 is older than ESXi 8.0.2"},
		{6, "6.0.0", false, "supports"},
		{9, "7.0.3", false, "supports"},
		{9, "6.7.0", true, "use VDDK 8.0"},
		{8, "10.0.0", false, "unknown"},
		{8, "", false, "unknown"},
		{12, "8.0.0", false, "unknown"},
	} {
		results := checkVersions(c.library, c.host)
		if got := checkLines(t, results); (results[0].Hint != "") != c.warning || !results[0].OK || !strings.Contains(got, c.want) {
			t.Errorf("VDDK %d and ESXi %s: %s; want %q", c.library, c.host, got, c.want)
		}
	}
}

// closingDisk is a disk whose Close fails.
type closingDisk struct {
	source.Disk
	err error
}

func (d closingDisk) Close() error { return d.err }

// TestReadDisks checks that --read reads every disk that can be copied, closes all disks, and
// reports a snapshot that is left.
func TestReadDisks(t *testing.T) {
	vm := &inventory.VM{Power: inventory.On, Disks: []inventory.Disk{
		{N: 1, Verdict: inventory.Running}, {N: 2, Verdict: inventory.Never}, {N: 3, Verdict: inventory.Running}, {N: 4, Verdict: inventory.Running},
	}}
	left := &inventory.LeftError{VM: "web01", Snapshot: "a", Err: errors.New("locked")}
	var opened []int
	c := &serverChecks{vm: vm, open: func(_ context.Context, _ *vsphere.VM, d *inventory.Disk) (source.Disk, error) {
		opened = append(opened, d.N)
		switch d.N {
		case 3:
			return nil, hinted.Error(errors.New("refused"), "try")
		case 4:
			return closingDisk{sourcetest.Pattern(1 << 20), left}, nil
		}
		return sourcetest.Pattern(1 << 20), nil
	}}
	results := c.readDisks(t.Context())
	want := `                 ok       disk 1 can be read
                 FAILED   disk 3: refused
                          hint: try
                 ok       disk 4 can be read
                 FAILED   the snapshot "a" of the VM "web01" was not removed: locked
                          hint: remove the snapshot`
	if got := checkLines(t, results); !strings.HasPrefix(got, want) || !slices.Equal(opened, []int{1, 3, 4}) {
		t.Errorf("opened %v\n%s\nwant\n%s", opened, got, want)
	}
	vm.Disks = vm.Disks[1:2]
	if results := c.readDisks(t.Context()); checkStatus(results) == nil {
		t.Errorf("%+v for a VM whose disks cannot be copied", results)
	}
}

func TestLeastRole(t *testing.T) {
	r := leastRole()
	if want := "govc role.create vddkcp VirtualMachine.State.CreateSnapshot VirtualMachine.State.RemoveSnapshot VirtualMachine.Provisioning.DiskRandomRead VirtualMachine.Provisioning.GetVmFiles"; r.Govc != want {
		t.Errorf("%s, want %s", r.Govc, want)
	}
	var out bytes.Buffer
	if err := r.printText(&out); err != nil {
		t.Fatal(err)
	}
	text := strings.Join(strings.Fields(out.String()), " ")
	for _, want := range []string{"System.Read VM always finding and", "Cryptographer.Access VM sometimes reading encrypted", "Global.EnableMethods root folder sometimes", "needed: govc role.create vddkcp Virtual"} {
		if !strings.Contains(text, want) {
			t.Errorf("%s\nwant %q", out.String(), want)
		}
	}
}
