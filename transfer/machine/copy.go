package machine

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/grace"
	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// The method copyAll makes the snapshot, copies all disks and removes the snapshot. After that the
// targets are complete, but have not got their names.
func (r *run) copyAll(ctx context.Context) error {
	if err := r.Opener.Ready(); err != nil {
		return err
	}
	if err := r.checkTargets(ctx); err != nil {
		return err
	}
	if err := r.checkVM(); err != nil {
		return r.relieve(ctx, err)
	}
	if err := r.acquire(ctx); err != nil {
		return err
	}
	r.Phase(PhaseCopy, -1)
	err := r.discard()
	if err == nil {
		err = r.save(stepCopy)
	}
	if err == nil {
		err = r.copyDisks(ctx)
	}
	if err == nil {
		err = r.stillTrue(ctx)
	}
	if err == nil {
		err = r.save(stepCopied)
	}
	if err != nil {
		return r.giveUp(ctx, err)
	}
	if r.release(ctx, false); r.left == nil {
		r.state.Snapshot = ""
	}
	return nil
}

// The method checkTargets finds mistakes in the targets before anything is changed.
func (r *run) checkTargets(ctx context.Context) error {
	for i := range r.disks {
		if err := r.checkTarget(ctx, i); err != nil {
			return r.ofDisk(&r.disks[i], err)
		}
	}
	return nil
}

func (r *run) checkTarget(ctx context.Context, i int) error {
	d, st := &r.disks[i], &r.state.Disks[i]
	if st.Whole {
		return st.checkHeld()
	}
	spec := r.jobOf(d, i)
	if r.Resume && !r.hasEarlier && !spec.Force {
		if partial := job.Partial(st.Target); partial != "" {
			return usage.New(fmt.Sprintf("the file %s of an unfinished copy is there, but no state file %s says which copy it belongs to", printable.Name(partial), printable.Name(r.store.path)),
				"if the state file has another name, give it with --state; or use --force to start over")
		}
	}
	return job.CheckTarget(ctx, spec, d.Size, r.startsOver())
}

// The method startsOver reports whether this run was to continue an earlier one, but copies
// everything from the beginning.
func (r *run) startsOver() bool { return r.Resume && r.hasEarlier && !r.continues }

// The method discard removes what an earlier run has written, if this run does not continue it.
func (r *run) discard() error {
	for i := range r.disks {
		if d := &r.disks[i]; r.startsOver() {
			if err := job.Discard(r.jobOf(d, i)); err != nil {
				return r.ofDisk(d, err)
			}
		}
	}
	return nil
}

// The method checkVM returns an error if the VM is in a state in which no snapshot should be made.
func (r *run) checkVM() error {
	if !r.needsSnapshot() {
		return nil
	}
	if r.vm.Question != "" {
		return &waitError{fmt.Sprintf("the VM waits for an answer to a question: %s", printable.Name(r.vm.Question)), "answer the question in the vSphere client"}
	}
	if r.vm.ConsolidationNeeded && !r.ForceConsolidate && r.state.Snapshot == "" && !r.owes {
		return usage.New("the disks of the VM need consolidation, which an earlier snapshot has left undone",
			"consolidate the disks in the vSphere client, or use --force-consolidate")
	}
	return r.checkSpace(r.vm)
}

// The method checkSpace returns an error if a datastore of the VM has too little free space for a
// snapshot to grow.
func (r *run) checkSpace(vm *inventory.VM) error {
	for _, s := range vm.Stores {
		if s.Free < r.MinFree {
			return &fullError{waitError{
				fmt.Sprintf("the datastore %s has %s of free space, less than --min-free %s: a snapshot that fills a datastore stops every VM on it", printable.Name(s.Name), bytesize.Format(s.Free), bytesize.Format(r.MinFree)),
				"free space on the datastore, or choose a smaller --min-free",
			}}
		}
	}
	return nil
}

// waitError says that a run cannot begin or go on at present. Another run can, as soon as somebody
// has removed the obstacle.
type waitError struct{ text, hint string }

func (e *waitError) Error() string { return e.text }

