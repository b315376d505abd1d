package machine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/fileversion"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// Run copies the disks of a machine. The report is never nil. After an error no file has its final
// name, except after an error whose outcome is Done: the copy is complete then, but a snapshot of
// vddkcp is still on the server.
//
// When ctx ends, Run stops the copies as job.Run does, removes the snapshot, however long that
// takes, and returns the cause of ctx.
func Run(ctx context.Context, spec Spec) (*Report, error) {
	r := newRun(spec)
	err := r.end(r.run(ctx))
	r.report.EndWith(err)
	return r.report, err
}

// run is the state of one call of Run, Plan or Open.
type run struct {
	Spec
	report   *Report
	vm       *inventory.VM
	disks    []inventory.Disk // that are copied, as the VM has them
	targets  []string         // the address of the target of each disk
	state    *state
	store    *store              // nil: the state is not stored
	snapshot *inventory.Snapshot // nil: no snapshot is needed, or it is not made yet
	// continues says that the copies of the disks continue where an earlier run has stopped.
	continues  bool
	hasEarlier bool          // there is a state file of an earlier run
	quiet      bool          // Snapshots keeps others from making a snapshot
	old        string        // name of a snapshot that an earlier run left and that this run does not continue
	owes       bool          // the disks did not need consolidation before the snapshot old was made
	before     *inventory.VM // the VM as it was when the snapshot was there and no disk was copied yet
	left       *inventory.LeftError
	saving     sync.Mutex // guards state and store while disks are copied
}

func newRun(spec Spec) *run {
	return &run{Spec: spec.withDefaults(), report: NewReport(spec.Name)}
}

// The method run goes through all steps of a copy.
func (r *run) run(ctx context.Context) error {
	r.Phase(PhaseFind, -1)
	if err := r.find(ctx); err != nil {
		return err
	}
	if err := r.open(ctx); err != nil {
		return err
	}
	defer r.closeStore()
	killpoint.At("machine-new")
	if !r.state.Step.reached(stepCopied) {
		if err := r.copyAll(ctx); err != nil {
			return err
		}
	} else {
		r.Snapshots.unlessUsed(ctx, r.key(), func() {
			if r.removeByName(ctx, r.state.Snapshot) {
				r.state.Snapshot = ""
			}
		})
	}
	if r.state.Step == stepDone {
		return r.alreadyDone()
	}
	return r.publish(ctx)
}

// The method find gets the description of the VM, and chooses the disks and their targets.
func (r *run) find(ctx context.Context) (err error) {
	if r.vm, err = r.Machine.Describe(ctx); err != nil {
		return err
	}
	r.report.VM, r.report.Power = r.vm.Name, r.vm.Power
	if r.disks, err = inventory.SelectDisks(r.vm, r.Only, r.Skip); err != nil {
		return err
	}
	r.targets, err = r.Targets(r.vm, r.disks)
	return err
}

// The method open locks the state file and reads what an earlier run left. It decides where this
// run begins.
func (r *run) open(ctx context.Context) error {
	r.state = newState(r.Server, r.vm, r.disks, r.targets)
	path, err := r.State(r.vm, r.disks, r.targets)
	if err != nil {
		return err
	}
	var earlier *state
	if r.store, earlier, err = openStore(path); r.store == nil {
		return err
	}
	if err = r.mayForget(err); err != nil {
		r.store.close()
		return err
	}
	if earlier != nil {
		r.endSession(ctx, earlier)
	}
	if err = r.useEarlier(ctx, earlier); err != nil {
		r.store.close()
	}
	return err
}

// The method mayForget returns the error of reading a state file, or nil if this run starts over
// although the state file has an unknown version.
func (r *run) mayForget(err error) error {
	if !r.Force || !errors.As(err, new(*fileversion.Error)) {
		return err
	}
	r.warn(err.Error() + ": the disks are copied from the beginning; vddkcp cleanup lists the snapshot of the earlier run, if there is one")
	return nil
}

