package inventory

import (
	"testing"
)

func TestJudge(t *testing.T) {
	disk := func(change func(d *Disk)) Disk {
		d := Disk{N: 1, Label: "Hard disk 1", Backing: Flat, Mode: "persistent"}
		change(&d)
		return d
	}
	const independent = "an independent disk is in no snapshot: power the VM off, or make it dependent"
	for _, test := range []struct {
		name    string
		vm      VM
		disk    Disk
		verdict Verdict
		reason  string
	}{
		{name: "flat", disk: disk(func(d *Disk) {}), verdict: Running},
		{name: "mode unknown", disk: disk(func(d *Disk) { d.Mode = "" }), verdict: Running},
		{name: "sparse", disk: disk(func(d *Disk) { d.Backing = Sparse }), verdict: Running},
		{name: "sesparse", disk: disk(func(d *Disk) { d.Backing = SeSparse }), verdict: Running},
		{name: "virtual RDM", disk: disk(func(d *Disk) { d.Backing, d.LUN = RDMVirtual, "vml.1" }), verdict: Running},
		{name: "independent", disk: disk(func(d *Disk) { d.Mode = "independent_persistent" }), verdict: WhenOff, reason: independent},
		{name: "independent nonpersistent", disk: disk(func(d *Disk) { d.Mode = "independent_nonpersistent" }), verdict: WhenOff,
			reason: independent + "; what it changed since power-on is not in it"},
		{name: "undoable", disk: disk(func(d *Disk) { d.Mode = "undoable" }), verdict: WhenOff,
			reason: "its mode is undoable; what it changed since power-on is not in it"},
		{name: "multi-writer", disk: disk(func(d *Disk) { d.Sharing = MultiWriter }), verdict: WhenOff, reason: "shared with other VMs: all must be off"},
		{name: "shared bus, independent", disk: disk(func(d *Disk) { d.Sharing, d.Mode = PhysicalBus, "independent_persistent" }),
			verdict: WhenOff, reason: "shared with other VMs: all must be off"},
		{name: "physical RDM", disk: disk(func(d *Disk) { d.Backing, d.LUN = RDMPhysical, "vml.02" }), verdict: Never,
			reason: "a LUN of the array (vml.02): copy it there"},
		{name: "physical RDM, shared", disk: disk(func(d *Disk) { d.Backing, d.Sharing = RDMPhysical, PhysicalBus }), verdict: Never,
			reason: "a LUN of the array: copy it there"},
		{name: "pmem", disk: disk(func(d *Disk) { d.Backing = PMem }), verdict: Never, reason: "no snapshot and no export for it"},
		{name: "unknown backing", disk: disk(func(d *Disk) { d.Backing = Unknown }), verdict: Never, reason: "the kind of its files is unknown to vddkcp"},
		{name: "encrypted", disk: disk(func(d *Disk) { d.Encrypted = true }), verdict: Running, reason: "over nbdssl only; https would give ciphertext"},
		{name: "template", vm: VM{Template: true}, disk: disk(func(d *Disk) {}), verdict: WhenOff, reason: "a template"},
		{name: "independent disk of a template", vm: VM{Template: true}, disk: disk(func(d *Disk) { d.Mode = "independent_persistent" }),
			verdict: WhenOff, reason: "a template"},
		{name: "pmem of a template", vm: VM{Template: true}, disk: disk(func(d *Disk) { d.Backing = PMem }), verdict: Never, reason: reasonPMem},
		{name: "disconnected", vm: VM{Details: Details{Connection: "disconnected"}}, disk: disk(func(d *Disk) {}), verdict: Never,
			reason: "the server has no connection to the VM's host"},
		{name: "inaccessible", vm: VM{Details: Details{Connection: "inaccessible"}}, disk: disk(func(d *Disk) {}), verdict: Never,
			reason: "the VM's files are inaccessible to its host"},
		{name: "orphaned", vm: VM{Details: Details{Connection: "orphaned"}}, disk: disk(func(d *Disk) {}), verdict: Never,
			reason: "the VM's host does not know the VM any more"},
		{name: "invalid", vm: VM{Details: Details{Connection: "invalid"}}, disk: disk(func(d *Disk) {}), verdict: Never, reason: "the state of the VM is invalid"},
		{name: "connected", vm: VM{Details: Details{Connection: "connected", FaultTolerance: "notConfigured"}}, disk: disk(func(d *Disk) {}), verdict: Running},
		{name: "no configuration", vm: VM{Details: Details{NoConfig: true}}, disk: disk(func(d *Disk) {}), verdict: Never,
			reason: "the server does not show the VM's configuration"},
		{name: "fault tolerance", vm: VM{Details: Details{FaultTolerance: "disabled"}}, disk: disk(func(d *Disk) {}), verdict: Never,
			reason: "fault tolerance is configured for the VM"},
	} {
		t.Run(test.name, func(t *testing.T) {
			vm := test.vm
			vm.Disks = []Disk{test.disk}
			vm.Judge()
			if d := vm.Disks[0]; d.Verdict != test.verdict || d.Reason != test.reason {
				t.Errorf("verdict %q, reason %q; want %q, %q", d.Verdict, d.Reason, test.verdict, test.reason)
			}
			if vm.Verdict != Running && vm.Reason == "" {
				t.Errorf("the verdict on the VM is %q without a reason", vm.Verdict)
			}
		})
	}
}

func TestNameSharers(t *testing.T) {
	shared := func(name, file, lun string) *VM {
		return &VM{Name: name, Disks: []Disk{
			{Backing: Flat, File: "[ds] " + name + ".vmdk"},
			{Backing: Flat, File: file, LUN: lun, Sharing: MultiWriter},
		}}
	}
	vms := []*VM{
		shared("b", "[ds] quorum.vmdk", ""), shared("a", "[ds] quorum.vmdk", ""), shared("c", "[ds] quorum.vmdk", ""),
		shared("lonely", "[ds] other.vmdk", ""),
		shared("lun1", "[ds] map1.vmdk", "vml.7"), shared("lun2", "[ds] map2.vmdk", "vml.7"),
	}
	for _, vm := range vms {
		vm.Judge()
	}
	NameSharers(vms)
	for i, want := range []string{
		"shared with a, c: all must be off", "shared with b, c: all must be off", "shared with a, b: all must be off",
		"shared with other VMs: all must be off", "shared with lun2: all must be off", "shared with lun1: all must be off",
	} {
		if vms[i].Disks[0].Reason != "" || vms[i].Disks[1].Reason != want {
			t.Errorf("%s: reasons %q and %q, want none and %q", vms[i].Name, vms[i].Disks[0].Reason, vms[i].Disks[1].Reason, want)
		}
	}
	if got, want := reasonShared([]string{"1", "2", "3", "4", "5", "6", "7"}), "shared with 1, 2, 3, 4, 5 and 2 more: all must be off"; got != want {
		t.Errorf("reason %q, want %q", got, want)
	}
}

func TestCopyableIn(t *testing.T) {
	for _, test := range []struct {
		verdict Verdict
		power   Power
		want    bool
	}{
		{Running, On, true}, {Running, Off, true}, {Running, Suspended, true},
		{WhenOff, On, false}, {WhenOff, Off, true}, {WhenOff, Suspended, false},
		{Never, On, false}, {Never, Off, false}, {"", Off, false},
	} {
		if got := test.verdict.CopyableIn(test.power); got != test.want {
			t.Errorf("%q in power state %q: %v, want %v", test.verdict, test.power, got, test.want)
		}
	}
}