// Hint tells the user what to do about the error.
func (e *waitError) Hint() string { return e.hint }

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (*waitError) ExitStatus() int { return exit.Resumable }

// fullError is the error of checkSpace. A run that fails with it removes the snapshot even if
// Spec.KeepSnapshot is set, because a snapshot grows.
type fullError struct{ waitError }

func isFull(err error) bool { return errors.As(err, new(*fullError)) }

// The method relieve removes the snapshot of an earlier run if this run cannot begin because a
// datastore is nearly full. It returns err.
func (r *run) relieve(ctx context.Context, err error) error {
	name := cmp.Or(r.state.Snapshot, r.old)
	if !isFull(err) || name == "" {
		return err
	}
	r.Snapshots.unlessUsed(ctx, r.key(), func() {
		if r.removeByName(ctx, name) && r.state.Snapshot != "" {
			r.state.restart()
			err = joinError(err, r.store.save(r.state))
		}
	})
	return err
}

// The method key identifies the VM in Snapshots.
func (r *run) key() string { return r.Server + " " + r.vm.Moref }

// The method acquire makes the snapshot, or finds the one that an earlier run has made, or shares
// the one of another run of this process.
func (r *run) acquire(ctx context.Context) error {
	if !r.needsSnapshot() {
		return r.acquireQuiet(ctx)
	}
	shared := true
	snapshot, err := r.Snapshots.acquire(ctx, r.key(), func() (*inventory.Snapshot, error) {
		shared = false
		if s, err := r.earlierSnapshot(ctx); s != nil || err != nil {
			return s, err
		}
		if err := r.removeOld(ctx); err != nil {
			return nil, err
		}
		s, err := r.makeSnapshot(ctx)
		if err != nil {
			return nil, r.undo(ctx, err)
		}
		return s, nil
	})
	if err != nil {
		return err
	}
	if r.continues && snapshot.Name != r.state.Snapshot {
		r.startOver(fmt.Sprintf("the snapshot %s is gone", r.state.Snapshot))
	}
	r.snapshot = snapshot
	if shared && !r.quiescedEnough(snapshot) {
		return r.giveUp(ctx, &waitError{"--quiesce: the snapshot that another job has made is not quiesced", "use --quiesce for all disks of the VM, or for none"})
	}
	if err := r.checkSnapshot(ctx); err != nil {
		return r.giveUp(ctx, err)
	}
	return nil
}

// The method acquireQuiet prepares the copy of a VM without a snapshot.
func (r *run) acquireQuiet(ctx context.Context) error {
	// A run without a state file, which is one of Open, does not compare the VM at its end. A
	// template gets no snapshots.
	if r.store != nil && !r.vm.Template {
		if err := r.Snapshots.acquireQuiet(ctx, r.key()); err != nil {
			return err
		}
		r.quiet = true
	}
	err := r.removeOld(ctx)
	if err == nil {
		r.before, err = r.Machine.Describe(ctx) // the removal has changed the VM
	}
	if err != nil {
		r.release(ctx, false)
	}
	return err
}

// The method removeOld removes the snapshot of an earlier run that this run does not continue.
func (r *run) removeOld(ctx context.Context) error {
	if r.old == "" {
		return nil
	}
	r.Log.Info("removing the snapshot that an earlier run left", "snapshot", r.old)
	if err := r.remove(ctx, r.old); err != nil {
		return err
	}
	r.old, r.owes = "", false
	return nil
}

// The method earlierSnapshot returns the snapshot from which an earlier run has copied, if this run
// continues it. If that snapshot is gone in the meantime, this run starts over: another snapshot
// must not get the name of the old one, which stands for the content of the disks.
func (r *run) earlierSnapshot(ctx context.Context) (*inventory.Snapshot, error) {
	if !r.continues {
		return nil, nil
	}
	r.Phase(PhaseSnapshot, -1)
	vm, err := r.Machine.Describe(ctx)
	if err == nil {
		err = r.ours(vm, r.state.Snapshot)
	}
	if err != nil {
		return nil, r.stopped(err)
	}
	s, err := r.Machine.Find(ctx, r.state.Snapshot)
	switch {
	case errors.Is(err, inventory.ErrSnapshotGone):
		r.startOver(fmt.Sprintf("the snapshot %s is gone", r.state.Snapshot))
		return nil, r.checkTargets(ctx)
	case err != nil:
		return nil, r.stopped(err)
	}
	r.Left(r.vm.Name, s.Name, true)
	return s, nil
}