// The method useEarlier decides what happens with the state of an earlier run, which is nil if
// there is none.
func (r *run) useEarlier(ctx context.Context, earlier *state) error {
	if earlier == nil {
		return nil
	}
	differs := r.state.differs(earlier)
	if differs != "" && earlier.Step == stepNew && earlier.Snapshot == "" {
		return nil // the earlier run has left nothing
	}
	r.hasEarlier = true
	switch {
	case differs == "" && r.Resume:
		r.state, r.continues = earlier, earlier.Step.reached(stepCopy)
		return r.findSnapshot(ctx)
	case differs != "" && !r.Force && (r.Resume || earlier.Step != stepDone):
		return usage.New(fmt.Sprintf("the state file %s is of another copy: %s", r.store.path, differs),
			"give this copy another folder or a state file of its own with --state, or use --force to start over; the snapshot of the other copy, if there is one, is listed by vddkcp cleanup")
	case earlier.VM.Server == r.Server && earlier.VM.InstanceUUID == r.vm.InstanceUUID:
		r.old, r.owes = earlier.Snapshot, earlier.Consolidated && earlier.Snapshot != ""
	}
	return nil
}

// The method findSnapshot looks for the snapshot of the earlier run that this run continues. If the
// snapshot is gone, this run starts over.
func (r *run) findSnapshot(ctx context.Context) error {
	for i := range r.state.Disks {
		if d := &r.state.Disks[i]; d.Whole && r.Force && r.state.Step != stepDone && d.checkHeld() != nil {
			r.startOver(fmt.Sprintf("its target %s was written, replaced or removed", printable.Name(d.Target)))
			return nil
		}
	}
	if r.state.Snapshot == "" && r.state.Step == stepCopy {
		r.startOver("its disks were copied without a snapshot, so nothing shows that they are unchanged")
		return nil
	}
	if r.state.Snapshot == "" || r.state.Step.reached(stepCopied) {
		return nil
	}
	s, err := r.Machine.Find(ctx, r.state.Snapshot)
	switch {
	case errors.Is(err, inventory.ErrSnapshotGone):
		r.startOver(fmt.Sprintf("the snapshot %s is gone", r.state.Snapshot))
		return nil
	case err != nil || r.quiescedEnough(s):
		return err
	case r.Force || !r.continues:
		r.startOver(fmt.Sprintf("the snapshot %s is not quiesced", r.state.Snapshot))
		return nil
	}
	return usage.New(fmt.Sprintf("--quiesce: the earlier copy was made from the snapshot %s, which is not quiesced", r.state.Snapshot),
		"run again without --quiesce to continue, or use --force to start over")
}

// The method quiescedEnough reports whether the disks can be copied from a snapshot that this run
// has not made itself.
func (r *run) quiescedEnough(s *inventory.Snapshot) bool {
	return r.Quiesce != inventory.MustQuiesce || s.Quiesced || r.vm.Power != inventory.On
}

// The method startOver makes this run copy everything again, although it was to continue an earlier
// run.
func (r *run) startOver(why string) {
	if r.state.Step.reached(stepCopy) {
		r.warn("the earlier copy cannot be continued, and the disks are copied from the beginning: " + why)
	}
	if r.state.Snapshot != "" {
		r.old, r.owes = r.state.Snapshot, r.state.Consolidated
	}
	r.state.restart()
	r.continues = false
}

// The method alreadyDone ends a run that continues a run that is done.
func (r *run) alreadyDone() error {
	for _, d := range r.state.Disks {
		if !job.Published(d.Target, d.Mark) {
			return usage.New(fmt.Sprintf("the state file %s says that the copy is done, but its target %s is not there any more", r.store.path, printable.Name(d.Target)),
				"use --force to copy the VM again")
		}
		r.report.Files = append(r.report.Files, d.Target)
	}
	r.Log.Info("the copy is done already", "state", r.store.path)
	return r.finish()
}

// The method finish ends a run whose targets have their names.
func (r *run) finish() error {
	if !r.Single || r.left != nil {
		return r.save(stepDone)
	}
	// If the process is killed from here on, the caller must know that the target is complete,
	// because no state file says so any more.
	if published := r.Job(&r.disks[0], r.targets[0]).Whole; published != nil {
		published(r.state.Disks[0].Mark)
	}
	return r.store.remove()
}

// The method endSession ends the session on the server that an earlier run has left because it was
// killed.
func (r *run) endSession(ctx context.Context, earlier *state) {
	if earlier.Session == "" || earlier.VM.Server != r.Server || earlier.Session == r.Session() {
		return
	}
	if err := r.EndSession(ctx, earlier.Session); err != nil {
		r.Log.Debug("the session of a killed run cannot be ended; the server ends it when it has been idle for some time", "error", err)
	}
}

