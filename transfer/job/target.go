package job

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// openTarget creates the target. If this run continues an earlier copy, openTarget instead opens
// the target of that copy at the newest checkpoint. Then it checks that the target still has the
// data that was written last before this checkpoint. If the target does not have this data,
// openTarget opens the target once more, at the older of the two checkpoints in the journal.
func (j *job) openTarget(ctx context.Context) (err error) {
	defer j.Counters.Background(progress.WaitTarget)()
	if err := j.untouched(); err != nil {
		return err
	}
	for {
		if j.dst, err = j.target.Create(ctx); err != nil {
			return notThisTarget(err)
		}
		mustReopen := false
		if len(j.entries) == 0 {
			mustReopen, err = j.distrustZeros()
		} else {
			mustReopen, err = j.trustCheckpoint(ctx)
		}
		if err != nil || !mustReopen {
			return err
		}
		if err := j.planTarget(ctx); err != nil {
			return err
		}
		if err := j.reserve(); err != nil {
			return err
		}
	}
}

// distrustZeros decides whether to believe Spec.TargetIsZero, with which the user says that a
// device or export reads as zeros. If a journal says that an earlier copy has written to the
// target, the user is wrong. If findEarlier has not found such a journal, distrustZeros looks for
// one that has the identity of the open target. If it finds one, the result mustReopen is true: the
// caller must open the target once more, as a target that does not read as zeros.
func (j *job) distrustZeros() (mustReopen bool, err error) {
	if !j.TargetIsZero || !j.inPlace() {
		return false, nil
	}
	if j.touched == "" && j.findTouched(j.dst) {
		return true, j.dst.Abort() // nothing was written to the target so far
	}
	if j.touched != "" {
		j.warn(fmt.Sprintf("--target-is-zero is ignored, because the journal %q says that an earlier copy wrote to this target: its holes are zeroed", j.touched))
	}
	return false, nil
}

// trustCheckpoint checks that the newest checkpoint describes the target and the source. If it does
// not, trustCheckpoint drops the checkpoint and closes the target. If the result mustReopen is
// true, the caller must open the target once more, at the older checkpoint or from the beginning.
func (j *job) trustCheckpoint(ctx context.Context) (mustReopen bool, err error) {
	last := &j.entries[0]
	if err = j.compareTarget(ctx, j.dst, last); err == nil {
		if err = j.compareSource(ctx, &last.Checkpoint); err == nil {
			return false, nil
		}
		if errors.As(err, new(*usage.Error)) {
			return false, errors.Join(err, j.dst.Suspend())
		}
	}
	if suspended := j.dst.Suspend(); suspended != nil || !isAnother(err) {
		return false, errors.Join(err, suspended)
	}
	return true, j.dropCheckpoint(last, err)
}

// findTouched reports whether an earlier copy has written to the device or export that is open as
// dst. The device or export may have had another name during that copy. Therefore findTouched looks
// for the identity of the device or export in the journals of all targets.
func (r *resumption) findTouched(dst sink.Disk) bool {
	id, err := sink.IdentityOf(dst)
	path, pathErr := journal.DefaultPath(r.place.Kind)
	if err != nil || pathErr != nil || id == "" {
		return false
	}
	paths, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*.journal"))
	for _, path := range paths {
		entries, _ := journal.Load(path) // a file that is no journal has no entries
		if slices.ContainsFunc(entries, func(e journal.Entry) bool { return e.Identity == id }) {
			r.touched = path
			return true
		}
	}
	return false
}

// The method untouched returns an error if another run has continued the copy since this run read
// the journal. Without this check, opening the target would truncate the data that the other run
// wrote.
func (r *resumption) untouched() error {
	if len(r.entries) == 0 {
		return nil
	}
	now, err := journal.Load(r.path)
	if err != nil {
		return err
	}
	if len(now) == 0 || now[0].Offset != r.newest {
		return fmt.Errorf("another process has continued the copy: the newest checkpoint in the journal %q is no longer at byte %d", r.path, r.newest)
	}
	return nil
}

