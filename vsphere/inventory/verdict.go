package inventory

import (
	"fmt"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/printable"
)

// These are reasons of verdicts.
const (
	reasonIndependent = "an independent disk is in no snapshot: power the VM off, or make it dependent"
	reasonDiscarded   = "what it changed since power-on is not in it"
	reasonPMem        = "no snapshot and no export for it"
	reasonEncrypted   = "over nbdssl only; https would give ciphertext"
)

// Judge sets the verdict and the reason of the VM and of all its disks. The other fields must be
// set. The VM's verdict also limits the verdicts of its disks: a disk of a VM that can never be
// copied can never be copied.
func (vm *VM) Judge() {
	vm.Verdict, vm.Reason = judgeVM(vm)
	for i := range vm.Disks {
		d := &vm.Disks[i]
		d.Verdict, d.Reason = judgeDisk(d)
		if vm.Verdict.strictness() > 0 && vm.Verdict.strictness() >= d.Verdict.strictness() {
			d.Verdict, d.Reason = vm.Verdict, vm.Reason
		}
	}
}

func judgeVM(vm *VM) (Verdict, string) {
	switch vm.Connection {
	case "", "connected":
	case "disconnected":
		return Never, "the server has no connection to the VM's host"
	case "inaccessible":
		return Never, "the VM's files are inaccessible to its host"
	case "orphaned":
		return Never, "the VM's host does not know the VM any more"
	default:
		return Never, "the state of the VM is " + printable.Name(vm.Connection)
	}
	switch {
	case vm.NoConfig:
		return Never, "the server does not show the VM's configuration"
	case vm.FaultTolerance != "" && vm.FaultTolerance != "notConfigured":
		return Never, "fault tolerance is configured for the VM"
	case vm.Template:
		return WhenOff, "a template"
	}
	return Running, ""
}

func judgeDisk(d *Disk) (Verdict, string) {
	switch d.Backing {
	case RDMPhysical:
		if d.LUN == "" {
			return Never, "a LUN of the array: copy it there"
		}
		return Never, fmt.Sprintf("a LUN of the array (%s): copy it there", printable.Name(d.LUN))
	case PMem:
		return Never, reasonPMem
	case Flat, Sparse, SeSparse, RDMVirtual:
	default:
		return Never, "the kind of its files is unknown to vddkcp"
	}
	if d.Sharing != NotShared {
		return WhenOff, reasonShared(nil)
	}
	switch d.Mode {
	case "", "persistent":
	case "independent_persistent":
		return WhenOff, reasonIndependent
	case "independent_nonpersistent":
		return WhenOff, reasonIndependent + "; " + reasonDiscarded
	default:
		return WhenOff, fmt.Sprintf("its mode is %s; %s", printable.Name(d.Mode), reasonDiscarded)
	}
	if d.Encrypted {
		return Running, reasonEncrypted
	}
	return Running, ""
}

// reasonShared returns the reason for the verdict on a disk that the given other VMs use too. If
// they are unknown, the list is empty.
func reasonShared(names []string) string {
	if len(names) == 0 {
		return "shared with other VMs: all must be off"
	}
	const most = 5
	list := strings.Join(names[:min(len(names), most)], ", ")
	if len(names) > most {
		list += fmt.Sprintf(" and %d more", len(names)-most)
	}
	return "shared with " + list + ": all must be off"
}

// NameSharers adds the names of the other VMs to the reasons of shared disks. The list must
// contain all VMs of the server: otherwise the reason would leave some of the other VMs out. Judge
// must have been called for each VM.
func NameSharers(vms []*VM) {
	users := make(map[string][]*VM) // users of a shared disk, by an ID of the disk
	for _, vm := range vms {
		for i := range vm.Disks {
			for _, id := range sharedIDs(&vm.Disks[i]) {
				users[id] = append(users[id], vm)
			}
		}
	}
	for _, vm := range vms {
		for i := range vm.Disks {
			d := &vm.Disks[i]
			if d.Sharing == NotShared || d.Reason != reasonShared(nil) {
				continue
			}
			var names []string
			for _, id := range sharedIDs(d) {
				for _, user := range users[id] {
					if user != vm {
						names = append(names, printable.Name(user.Name))
					}
				}
			}
			slices.Sort(names)
			d.Reason = reasonShared(slices.Compact(names))
		}
	}
}

// sharedIDs returns texts that are equal for the same disk in several VMs: its file and its LUN.
// The list is empty for a disk that is not shared.
func sharedIDs(d *Disk) []string {
	if d.Sharing == NotShared {
		return nil
	}
	var ids []string
	if d.File != "" {
		ids = append(ids, "file "+d.File)
	}
	if d.LUN != "" {
		ids = append(ids, "lun "+d.LUN)
	}
	return ids
}

// strictness orders the verdicts. A greater number allows fewer copies.
func (v Verdict) strictness() int {
	switch v {
	case Running:
		return 0
	case WhenOff:
		return 1
	}
	return 2
}

// CopyableIn reports whether a disk with this verdict can be copied while its VM is in the given
// power state. A suspended VM counts as running, because its memory holds data that the guest has
// not yet written to its disks.
func (v Verdict) CopyableIn(power Power) bool {
	return v == Running || v == WhenOff && power == Off
}
