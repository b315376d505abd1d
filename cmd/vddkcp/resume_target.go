package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

// openTarget makes the target, or opens the one to go on with and checks that it
// holds what was written last. Target is that of resumeOptions, and plan makes
// it again when they changed.
func (j *job) openTarget(ctx context.Context, src source.Disk, target *sinkopen.Target, plan func() (*sinkopen.Target, error)) (sink.Disk, error) {
	r := &j.resumption
	if err := r.untouched(); err != nil {
		return nil, err
	}
	for {
		dst, err := target.Create(ctx)
		if err != nil {
			return nil, otherTarget(err)
		}
		if len(r.entries) == 0 {
			if !j.TargetIsZero || !r.inPlace() {
				return dst, nil
			}
			if r.touched == "" && r.findTouched(dst) {
				if err := dst.Abort(); err != nil { // nothing was written
					return nil, err
				}
				if target, err = plan(); err != nil {
					return nil, err
				}
				continue
			}
			if r.touched != "" {
				j.warn(fmt.Sprintf("--target-is-zero is not believed, since by the journal %q an earlier copy wrote to this target: its holes are zeroed", r.touched))
			}
			return dst, nil
		}
		last := &r.entries[0]
		if err = j.checkTarget(ctx, dst, last); err == nil {
			if err = j.checkSource(ctx, src, &last.Checkpoint); err == nil {
				return dst, nil
			}
			if errors.As(err, new(*usageError)) {
				return nil, errors.Join(err, dst.Suspend())
			}
		}
		if suspended := dst.Suspend(); suspended != nil || !isAnother(err) {
			return nil, errors.Join(err, suspended)
		}
		if err := j.dropCheckpoint(last, err); err != nil {
			return nil, err
		}
		if target, err = plan(); err != nil {
			return nil, err
		}
	}
}

// findTouched looks for a journal of the same device or export among those of
// targets by other names, and reports whether there is one.
func (r *resumption) findTouched(dst sink.Disk) bool {
	id, err := sink.IdentityOf(dst)
	path, pathErr := journal.DefaultPath(r.place.Kind)
	if err != nil || pathErr != nil || id == "" {
		return false
	}
	paths, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*.journal"))
	for _, path := range paths {
		entries, _ := journal.Load(path) // what is no journal tells nothing
		if slices.ContainsFunc(entries, func(e journal.Entry) bool { return e.Identity == id }) {
			r.touched = path
			return true
		}
	}
	return false
}

// untouched returns an error if another run has continued the copy since the
// journal was read: the target must not be cut where that was.
func (r *resumption) untouched() error {
	if len(r.entries) == 0 {
		return nil
	}
	now, err := journal.Load(r.path)
	if err != nil {
		return err
	}
	if len(now) == 0 || now[0].Offset != r.newest {
		return fmt.Errorf("another process went on with the copy meanwhile: by the journal %q it is no longer at %d", r.path, r.newest)
	}
	return nil
}

// isAnother says whether err of checkTarget means that the target is not the one of
// the checkpoint.
func isAnother(err error) bool {
	return errors.Is(err, transfer.ErrTail) || errors.Is(err, sink.ErrUnfit) || errors.Is(err, errUnproved)
}

// dropCheckpoint makes the copy go on from the checkpoint before the last one,
// which does not hold for the target, or from the start.
func (j *job) dropCheckpoint(last *journal.Entry, why error) error {
	r := &j.resumption
	if errors.Is(why, errUnproved) {
		j.warn(fmt.Sprintf("the checkpoint at %d is not used: %v; the copy starts anew", last.Offset, why))
		r.entries, r.stale = nil, r.place.Kind == "file"
		return nil
	}
	r.dropped = true
	if r.entries = r.entries[1:]; len(r.entries) == 0 {
		r.entries = []journal.Entry{*last} // the earlier copy stays as it is
		return j.neverResumed(fmt.Errorf("the target does not hold what its journal says was written last: %w", why))
	}
	j.warn(fmt.Sprintf("the checkpoint at %d is not used: %v; the one before, at %d, is", last.Offset, why, r.entries[0].Offset))
	return nil
}

// errUnproved says that a target or a source may be another one than that of a
// checkpoint, of which nothing would be lost.
var errUnproved = errors.New("nothing proves that source and target are those of the copy that stopped")

// checkTarget compares what a target holds with a checkpoint. Where the checkpoint
// does not hold for the target, isAnother is true for the error.
func (j *job) checkTarget(ctx context.Context, dst sink.Disk, last *journal.Entry) error {
	if back, ok := sink.Ability[sink.Readback](dst); ok {
		if err := last.CheckTail(ctx, back); err != nil {
			return err
		}
	}
	id, err := sink.IdentityOf(dst)
	if err != nil {
		return err
	}
	// The identity of a device or an export was compared when it was opened, but
	// zeros are on every new disk. A file that holds what was written may have
	// been moved here. What an overlay reads as may be the backing's, which proves
	// nothing about the overlay's file.
	inPlace := j.resumption.inPlace()
	same := !inPlace && id != "" && id == last.Identity
	if !same && (!last.Proves() || j.backing != nil && !inPlace) {
		return fmt.Errorf("%w: the target is %s, and was %s, and nothing but zeros or the backing's content was written last", errUnproved, cmp.Or(id, "unknown"), cmp.Or(last.Identity, "unknown"))
	}
	return nil
}

// checkSource looks, where nothing proves that the source is the same, whether
// what was read last still is.
func (j *job) checkSource(ctx context.Context, src source.Disk, last *transfer.Checkpoint) error {
	if b := j.overlaid; b != nil && b.Proof == "none" {
		j.warn(fmt.Sprintf("nothing proves that the backing %q is what it was when the copy stopped", b.Path))
	}
	if j.resumption.copy.Proof != "none" || last.Offset == 0 {
		return nil
	}
	if !last.Proves() {
		return fmt.Errorf("%w: the source has no identity that proves it, and nothing but zeros was read so far", errUnproved)
	}
	err := last.CheckTail(ctx, src)
	if errors.Is(err, transfer.ErrTail) {
		return &usageError{
			err:  fmt.Errorf("--resume: the source changed since the copy stopped: %w", err),
			hint: "--force without --resume starts anew; copy from a snapshot, or with the source's user stopped",
		}
	}
	if err == nil {
		j.warn("nothing proves that the source is what it was when the copy stopped; what was read last is the same")
	}
	return err
}
