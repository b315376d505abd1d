package machine

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// The method giveUp ends the copy of the disks that failed with err. It removes the snapshot, except if
// a later run shall continue with it.
func (r *run) giveUp(ctx context.Context, err error) error {
	canGoOn := r.snapshot != nil && !errors.Is(err, inventory.ErrSnapshotGone) && !errors.Is(err, inventory.ErrVMGone)
	// A wrong option of a run that continues must not spoil what the earlier run has copied.
	refused := r.continues && report.Of(err).Exit == exit.Usage
	keep := (r.KeepSnapshot || refused) && canGoOn && !isFull(err)
	advice := "run again with --resume, which makes another snapshot and copies the disks from the beginning; with --keep-snapshot, the snapshot of a copy that stops is kept, and the next run continues"
	switch {
	case report.Of(err).Exit == exit.Difference:
		advice = "" // the hint of err says what to do
	case errors.Is(err, inventory.ErrVMGone):
		advice = "the files of the copy are incomplete, and no run can complete them"
	case errors.Is(err, inventory.ErrSnapshotGone):
		advice = "run again with --resume, which makes another snapshot and copies the disks from the beginning"
	case r.snapshot == nil:
		advice = "run again with --resume, which copies the disks from the beginning, because they were copied without a snapshot"
	}
	stays := r.release(ctx, keep)
	if keep && stays {
		r.report.Left = append(r.report.Left, r.state.Snapshot)
	}
	if stays && canGoOn {
		return r.stopped(err)
	}
	r.state.restart()
	return joinError(&stoppedError{err, false, advice}, r.store.save(r.state))
}

// The method stopped returns the error of a run that can be continued, because its snapshot is still
// there.
func (r *run) stopped(err error) error {
	stays := "the snapshot " + r.state.Snapshot + " is still there"
	if report.Of(err).Exit == exit.Difference {
		return &stoppedError{err, true, stays}
	}
	return &stoppedError{err, true, "run again with --resume to continue: " + stays}
}

// joinError returns err, or both errors if other is not nil.
func joinError(err, other error) error {
	if other == nil {
		return err
	}
	return errors.Join(err, other)
}

// stoppedError is the error of a copy after which the snapshot was kept or removed. It hides the
// meaning of the error of a disk, such as that its copy can be continued: whether this is true depends
// on the snapshot.
type stoppedError struct {
	err       error
	resumable bool // a later run continues
	advice    string
}

func (e *stoppedError) Error() string { return e.err.Error() }

// Is reports whether the error of the copy is target.
func (e *stoppedError) Is(target error) bool { return errors.Is(e.err, target) }

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (e *stoppedError) ExitStatus() int {
	o := report.Of(e.err)
	switch {
	case o.Exit > exit.Signal || o.Exit == exit.Difference:
		return o.Exit
	case errors.Is(e.err, inventory.ErrSnapshotGone) || errors.Is(e.err, inventory.ErrVMGone):
		return exit.Failed
	case o.Exit == exit.Usage:
		return exit.Usage
	case e.resumable || o.Transient || o.Exit == exit.Resumable:
		return exit.Resumable
	}
	return exit.Failed
}

// Transient tells package transfer/report whether another run may succeed.
func (e *stoppedError) Transient() bool { return report.Of(e.err).Transient }

// Resumable tells package transfer/report whether a later run continues.
func (e *stoppedError) Resumable() bool { return e.resumable }

// Hint tells the user what to do about the error.
func (e *stoppedError) Hint() string {
	hint := hinted.Of(e.err)
	if disk := (*transfer.ResumableError)(nil); errors.As(e.err, &disk) {
		hint = hinted.Of(disk.Err)
	}
	switch {
	case hint == "":
		return e.advice
	case e.advice == "":
		return hint
	case report.Of(e.err).Exit == exit.Difference:
		return hint + "; " + e.advice
	}
	return hint + "; then " + e.advice
}

// The method release gives up the snapshot. If no other run of this process uses it, the snapshot is
// removed, unless keep is true. The result reports whether the snapshot is still there.
func (r *run) release(ctx context.Context, keep bool) (stays bool) {
	if r.quiet {
		r.Snapshots.releaseQuiet(r.key())
		r.quiet = false
	}
	if r.snapshot == nil {
		return false
	}
	stays = true
	r.Snapshots.release(r.key(), keep, func() { stays = !r.removeByName(ctx, r.snapshot.Name) })
	r.snapshot = nil
	return stays
}

// The method removeByName removes the snapshot with the given name, even if ctx has ended. If that is
// not possible, it sets r.left and returns false.
func (r *run) removeByName(ctx context.Context, name string) (removed bool) {
	if name == "" {
		return true
	}
	r.Phase(PhaseRemove, -1)
	r.Log.Info("removing the snapshot", "vm", r.vm.Name, "snapshot", name)
	err := r.remove(context.WithoutCancel(ctx), name)
	switch left := (*inventory.LeftError)(nil); {
	case err == nil:
	case errors.As(err, &left):
		r.left = left
	default:
		r.left = &inventory.LeftError{VM: r.vm.Name, Snapshot: name, Err: err}
	}
	return r.left == nil
}

// The method remove removes the snapshot with the given name, which this run or an earlier one has
// made.
func (r *run) remove(ctx context.Context, name string) error {
	r.Left(r.vm.Name, name, true) // an earlier process may have made it
	if name == r.state.Snapshot && r.state.Consolidated || name == r.old && r.owes {
		r.Machine.WasConsolidated(name)
	}
	ended := make(chan struct{})
	var telling sync.WaitGroup
	telling.Go(func() { r.tell(ended, name) })
	err := r.Machine.Remove(ctx, name, r.percent(PhaseRemove))
	close(ended)
	telling.Wait()
	if err == nil {
		r.Left(r.vm.Name, name, false)
	}
	return err
}

// The method tell logs a line every ten seconds, because the removal of a snapshot can take hours.
func (r *run) tell(ended <-chan struct{}, name string) {
	begun := time.Now()
	tick := time.NewTicker(10 * time.Second)
	defer tick.Stop()
	for {
		select {
		case <-ended:
			return
		case <-tick.C:
			r.Log.Info("the snapshot is being removed", "vm", r.vm.Name, "snapshot", name, "since", time.Since(begun).Round(time.Second))
		}
	}
}

func (r *run) percent(p Phase) func(int) { return func(percent int) { r.Phase(p, percent) } }
