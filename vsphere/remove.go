package vsphere

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// maxRemovals is how often a removal or a consolidation is tried that fails for a reason that is not
// known to pass.
const maxRemovals = 5

// errNoEffect means that a task has ended without an error and without its effect.
var errNoEffect = errors.New("the task on the server has had no effect")

// Remove removes all snapshots with the given name, which vddkcp has made, and consolidates the disks
// if the removal has left files. It returns nil if there is no such snapshot, and if there is no such
// VM any more. If something of the snapshot is left, the error is an *inventory.LeftError.
//
// If the server is just making a snapshot of the VM, or if it is unknown whether it will make one
// because Snapshot has got no answer, Remove waits for this snapshot and removes it. The function
// progress, which may be nil, is called with the percentage that a task has done.
//
// Disks that needed consolidation before the snapshot was made are not consolidated.
func (v *VM) Remove(ctx context.Context, name string, progress func(percent int)) error {
	if !inventory.OurName(name) {
		return fmt.Errorf("vddkcp does not remove the snapshot %q, because it is not its own", name)
	}
	r := &removal{VM: v, name: name, progress: progress}
	r.chosen = func(n *snapshotNode) bool { return n.Name == name }
	return r.run(ctx)
}

// RemoveMoref removes the snapshot with the given managed object reference, as Remove does. It
// removes only a snapshot that vddkcp has made.
func (v *VM) RemoveMoref(ctx context.Context, moref string, progress func(percent int)) error {
	r := &removal{VM: v, progress: progress}
	r.chosen = func(n *snapshotNode) bool {
		if n.Moref != moref || n.Mark == nil {
			return false
		}
		r.name = n.Name
		return true
	}
	return r.run(ctx)
}

// WasConsolidated says that the disks did not need consolidation before the snapshot with the given
// name was made. Remove then consolidates them even if it does not find the snapshot.
func (v *VM) WasConsolidated(name string) { v.recordConsolidation(name, false) }

// removal is one call of Remove.
type removal struct {
	*VM
	name     string // "": not known yet
	chosen   func(n *snapshotNode) bool
	progress func(percent int)
	failures int // whose reasons are not known to pass
}

// run removes the snapshots and consolidates the disks.
func (r *removal) run(ctx context.Context) error {
	ctx, cancel := r.session.withTaskTimeout(ctx)
	defer cancel()
	err := r.removeAll(ctx)
	files := false
	if err == nil {
		err = r.consolidate(ctx)
		files = true
	}
	if err == nil || errors.Is(err, inventory.ErrVMGone) {
		return nil
	}
	return &inventory.LeftError{VM: r.VM.name, Snapshot: r.name, Files: files, Err: err}
}

// removeAll removes the snapshots.
func (r *removal) removeAll(ctx context.Context) error {
	for p := (poller{s: r.session}); ; {
		st, err := r.present(ctx)
		if err == nil && st == nil {
			return nil
		}
		if err == nil {
			err = r.removeOne(ctx, st)
		}
		if err != nil {
			if err := r.failed(ctx, err, &p); err != nil {
				return err
			}
		}
	}
}

// present returns the state of the VM, or nil if the VM has none of the snapshots and will not have
// one.
func (r *removal) present(ctx context.Context) (*snapshotState, error) {
	for {
		st, err := r.snapshotState(ctx)
		if err != nil {
			return nil, err
		}
		if slices.ContainsFunc(st.nodes, func(n snapshotNode) bool { return r.chosen(&n) }) {
			return st, nil
		}
		if task := st.creating(); task != nil {
			if err := r.awaitOthers(ctx, []types.TaskInfo{*task}); err != nil {
				return nil, err
			}
			continue
		}
		if !r.isUncertain(r.name) {
			return nil, nil
		}
		if _, err := r.search(ctx, r.name); err != nil {
			return nil, err
		}
	}
}

