// Package transfer copies a disk from a source to a sink, compares disks, and computes digests
// of disks.
//
// [NewPlan] queries the extents of a disk. [Copy] copies the disk, makes the target durable and
// publishes it, which gives it its final name. [CopyStream] does the same for an [io.Reader].
// [Compare] finds the differences between two disks, and [Sum] computes a digest. [Options] and
// [CompareOptions] tune them. With Options.Keep a copy that was interrupted can be resumed.
//
// All of them run the same pipeline. One producer cuts the allocated extents of the disk, in
// ascending order, into pieces of at most one request. Parallel workers read the pieces and
// search them for zeros. One goroutine collects the pieces in order and passes them to the
// sink, a digest or a tally of differences. If the sink is [sink.Parallel], the workers write
// to it instead. The number of pieces and of buffers is bounded, and so is the memory, whatever
// the size of the disk. Because pieces are collected in order, the progress of a copy is one
// offset, which a [Checkpoint] records.
package transfer

import (
	"context"
	"fmt"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Result describes a copy. After an error, the fields that the copy did not reach are zero.
type Result struct {
	Size   int64             // of the disk, in bytes
	Counts progress.Snapshot // when everything was written, before the target was read back
	Digest *report.Digest    // the one that was asked for, else the one that Options.Verify needed; nil: none
	Verify report.Verify
	Reread int // number of places that were read again (see source.Rereadable), of 64 KiB
}

// Copy fills dst with the content of src, makes it durable and publishes it. The plan must be
// made for src, by NewPlan or NewPlanWithin. With Options.Hold, Copy suspends dst instead of
// publishing it.
//
// After an error Copy aborts dst, which removes the target. The target is kept only if the error is
// a *MismatchError, a *RereadError or a *ResumableError, or an ErrSourceChanged as Options.Hold
// describes.
//
// Copy returns a *ResumableError only if Options.Keep is set. After the first checkpoint, every
// error is then a *ResumableError, except ErrSourceChanged, sink.ErrElsewhere, sink.ErrUnsynced,
// *MismatchError and *RereadError. Before the first checkpoint, an error is a *ResumableError in
// these cases only, in which a later run may succeed:
//   - ctx or Options.Stop has ended.
//   - The target is full.
//   - The connection to the target was lost.
//   - Reading failed, and the source is a source.Counted. Such a source has repeated the read
//     itself, so the cause may be an outage that ends later.
func Copy(ctx context.Context, src source.Disk, dst sink.Disk, plan *Plan, o Options) (result Result, err error) {
	result.Size = src.Size()
	if plan.Size != src.Size() {
		return result, endUnbegun(dst, o, fmt.Errorf("the plan is for a disk of %d bytes, but the source has %d bytes", plan.Size, src.Size()))
	}
	c, err := newCopying(ctx, src, dst, plan, o)
	if err != nil {
		return result, endUnbegun(dst, o, err)
	}
	c.planWork()
	c.o.Counters.Enter(progress.Copy)
	defer c.o.Counters.Background(progress.WaitSource)()
	err = c.run(ctx)
	if err == nil {
		err = c.finish(ctx, &result)
	}
	return result, c.end(ctx, err)
}

// endUnbegun ends a copy that fails with err before it has begun. It returns the error of the copy.
// If the copy was to continue an earlier copy, endUnbegun keeps the target as it is.
func endUnbegun(dst sink.Disk, o Options, err error) error {
	if o.Resume == nil || o.Keep == nil {
		return abort(dst, err)
	}
	return &ResumableError{Err: suspend(dst, err), Offset: o.Resume.Offset}
}