// The method makeSnapshot makes a snapshot. Its name is stored durably before, so that a later run
// finds it. If an earlier run has stored a name, the snapshot may have been made already.
func (r *run) makeSnapshot(ctx context.Context) (*inventory.Snapshot, error) {
	r.Phase(PhaseSnapshot, -1)
	name := r.state.Snapshot
	vm, err := r.Machine.Describe(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.ours(vm, name); err != nil {
		return nil, err
	}
	if name == "" {
		name = inventory.NewName()
		r.state.Snapshot, r.state.Consolidated = name, r.mayConsolidate(vm)
		if err := r.save(stepSnapshot); err != nil {
			return nil, err
		}
	}
	host, _ := os.Hostname() // only shown to people
	mark := inventory.Mark{ID: name[len("vddkcp-"):], Round: 1, Host: host, Started: time.Now().UTC().Truncate(time.Second)}
	r.Left(r.vm.Name, name, true)
	r.Log.Info("making a snapshot", "vm", r.vm.Name, "snapshot", name)
	s, err := r.Machine.Snapshot(ctx, inventory.Request{Name: name, Mark: mark, Quiesce: r.Quiesce, Consolidate: r.ForceConsolidate})
	if err == nil {
		killpoint.At("machine-snapshot-made")
	}
	return s, err
}

// The method mayConsolidate reports whether the disks may be consolidated after the snapshot of
// this run was removed. The parameter vm is the VM as it was before the snapshot was made.
func (r *run) mayConsolidate(vm *inventory.VM) bool {
	return !vm.ConsolidationNeeded || r.ForceConsolidate
}

// The method ours returns an error if the VM has a snapshot of vddkcp with another name than the
// given one.
func (r *run) ours(vm *inventory.VM, name string) error {
	for _, n := range vm.Snapshots {
		if n.Mark != nil && n.Name != name {
			return &inventory.BusyError{VM: vm.Name, Name: n.Name, Mark: n.Mark}
		}
	}
	return nil
}

// The method undo removes a snapshot that could not be made with certainty: the server may have
// made it nevertheless. It returns err.
func (r *run) undo(ctx context.Context, err error) error {
	r.removeByName(ctx, r.state.Snapshot)
	if r.left == nil {
		r.state.restart()
		err = joinError(err, r.store.save(r.state))
	}
	return err
}

// The method checkSnapshot checks the new snapshot: its disks are those that are to be copied, and
// no other run of vddkcp has made one at the same time.
func (r *run) checkSnapshot(ctx context.Context) error {
	r.report.Quiesced = r.snapshot.Quiesced
	if r.Quiesce == inventory.TryQuiesce && !r.snapshot.Quiesced {
		r.warn("the guest could not be quiesced: the disks are as they would be after a power failure")
	}
	if r.state.Snapshot != r.snapshot.Name { // another run of this process has made it
		r.state.Snapshot, r.state.Consolidated = r.snapshot.Name, r.mayConsolidate(r.vm)
	}
	vm, err := r.Machine.Describe(ctx)
	if err != nil {
		return err
	}
	r.before = vm
	if err := r.ours(vm, r.snapshot.Name); err != nil {
		return err
	}
	if len(r.Only) == 0 && !r.Single {
		for _, d := range r.snapshot.Disks {
			if !slices.ContainsFunc(r.vm.Disks, func(o inventory.Disk) bool { return inventory.SameDisk(&d, &o) }) {
				return fmt.Errorf("the snapshot has the disk %s, which was added to the VM in the meantime: run again to copy it, too", printable.Name(d.Label))
			}
		}
	}
	for i := range r.disks {
		d := &r.disks[i]
		s := r.snapshot.Disk(d)
		switch {
		case d.Verdict != inventory.Running:
		case s == nil:
			return r.ofDisk(d, errors.New("the disk is not in the snapshot: somebody has changed or removed it in the meantime"))
		case s.Size != d.Size:
			return r.ofDisk(d, fmt.Errorf("the disk has %d bytes in the snapshot, but %d bytes before: somebody has resized it in the meantime", s.Size, d.Size))
		}
	}
	return nil
}

// The method copyDisks copies all disks that are not complete yet. If a disk fails and nothing of
// the others could be used later, they are stopped.
func (r *run) copyDisks(ctx context.Context) error {
	copying, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	round := &Round{N: 1, Kind: "full", Disks: make([]*report.Report, len(r.disks))}
	if r.snapshot != nil {
		round.Snapshot = r.snapshot.Name
	}
	begun := time.Now()
	var watching sync.WaitGroup
	watching.Go(func() { r.watch(copying, stop) })
	errs := make([]error, len(r.disks))
	var disks sync.WaitGroup
	permits := make(chan struct{}, r.Parallel)
	for i := range r.disks {
		permits <- struct{}{}
		disks.Go(func() {
			defer func() { <-permits }()
			if round.Disks[i], errs[i] = r.copyDisk(copying, i); errs[i] != nil && !r.KeepSnapshot {
				stop(errOther)
			}
		})
	}
	disks.Wait()
	cause := context.Cause(copying)
	stop(nil)
	watching.Wait()
	round.Seconds = time.Since(begun).Seconds()
	for i, d := range round.Disks {
		if d == nil { // an earlier run has copied the disk
			d = report.New(r.source(&r.disks[i]), r.targets[i])
			d.End(report.StatusSkipped, 0)
			round.Disks[i] = d
		}
	}
	r.report.Rounds = append(r.report.Rounds, *round)
	if cause == context.Cause(ctx) && errors.Join(errs...) == nil {
		return nil // a signal that has come too late to stop a copy
	}
	if cause != nil && cause != errOther {
		return cause // a signal, or what watch has seen
	}
	return r.firstOf(errs)
}

// errOther is the cause for which the copy of a disk ends when the copy of another disk has failed.
var errOther = errors.New("the copy of another disk has failed")

// The method firstOf returns the error of the first disk that failed by itself, and logs the other
// errors.
func (r *run) firstOf(errs []error) (first error) {
	for i, err := range errs {
		switch {
		case err == nil || errors.Is(err, errOther):
		case first == nil:
			first = r.ofDisk(&r.disks[i], err)
		default:
			r.Log.Error(r.ofDisk(&r.disks[i], err).Error())
		}
	}
	return first
}

// The method copyDisk copies the disk with the given index. It does nothing if an earlier run has
// completed its target.
func (r *run) copyDisk(ctx context.Context, i int) (*report.Report, error) {
	d, st := &r.disks[i], &r.state.Disks[i]
	if st.Whole {
		return nil, st.checkHeld()
	}
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	spec := r.jobOf(d, i)
	if err := r.dropOther(d, &spec); err != nil {
		return nil, err
	}
	var done func(error)
	spec.Counters, done = r.Begin(d, spec.Target)
	var stored error
	marked := "" // the target that is a file
	spec.Whole = func(mark string) {
		marked = mark
		r.saving.Lock()
		defer r.saving.Unlock()
		st.Whole, st.Mark, st.Seal = true, mark, job.Seal(st.Target, mark)
		if stored = r.store.save(r.state); stored != nil {
			st.Whole = false
		}
		killpoint.At("machine-whole")
	}
	copied, err := job.Run(ctx, spec)
	done(err)
	if err == nil && !st.Whole {
		// The target is not a file, or the state could not be stored.
		spec.Whole(marked)
	}
	return copied, errors.Join(err, stored)
}

// The method dropOther makes the copy of a disk start over if an earlier run has copied a part of
// it from another snapshot. Such a part stays if an earlier run started over and ended before it
// came to this disk.
func (r *run) dropOther(d *inventory.Disk, spec *job.Spec) error {
	if !spec.Resume || r.snapshot == nil || r.snapshot.Disk(d) == nil {
		return nil
	}
	earlier := job.EarlierSource(*spec)
	if earlier == "" || earlier == Identity(r.Server, r.vm, r.snapshot.Disk(d), r.snapshot) {
		return nil
	}
	r.Log.Info("the copy of the disk starts over, because an earlier one was of another snapshot", "disk", d.Title())
	spec.Resume = false
	return job.Discard(*spec)
}

// checkHeld returns an error if the complete target is not any more what the copy has left.
func (d *stateDisk) checkHeld() error {
	if d.Seal == job.Seal(d.Target, d.Mark) {
		return nil
	}
	return usage.New(fmt.Sprintf("the target %s is not what the copy has left: the file was written, replaced or removed", printable.Name(d.Target)), "use --force to copy the VM again")
}

// The method jobOf returns the options for the copy of the disk with the given index.
func (r *run) jobOf(d *inventory.Disk, i int) job.Spec {
	spec := r.Job(d, r.targets[i])
	spec.Source, spec.Target = r.source(d), r.state.Disks[i].Target
	spec.Hold, spec.Force = true, spec.Force || r.Force
	spec.Resume = r.continues && spec.CanResume()
	spec.OpenDisk = func(ctx context.Context, o *sourceopen.Opener) (source.Disk, error) { return r.openDisk(ctx, d, o) }
	return spec
}

// The method stillTrue checks that the copied data is the content of one instant: the snapshot was
// there until the last byte was read, or the VM was powered off and unchanged.
func (r *run) stillTrue(ctx context.Context) error {
	checking, cancel := grace.Prolong(ctx, 10*time.Second)
	defer cancel()
	vm, err := r.Machine.Describe(checking)
	if err != nil {
		return err
	}
	return r.unchanged(vm)
}

// The method unchanged returns an error if the disks of a VM may have changed since their copy
// began.
func (r *run) unchanged(vm *inventory.VM) error {
	if r.snapshot != nil && !hasSnapshot(vm, r.snapshot.Moref) {
		return fmt.Errorf("%w: what was copied may be a mixture of old and new data", inventory.ErrSnapshotGone)
	}
	for i := range r.disks {
		if d := &r.disks[i]; r.snapshot != nil && r.snapshot.Disk(d) != nil {
			continue
		}
		if vm.Power != inventory.Off {
			return r.ofDisk(&r.disks[i], errors.New("the VM was powered on while the disk was copied without a snapshot: what was copied may be a mixture of old and new data"))
		}
		if vm.ChangeVersion != r.before.ChangeVersion {
			return r.ofDisk(&r.disks[i], errors.New("the VM was changed while the disk was copied without a snapshot: what was copied may be a mixture of old and new data"))
		}
	}
	return nil
}

func hasSnapshot(vm *inventory.VM, moref string) bool {
	return slices.ContainsFunc(vm.Snapshots, func(n inventory.Node) bool { return n.Moref == moref })
}

// The method watch looks at the VM from time to time while its disks are copied. If the snapshot is
// gone, or a datastore gets full, it stops the copies. An error of the server is ignored: if the
// server is lost, the copies notice it themselves.
func (r *run) watch(ctx context.Context, stop context.CancelCauseFunc) {
	tick := time.NewTicker(r.interval)
	defer tick.Stop()
	asked := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		vm, err := r.Machine.Describe(ctx)
		if errors.Is(err, inventory.ErrVMGone) {
			stop(err)
			return
		}
		if err != nil {
			r.Log.Debug("the VM could not be described", "error", err)
			continue
		}
		if vm.Question != "" && vm.Question != asked {
			r.Log.Warn("the VM waits for an answer to a question", "question", vm.Question)
		}
		asked = vm.Question
		err = r.unchanged(vm)
		if err == nil && r.snapshot != nil {
			err = r.checkSpace(vm)
		}
		if err != nil {
			stop(err)
			return
		}
	}
}
