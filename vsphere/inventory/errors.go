package inventory

import (
	"errors"
	"fmt"
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
	Err      error  // why it could not be removed
}

func (e *LeftError) Error() string {
	return fmt.Sprintf("the snapshot %q of the VM %q was not removed: %v", e.Snapshot, e.VM, e.Err)
}

func (e *LeftError) Unwrap() error { return e.Err }

// Hint tells the user what to do about the error.
func (e *LeftError) Hint() string {
	return "remove the snapshot with: vddkcp cleanup --remove, or in the vSphere client"
}
