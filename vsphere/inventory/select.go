package inventory

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/vddkcp/vddkcp/internal/usage"
)

// SelectDisks returns the disks of a VM that are to be copied, in the order of the VM's list. If
// the list only is empty, these are all disks except the disks in the list skip. Otherwise they are
// the disks in the list only that are not in the list skip.
//
// Both lists name disks by number or by label. A text that is the number of a disk means this disk,
// even if another disk has the text as its label. Labels that differ only in the case of their
// letters are used if no label is equal.
//
// The error is a usage error if a text names no disk or several disks, if no disk is selected, or
// if a selected disk cannot be copied in the present power state of the VM.
func SelectDisks(vm *VM, only, skip []string) ([]Disk, error) {
	wanted, err := findDisks(vm, only)
	if err != nil {
		return nil, err
	}
	unwanted, err := findDisks(vm, skip)
	if err != nil {
		return nil, err
	}
	if vm.Verdict == Never {
		return nil, usage.New("the VM cannot be copied: "+vm.Reason, "")
	}
	if len(vm.Disks) == 0 {
		return nil, usage.Errorf("the VM has no disk")
	}
	var selected []Disk
	for i, d := range vm.Disks {
		if (len(only) == 0 || wanted[i]) && !unwanted[i] {
			selected = append(selected, d)
		}
	}
	if len(selected) == 0 {
		return nil, usage.New("no disk of the VM is selected", "the VM has "+ListDisks(vm.Disks))
	}
	return selected, checkSelected(vm, selected)
}

// checkSelected returns an error if some of the given disks cannot be copied in the present power
// state of the VM.
func checkSelected(vm *VM, disks []Disk) error {
	var reasons, flags []string
	allWhenOff := true
	for i := range disks {
		d := &disks[i]
		if !d.Verdict.CopyableIn(vm.Power) {
			reasons = append(reasons, d.Title()+": "+d.Reason)
			flags = append(flags, "--skip "+strconv.Itoa(d.N))
			allWhenOff = allWhenOff && d.Verdict == WhenOff
		}
	}
	if len(reasons) == 0 {
		return nil
	}
	var hints []string
	if allWhenOff {
		hints = append(hints, "power the VM off")
	}
	if len(reasons) < len(disks) {
		hints = append(hints, "copy the other disks with "+strings.Join(flags, " "))
	}
	return usage.WithHint(errors.New(strings.Join(reasons, "; ")), strings.Join(hints, ", or "))
}

// FindDisk returns the disk of a VM that text names by number or by label, as for SelectDisks. If text
// is empty, it returns the only disk of the VM. The error is a usage error. FindDisk does not check
// whether the disk can be copied.
func FindDisk(vm *VM, text string) (*Disk, error) {
	if text == "" {
		if len(vm.Disks) != 1 {
			return nil, usage.New(fmt.Sprintf("the VM has %d disks, and none of them is named", len(vm.Disks)), "name one of the disks by its number, as in vm:NAME#1: "+ListDisks(vm.Disks))
		}
		return &vm.Disks[0], nil
	}
	found, err := findDisks(vm, []string{text})
	if err != nil {
		return nil, err
	}
	for i := range found {
		return &vm.Disks[i], nil
	}
	return nil, nil // findDisks has found one disk
}

// findDisks returns the indexes of the disks that the given texts name.
func findDisks(vm *VM, texts []string) (map[int]bool, error) {
	found := make(map[int]bool)
	for _, text := range texts {
		indexes := matchDisks(vm.Disks, text)
		switch len(indexes) {
		case 1:
			found[indexes[0]] = true
		case 0:
			return nil, usage.New(fmt.Sprintf("the VM has no disk %q", text), "the VM has "+ListDisks(vm.Disks))
		default:
			return nil, usage.New(fmt.Sprintf("several disks have the label %q", text), "name the disk by its number: "+ListDisks(vm.Disks))
		}
	}
	return found, nil
}

// matchDisks returns the indexes of the disks that text names.
func matchDisks(disks []Disk, text string) []int {
	for _, match := range []func(d *Disk) bool{
		func(d *Disk) bool { return text == strconv.Itoa(d.N) },
		func(d *Disk) bool { return text == d.Label },
		func(d *Disk) bool { return strings.EqualFold(text, d.Label) },
	} {
		var indexes []int
		for i := range disks {
			if match(&disks[i]) {
				indexes = append(indexes, i)
			}
		}
		if indexes != nil {
			return indexes
		}
	}
	return nil
}

// ListDisks returns the numbers and labels of disks for a message.
func ListDisks(disks []Disk) string {
	if len(disks) == 0 {
		return "no disk"
	}
	var titles []string
	for i := range disks {
		titles = append(titles, disks[i].Title())
	}
	return strings.Join(titles, ", ")
}
