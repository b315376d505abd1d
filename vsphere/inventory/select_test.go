package inventory

import (
	"fmt"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/transfer/report"
)

func TestSelectDisks(t *testing.T) {
	vm := func(power Power) *VM {
		vm := &VM{Name: "web01", Power: power, Disks: []Disk{
			{N: 1, Label: "Hard disk 1", Backing: Flat, Mode: "persistent"},
			{N: 2, Label: "Data", Backing: Flat, Mode: "independent_persistent"},
			{N: 3, Label: "1", Backing: RDMPhysical, LUN: "vml.02"},
			{N: 4, Label: "data", Backing: Flat, Mode: "persistent"},
			{N: 5, Label: "", Backing: Flat, Mode: "persistent"},
		}}
		vm.Judge()
		return vm
	}
	const all = "disk 1 (Hard disk 1), disk 2 (Data), disk 3 (1), disk 4 (data), disk 5"
	const physical = "disk 3 (1): a LUN of the array (vml.02): copy it there"
	for _, test := range []struct {
		name       string
		power      Power
		only, skip string
		want       string // numbers of the selected disks
		err, hint  string
	}{
		{name: "all but those that cannot", power: On, skip: "2,3", want: "1 4 5"},
		{name: "off", power: Off, skip: "3", want: "1 2 4 5"},
		{name: "number before label", power: On, only: "1", want: "1"},
		{name: "label", power: On, only: "data", want: "4"},
		{name: "label in another case", power: On, only: "HARD DISK 1", want: "1"},
		{name: "several, in the VM's order", power: On, only: "5,1", want: "1 5"},
		{name: "twice", power: On, only: "1,Hard disk 1", want: "1"},
		{name: "only and skip", power: On, only: "1,5", skip: "5", want: "1"},
		{name: "cannot be copied at all", power: Off, err: physical, hint: "copy the other disks with --skip 3"},
		{name: "cannot be copied now", power: On, skip: "3", err: "disk 2 (Data): " + reasonIndependent,
			hint: "power the VM off, or copy the other disks with --skip 2"},
		{name: "suspended", power: Suspended, only: "2", err: "disk 2 (Data): " + reasonIndependent, hint: "power the VM off"},
		{name: "two that cannot", power: On, err: "disk 2 (Data): " + reasonIndependent + "; " + physical,
			hint: "copy the other disks with --skip 2 --skip 3"},
		{name: "unknown", power: On, only: "6", err: `the VM has no disk "6"`, hint: "the VM has " + all},
		{name: "unknown in skip", power: On, skip: "x", err: `the VM has no disk "x"`, hint: "the VM has " + all},
		{name: "ambiguous", power: On, only: "DATA", err: `several disks have the label "DATA"`, hint: "name the disk by its number: " + all},
		{name: "blank", power: On, only: " ", err: `the VM has no disk " "`, hint: "the VM has " + all},
		{name: "none", power: On, only: "1", skip: "1", err: "no disk of the VM is selected", hint: "the VM has " + all},
	} {
		t.Run(test.name, func(t *testing.T) {
			list := func(s string) []string {
				if s == "" {
					return nil
				}
				return strings.Split(s, ",")
			}
			disks, err := SelectDisks(vm(test.power), list(test.only), list(test.skip))
			if test.err != "" {
				if err == nil || err.Error() != test.err || hinted.Of(err) != test.hint || report.Of(err).Exit != 2 {
					t.Errorf("error %v, hint %q, exit %d; want %s, %q, 2", err, hinted.Of(err), report.Of(err).Exit, test.err, test.hint)
				}
				return
			}
			var numbers []int
			for _, d := range disks {
				numbers = append(numbers, d.N)
			}
			if got := strings.Trim(fmt.Sprint(numbers), "[]"); err != nil || got != test.want {
				t.Errorf("disks %s, error %v; want %s", got, err, test.want)
			}
		})
	}
}

func TestSelectDisksOfUselessVMs(t *testing.T) {
	lost := &VM{Details: Details{Connection: "orphaned"}}
	lost.Judge()
	if _, err := SelectDisks(lost, nil, nil); err == nil || err.Error() != "the VM cannot be copied: the VM's host does not know the VM any more" {
		t.Errorf("orphaned VM: error %v", err)
	}
	empty := new(VM)
	empty.Judge()
	if _, err := SelectDisks(empty, nil, nil); err == nil || err.Error() != "the VM has no disk" {
		t.Errorf("VM without disks: error %v", err)
	}
	if _, err := SelectDisks(empty, []string{"1"}, nil); err == nil || hinted.Of(err) != "the VM has no disk" {
		t.Errorf("disk 1 of a VM without disks: error %v, hint %q", err, hinted.Of(err))
	}
}