// errUnproved says that nothing proves that the target or the source belongs to a checkpoint.
// Either only zeros were copied before the checkpoint, or the target is an overlay, whose data may
// come from the backing disk. The copy then starts over.
var errUnproved = errors.New("nothing proves that the source and the target are those of the copy that stopped")

// isAnother reports whether err, an error of compareTarget or compareSource, means that the
// checkpoint cannot be used. Either the checkpoint does not describe the target, or nothing proves
// that it describes the target and the source.
func isAnother(err error) bool {
	return errors.Is(err, transfer.ErrTail) || errors.Is(err, sink.ErrUnfit) || errors.Is(err, errUnproved)
}

// dropCheckpoint drops the newest checkpoint. The parameter cause is the error that says why this
// checkpoint cannot be used. If cause is errUnproved, the copy starts over. After any other error
// the copy continues at the older checkpoint. If there is no older checkpoint, the copy cannot be
// resumed, and dropCheckpoint returns an error.
func (j *job) dropCheckpoint(last *journal.Entry, cause error) error {
	if errors.Is(cause, errUnproved) {
		j.warn(fmt.Sprintf("the checkpoint at byte %d is not used: %v; the copy starts over", last.Offset, cause))
		j.entries, j.stale = nil, j.place.Kind == "file"
		return nil
	}
	j.dropped = true
	if j.entries = j.entries[1:]; len(j.entries) == 0 {
		j.entries = []journal.Entry{*last} // nothing was changed, so the earlier copy is still complete
		return j.neverResumed(fmt.Errorf("the target does not hold the data that was written last according to its journal: %w", cause))
	}
	j.warn(fmt.Sprintf("the checkpoint at byte %d is not used: %v; the copy continues at the one before, at byte %d", last.Offset, cause, j.entries[0].Offset))
	return nil
}

// compareTarget compares the target with a checkpoint. If the checkpoint does not describe the
// target, compareTarget returns an error for which isAnother is true.
func (j *job) compareTarget(ctx context.Context, dst sink.Disk, checkpoint *journal.Entry) error {
	if back, ok := sink.Ability[sink.Readback](dst); ok {
		if err := checkpoint.CheckTail(ctx, back); err != nil {
			return err
		}
	}
	id, err := sink.IdentityOf(dst)
	if err != nil {
		return err
	}
	// A file with the recorded identity is the right target. Any other target must be
	// recognised by its data: data that was copied before the checkpoint must be there. Zeros
	// prove nothing, because every new disk has them. In an overlay, data proves nothing
	// either, because it may come from the backing disk.
	same := !j.inPlace() && id != "" && id == checkpoint.Identity
	if !same && (!checkpoint.Proves() || j.overlay.disk != nil && !j.inPlace()) {
		return fmt.Errorf("%w: the target has the identity %s, but the earlier copy wrote to a target with the identity %s; the data in the target cannot show that it is the same one, because this data is only zeros or may come from the backing image", errUnproved, cmp.Or(id, "unknown"), cmp.Or(checkpoint.Identity, "unknown"))
	}
	return nil
}

// compareSource reads again, from the source, the data that the earlier copy read last. It compares
// this data with the checksums in the checkpoint. If the identity of the source proves that the
// source is unchanged, compareSource reads nothing.
func (j *job) compareSource(ctx context.Context, checkpoint *transfer.Checkpoint) error {
	if b := j.overlay.identity; b != nil && b.Proof == "none" {
		j.warn(fmt.Sprintf("nothing proves that the backing %q is unchanged since the copy stopped", b.Path))
	}
	if j.copied.Proof != "none" || checkpoint.Offset == 0 {
		return nil
	}
	if !checkpoint.Proves() {
		return fmt.Errorf("%w: the source has no identity that could be compared, and the earlier copy has read only zeros, which every disk may have", errUnproved)
	}
	err := checkpoint.CheckTail(ctx, j.source)
	if errors.Is(err, transfer.ErrTail) {
		return usage.WithHint(fmt.Errorf("--resume: the source changed since the copy stopped: %w", err),
			"start over with --force and without --resume; copy from a snapshot, or stop the program that writes to the source")
	}
	if err == nil {
		j.warn("nothing proves that the source is unchanged since the copy stopped; only the data that was read last was compared, and it is unchanged")
	}
	return err
}
