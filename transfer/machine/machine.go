// Package machine copies the disks of one virtual machine: all of them as they were at the same
// instant. It makes a snapshot of the VM, copies the disks of the snapshot with package job,
// removes the snapshot, and gives the files of all disks their names together.
//
// The package knows the server only through the interfaces [Machine] and [Opener]. Package vsphere
// implements the first one.
package machine

import (
	"context"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// Machine is a VM on a server. Its methods repeat calls that a lost connection or an ended session
// has interrupted, and wait for the tasks of the server. They are safe for concurrent use.
type Machine interface {
	// Describe asks the server for the present description of the VM.
	Describe(ctx context.Context) (*inventory.VM, error)
	// Snapshot makes a snapshot. If the VM already has a snapshot with the name that r asks for,
	// Snapshot makes none and returns that one, since the answer of an earlier call may have been
	// lost.
	Snapshot(ctx context.Context, r inventory.Request) (*inventory.Snapshot, error)
	// Find returns the snapshot with the given name, which vddkcp has made. If the VM has no
	// snapshot of that name, the error wraps inventory.ErrSnapshotGone.
	Find(ctx context.Context, name string) (*inventory.Snapshot, error)
	// Remove removes all snapshots with the given name, and consolidates the disks. It returns nil
	// if there is none. If a snapshot cannot be removed, or the disks cannot be consolidated, the
	// error is a *inventory.LeftError. The function progress, which may be nil, is called with the
	// percentage that the task of the server has done.
	Remove(ctx context.Context, name string, progress func(percent int)) error
	// WasConsolidated says that the disks did not need consolidation before the snapshot with the
	// given name was made. Remove then consolidates them even if it does not find the snapshot,
	// because an earlier run has removed it and ended before it could consolidate the disks.
	WasConsolidated(name string)
}

// Opener opens the disks of a VM for reading.
type Opener interface {
	// Open opens a disk of a snapshot. The parameter s is nil for a disk of a VM that is
	// powered off and is in no snapshot. The parameter o has the options of the copy.
	Open(ctx context.Context, s *inventory.Snapshot, d *inventory.Disk, o *open.Opener) (source.Disk, error)
	// Ready returns an error if this machine cannot open any disk, for example because a library is
	// missing. It is called before a snapshot is made.
	Ready() error
}