// The method closeStore releases the state file at the end of a run. The caller will log out.
func (r *run) closeStore() {
	defer r.store.close()
	if _, err := os.Stat(r.store.path); err != nil || r.state.Session == "" {
		return
	}
	r.state.Session = ""
	if err := r.store.save(r.state); err != nil {
		r.Log.Debug("the state file cannot be written", "error", err)
	}
}

// The method save stores the state, with the given step.
func (r *run) save(s step) error {
	r.state.Step, r.state.Session = s, r.Session()
	if err := r.store.save(r.state); err != nil {
		return err
	}
	killpoint.At("machine-" + string(s))
	return nil
}

// The method publish gives the files of all disks their names.
func (r *run) publish(ctx context.Context) error {
	if err := r.save(stepPublish); err != nil {
		return err
	}
	if ctx.Err() != nil {
		return hinted.Error(context.Cause(ctx), "all disks are copied; run again with --resume, which gives the files their names")
	}
	r.Phase(PhasePublish, -1)
	if err := r.checkPublish(); err != nil {
		return err
	}
	for i, d := range r.state.Disks {
		err := job.Publish(context.WithoutCancel(ctx), r.jobOf(&r.disks[i], i), d.Mark)
		if err != nil {
			return r.ofDisk(&r.disks[i], &resumableError{fmt.Errorf("the disk is copied, but the file cannot get its name: %w", err)})
		}
		r.report.Files = append(r.report.Files, d.Target)
		killpoint.At("machine-published")
	}
	return r.finish()
}

// The method checkPublish checks all targets before the first file gets its name, because the files
// of a VM are of no use if only some of them have their names.
func (r *run) checkPublish() error {
	for i := range r.state.Disks {
		d := &r.state.Disks[i]
		if err := d.checkHeld(); err != nil {
			return r.ofDisk(&r.disks[i], err)
		}
		if spec := r.jobOf(&r.disks[i], i); d.Mark == "" || spec.Force || spec.KeepOld || job.Published(d.Target, d.Mark) {
			continue
		}
		if _, err := os.Lstat(d.Target); err == nil {
			return r.ofDisk(&r.disks[i], &resumableError{hinted.Error(
				fmt.Errorf("the disk is copied, but another process has created a file at its target %s", printable.Name(d.Target)),
				"move that file away, and run again with --resume")})
		}
	}
	return nil
}

// resumableError is an error after which --resume continues.
type resumableError struct{ error }

func (e *resumableError) Unwrap() error { return e.error }

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (*resumableError) ExitStatus() int { return exit.Resumable }

// The method end returns the error of the run for the user. If the copy is complete but a snapshot
// was left on the server, the error says so.
func (r *run) end(err error) error {
	if r.left == nil {
		return err
	}
	r.report.Left = append(r.report.Left, r.left.Snapshot)
	if err == nil {
		return &leftBehindError{r.left}
	}
	r.warn(r.left.Error())
	return err
}

// leftBehindError says that a copy is complete, but that a snapshot of vddkcp is still on the
// server.
type leftBehindError struct{ *inventory.LeftError }

func (e *leftBehindError) Error() string { return "the copy is complete, but " + e.LeftError.Error() }

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (*leftBehindError) ExitStatus() int { return exit.Left }

// Done tells package transfer/report that the copy is complete.
func (*leftBehindError) Done() bool { return true }

// The method source returns the address of a disk, for messages and reports.
func (r *run) source(d *inventory.Disk) string {
	return address.VM{Name: r.Spec.Name, Disk: strconv.Itoa(d.N)}.String()
}

// The method ofDisk adds the name of a disk to its error.
func (r *run) ofDisk(d *inventory.Disk, err error) error {
	if r.Single || len(r.disks) == 1 && len(r.vm.Disks) == 1 {
		return err
	}
	return fmt.Errorf("disk %d (%s): %w", d.N, printable.Name(d.Label), err)
}

func (r *run) warn(message string) {
	r.Log.Warn(message)
	r.report.Warnings = append(r.report.Warnings, message)
}

// The method needsSnapshot reports whether a disk that is copied must be read from a snapshot. The
// disks of templates cannot, and independent disks are in no snapshot: they are read while the VM
// is powered off.
func (r *run) needsSnapshot() bool {
	return !r.vm.Template && slices.ContainsFunc(r.disks, func(d inventory.Disk) bool { return d.Verdict == inventory.Running })
}