// removeOne removes one of the snapshots.
func (r *removal) removeOne(ctx context.Context, st *snapshotState) error {
	for _, n := range slices.Backward(st.nodes) { // children before parents
		if !r.chosen(&n) {
			continue
		}
		if n.Mark != nil {
			r.recordConsolidation(n.Name, n.Mark.Unconsolidated)
		}
		r.session.Log.Debug("vsphere: removing a snapshot", "vm", r.VM.name, "snapshot", n.Name, "moref", n.Moref)
		consolidate := true
		answer, err := methods.RemoveSnapshot_Task(ctx, r.session.client, &types.RemoveSnapshot_Task{
			This:           snapshotReference(n.Moref),
			RemoveChildren: false,
			Consolidate:    &consolidate,
		})
		if err == nil {
			_, err = r.session.await(ctx, answer.Returnval, "remove the snapshot", r.progress)
		}
		if fault.Is(err, &types.ManagedObjectNotFound{}) || errors.Is(err, errTaskGone) {
			err = nil // the next look at the tree decides
		}
		if err != nil {
			return err
		}
		return r.gone(ctx, n.Moref)
	}
	return nil
}

// gone returns an error if the VM still has a snapshot that was removed.
func (r *removal) gone(ctx context.Context, moref string) error {
	st, err := r.snapshotState(ctx)
	if err == nil && slices.ContainsFunc(st.nodes, func(n snapshotNode) bool { return n.Moref == moref }) {
		err = fmt.Errorf("%w: the VM still has the snapshot", errNoEffect)
	}
	return err
}

// consolidate merges files that the removal has left into the disks of the VM.
func (r *removal) consolidate(ctx context.Context) error {
	if needed, known := r.neededConsolidation(r.name); needed || !known {
		return nil
	}
	r.failures = 0
	for p := (poller{s: r.session}); ; {
		st, err := r.snapshotState(ctx)
		if err == nil && !st.needsConsolidation {
			return nil
		}
		if err == nil {
			err = r.consolidateOnce(ctx)
		}
		if err != nil {
			if err := r.failed(ctx, err, &p); err != nil {
				return err
			}
		}
	}
}

func (r *removal) consolidateOnce(ctx context.Context) error {
	r.session.Log.Debug("vsphere: consolidating the disks", "vm", r.VM.name)
	answer, err := methods.ConsolidateVMDisks_Task(ctx, r.session.client, &types.ConsolidateVMDisks_Task{This: r.reference()})
	if err == nil {
		_, err = r.session.await(ctx, answer.Returnval, "consolidate the disks", r.progress)
	}
	if err != nil && !errors.Is(err, errTaskGone) {
		return err
	}
	st, err := r.snapshotState(ctx)
	if err == nil && st.needsConsolidation {
		err = fmt.Errorf("%w: the disks still need to be consolidated", errNoEffect)
	}
	return err
}

// failed waits until the removal or the consolidation can be tried again after it has failed with
// err. It returns an error if it must not be tried again.
func (r *removal) failed(ctx context.Context, err error, p *poller) error {
	if ctx.Err() != nil || errors.Is(err, inventory.ErrVMGone) || retry.IsPermanent(err) {
		return err
	}
	locked := fault.Is(err, &types.FileLocked{})
	switch {
	case isTaskInProgress(err):
		st, err := r.snapshotState(ctx)
		if err == nil {
			err = r.awaitOthers(ctx, st.tasks)
		}
		if err != nil {
			return r.failed(ctx, err, p)
		}
	case isTemporary(err) && !locked:
	case errors.As(err, new(*LoginError)):
		return err
	case faultOf(err) != nil || errors.Is(err, errNoEffect):
		if r.failures++; r.failures >= maxRemovals {
			return err
		}
	default:
		return err
	}
	r.session.Log.Warn("the snapshot could not be removed; trying again", "vm", r.VM.name, "error", err)
	if locked {
		return r.interrupted(sleep(ctx, lockedTime*r.session.Poll), err)
	}
	return r.interrupted(p.pause(ctx), err)
}

// interrupted adds to err, the reason of a failure, that the waiting before the next attempt was
// interrupted.
func (r *removal) interrupted(interruption, err error) error {
	if interruption == nil {
		return nil
	}
	return fmt.Errorf("%w (the last attempt failed: %w)", interruption, err)
}
