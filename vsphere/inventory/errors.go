package inventory

import (
	"errors"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/printable"
)

// ErrSnapshotGone means that a snapshot is not in the tree of its VM any more: somebody has removed
// it, or has reverted the VM. Nothing that is read from its disks after that can be trusted.
var ErrSnapshotGone = errors.New("the snapshot is gone: somebody has removed it from the VM")

// ErrVMGone means that the server has no VM with this managed object reference any more.
var ErrVMGone = errors.New("the VM is gone: somebody has removed it from the inventory")

// LeftError means that a snapshot that vddkcp has made is still on the server, or that the files of
// the removed snapshot are.
type LeftError struct {
	VM       string // name
	Snapshot string // name
	Files    bool   // the snapshot was removed, and only its files are left
	Err      error  // why it could not be removed
}

func (e *LeftError) Error() string {
	if e.Files {
		return fmt.Sprintf("the snapshot %q of the VM %q was removed, but files of it are left, because the disks could not be consolidated: %v", e.Snapshot, e.VM, e.Err)
	}
	return fmt.Sprintf("the snapshot %q of the VM %q was not removed: %v", e.Snapshot, e.VM, e.Err)
}

func (e *LeftError) Unwrap() error { return e.Err }

// Hint tells the user what to do about the error.
func (e *LeftError) Hint() string {
	if e.Files {
		return "consolidate the disks of the VM in the vSphere client"
	}
	return "remove the snapshot in the vSphere client, or with: vddkcp cleanup --remove --older-than 0s " + printable.Word(e.VM)
}

// BusyError means that a VM already has a snapshot that another run of vddkcp has made. That run is
// still copying the VM, or it has ended without removing its snapshot.
type BusyError struct {
	VM   string // name
	Name string // of the snapshot
	Mark *Mark
}

func (e *BusyError) Error() string {
	return fmt.Sprintf("the VM %q already has the snapshot %q, which vddkcp made on the machine %q at %s",
		e.VM, e.Name, e.Mark.Host, e.Mark.Started.UTC().Format(time.RFC3339))
}

// ExitStatus returns the exit status of a copy that ends because of the snapshot. The same command
// can succeed later.
func (e *BusyError) ExitStatus() int { return exit.Resumable }

// Transient returns false: a snapshot that an ended run has left disappears only if somebody removes
// it.
func (e *BusyError) Transient() bool { return false }

// Hint tells the user what to do about the snapshot.
func (e *BusyError) Hint() string {
	return "wait until that copy has ended; if it has ended already, remove the snapshot with: vddkcp cleanup --remove --older-than 0s " + printable.Word(e.VM)
}
