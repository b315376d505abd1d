// Package transfer copies a disk from a source to a sink, compares disks, and
// computes digests of disks.
//
// [NewPlan] queries the extents of a disk, and [Copy] copies the disk, makes the
// target durable and publishes it. [CopyStream] does the same for an [io.Reader].
// [Compare] finds the differences between two disks, and [Sum] computes a digest.
// [Options] and [CompareOptions] tune them; with Options.Keep a copy that was
// interrupted can be resumed.
//
// All of them run the same pipeline: one producer cuts the allocated extents of the
// disk, in ascending order, into pieces of at most one request; parallel workers read the
// pieces and inspect them for zeros; and one goroutine collects the pieces in
// order and hands them to the sink, a digest or a tally of differences. A sink
// that is [sink.Parallel] is written by the workers. The number of pieces and of
// buffers is bounded, and so is the memory, whatever the size of the disk. As
// pieces are collected in order, the progress of a copy is one offset, which a
// [Checkpoint] records.
package transfer

import (
	"context"
	"fmt"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Result describes a copy. After an error, fields that were not reached are zero.
type Result struct {
	Size   int64             // of the disk, in bytes
	Counts progress.Snapshot // when everything was written, before the target was read back
	Digest *report.Digest    // the one that was asked for, else the one that Options.Verify needed; nil: none
	Verify report.Verify
}

// Copy fills dst with the content of src, makes it durable and publishes it. NewPlan or
// NewPlanWithin must have made the plan for src.
//
// After an error dst is aborted, which removes the target, except after a
// *MismatchError and a *ResumableError. Without Options.Keep there is no
// *ResumableError. With Options.Keep, once a checkpoint exists, every error is a
// *ResumableError except ErrSourceChanged, sink.ErrElsewhere, sink.ErrUnsynced
// and *MismatchError. Without a checkpoint, only an error that may not occur in a
// later run is a *ResumableError: the end of ctx or Options.Stop, a target that is
// full or lost, and an error of a source that is source.Counted, which has
// retried before.
func Copy(ctx context.Context, src source.Disk, dst sink.Disk, plan *Plan, o Options) (result Result, err error) {
	result.Size = src.Size()
	if plan.Size != src.Size() {
		return result, abort(dst, fmt.Errorf("the plan is for a disk of %d bytes, but the source has %d bytes", plan.Size, src.Size()))
	}
	c, err := newCopying(ctx, src, dst, plan, o)
	if err != nil {
		return result, abort(dst, err)
	}
	// Ranges whose extents the plan does not know count as work until the copy queries
	// them.
	work, unknown := plan.Data, plan.Size-plan.Known
	if !c.zeroed {
		work += plan.Zero
	}
	c.o.Counters.AddPlanned(work + unknown)
	c.o.Counters.AddSkipped(plan.Known - work)
	c.o.Counters.Enter(progress.Copy)
	err = c.run(ctx)
	if err == nil {
		err = c.finish(ctx, &result)
	}
	return result, c.end(ctx, err)
}
