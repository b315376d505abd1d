// Package transfer moves a disk from a source to a sink.
//
// One producer walks the source's extents in ascending order and cuts them
// into pieces; readers fill and scan them for zeros in any order; one
// goroutine takes them in order again and hands them to the sink, or, where
// the sink is parallel, only keeps count. The bytes of all pieces that are not
// done are bounded, and so is the memory a copy takes, whatever the disk's
// size; and what is done is always one offset and a little more.
package transfer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Result is what a copy tells beside its counters.
type Result struct {
	Size   int64             // of the disk, bytes
	Counts progress.Snapshot // of the copy, when all was written: reading back counts on
	Digest *report.Digest    // the one that was asked for, else the one that Verify needed; nil: none
	Verify report.Verify
}

// Copy fills dst with all of src, makes it durable and publishes it. Plan is
// NewPlan's for src.
//
// On an error dst is aborted, which removes what was made for it, except after
// a *MismatchError and a *ResumableError. Without Options.Keep there is no
// *ResumableError. With it, once a checkpoint exists, every error is one except
// ErrSourceChanged, sink.ErrElsewhere, sink.ErrUnsynced and *MismatchError. While there is no checkpoint, the errors
// are resumable that a later run may not have: the end of ctx or Options.Stop, a
// target that is full or lost, and a source.Counted that gave up.
func Copy(ctx context.Context, src source.Disk, dst sink.Disk, plan *Plan, o Options) (result Result, err error) {
	result.Size = src.Size()
	if plan.Size != src.Size() {
		return result, aborted(dst, fmt.Errorf("the plan is for %d bytes, the source has %d", plan.Size, src.Size()))
	}
	o = o.normal(dst, isZeroed(dst))
	if err := o.identifyBacking(ctx); err != nil {
		return result, aborted(dst, err)
	}
	// What is not known yet counts as work until it shows to be none.
	work, rest := plan.Data, plan.Size-plan.Known
	if !isZeroed(dst) {
		work += plan.Zero
	}
	o.Counters.AddPlanned(work + rest)
	o.Counters.AddSkipped(plan.Known - work)
	o.Counters.Enter(progress.Copy)
	p, err := copyAll(ctx, src, dst, plan, o)
	if err == nil {
		err = p.finish(ctx, &result)
	}
	return result, p.end(ctx, err)
}

// copyAll runs a pipeline, and another one from the last checkpoint on whenever
// the target is lost. It returns the last of them.
func copyAll(ctx context.Context, src source.Disk, dst sink.Disk, plan *Plan, o Options) (*pipeline, error) {
	p := newPipeline(src, dst, plan, o, isZeroed(dst))
	if err := p.begin(ctx, o.Resume, 0, o.Resume != nil); err != nil {
		return p, err
	}
	p.overTo = p.start  // an earlier run did what is below
	var since time.Time // when the target was lost, without any progress after that
	for failures := 0; ; failures++ {
		err := p.run(ctx)
		if err == nil {
			return p, p.unchanged(ctx)
		}
		if !errors.Is(err, sink.ErrLost) || o.Reopen == nil {
			return p, err
		}
		if p.keeper.last.Offset > p.start || since.IsZero() {
			failures, since = 0, time.Now()
		}
		lost := p
		lost.dst.Suspend() // it is gone, whatever this says
		if dst, err = lost.reopen(ctx, err, failures, since); err != nil {
			return lost, err
		}
		p = newPipeline(src, dst, plan, o, isZeroed(dst))
		p.origin = lost.origin
		if err := p.begin(ctx, lost.keeper.last, lost.keeper.done, lost.keeper.exists); err != nil {
			return p, err
		}
		p.recount()
	}
}

// recount sets the counters of a copy that continues at the last checkpoint, after
// its target was lost and opened again. Work after the checkpoint counts as not
// done, and is planned anew: the lost target may have read as zeros where the new
// one has to be zeroed.
func (p *pipeline) recount() {
	c := p.o.Counters
	was := c.Snapshot()
	c.AddDone(p.keeper.done - was.Done)
	asked := p.plan.Data + p.plan.Zero + p.plan.Inherited
	p.plan.Known = max(asked, p.start)
	p.overFrom, p.overTo = min(p.start, p.plan.cachedTo), min(p.start, asked)
	data, zero := p.plan.below(p.overFrom)
	work := p.plan.Data - data + p.plan.Size - p.plan.Known
	if !p.zeroed {
		work += p.plan.Zero - zero
	}
	p.widen(p.keeper.done + work - was.Planned)
}

// begin makes the pipeline start at a checkpoint, nil for none, of which the
// counters say that done bytes are done. Exists says whether a checkpoint is
// durable, so that a later run can go on at it. Ctx is that of the whole copy:
// calls to the sink are made under it.
func (p *pipeline) begin(ctx context.Context, at *Checkpoint, done int64, exists bool) (err error) {
	p.sinkContext = ctx
	if at == nil {
		at = new(Checkpoint)
		if p.o.Reopen != nil || p.o.Keep != nil {
			// Opened again, the target is not what it was before the first
			// write, and its state says so.
			if at.State, _, err = p.dst.Checkpoint(0); err != nil {
				return err
			}
			p.origin = at.State
		}
	}
	p.start, p.at = at.Offset, at.Offset
	if p.o.Keep != nil || p.o.Reopen != nil {
		p.keeper = newKeeper(p, at, done, exists)
	}
	if p.sums, err = p.o.sumsAt(at); err != nil {
		return err
	}
	for _, c := range p.all {
		c.hashed = make([]digest.Blocks, len(p.sums))
	}
	p.begun = true
	return nil
}

// finish makes the target durable, gives it its name, and tells the digests.
func (p *pipeline) finish(ctx context.Context, result *Result) error {
	p.o.Counters.Enter(progress.Finish)
	if p.keeper != nil && p.o.Keep != nil && p.o.Verify {
		// Reading back takes long, and a signal may end it.
		if err := p.keeper.final(ctx); err != nil {
			return err
		}
	}
	if err := p.dst.Finish(ctx); err != nil {
		return err
	}
	p.finished = true
	result.Counts = p.o.Counters.Snapshot()
	if len(p.sums) > 0 {
		result.Digest = &report.Digest{Algorithm: string(p.sums[0].Algorithm()), Value: p.sums[0].Value()}
	}
	if p.o.Verify {
		var err error
		if result.Verify, err = p.verify(ctx); err != nil {
			return err
		}
		p.o.Counters.Enter(progress.Finish)
		// Reading back takes long, and the backing may have changed meanwhile.
		if err := p.o.backingUnchanged(ctx); err != nil {
			return err
		}
	}
	// From here on the copy is complete, and only its name is missing: to stop
	// now would save nothing. From the rename on a signal must not report as
	// stopped what has its final name.
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if p.o.Whole != nil {
		p.o.Whole()
	}
	return p.dst.Publish(context.WithoutCancel(ctx))
}

func isZeroed(dst sink.Disk) bool {
	z, ok := sink.Ability[sink.Zeroed](dst)
	return ok && z.ZeroedFrom(0)
}
