package transfer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/internal/killpoint"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// The type copying holds the state of one call of Copy or CopyStream. Its methods copy the disk
// with a pipeline. When the connection to the target is lost, they open the target again and run
// another pipeline.
type copying struct {
	o       Options
	src     source.Disk // marked by guard; nil: a stream
	plan    *Plan       // nil: a stream
	backing backing
	reopen  reopener

	// The following fields describe the current target. The method begin sets them.
	dst    sink.Disk
	zeroed bool          // unwritten ranges of the target already read as zeros
	sums   []*digest.Sum // of the content below start, and later of what was collected
	keeper *keeper       // nil: the copy takes no checkpoints
	start  int64         // everything below is done already, in bytes
	begun  bool          // begin succeeded; from then on checkpoints can be taken

	zerosWork bool // holes are planned as work, because the target needed zeroing at some time
	finished  bool // the sink's Finish has returned
}

// newCopying prepares a copy from src to dst, and changes nothing. If it returns an error, dst is
// still open, and the caller must call endUnbegun.
func newCopying(ctx context.Context, src source.Disk, dst sink.Disk, plan *Plan, o Options) (*copying, error) {
	c := &copying{src: guard(src), dst: dst, plan: plan, zeroed: isZeroed(dst)}
	c.o = o.normal(dst, c.zeroed)
	c.reopen = reopener{policy: c.o.Lost.Policy(), open: c.o.Reopen, stop: c.o.stop()}
	var err error
	c.backing, err = newBacking(ctx, c.o)
	return c, err
}

// isZeroed reports whether unwritten ranges of dst already read as zeros.
func isZeroed(dst sink.Disk) bool {
	z, ok := sink.Ability[sink.Zeroed](dst)
	return ok && z.ZeroedFrom(0)
}

// The method reader returns a reader of the content to copy, which comes from the source and the
// backing image.
func (c *copying) reader() *reader {
	r := &reader{src: c.src, backing: c.backing.disk, limit: c.o.Limit, counters: c.o.Counters}
	if c.plan != nil {
		r.mixed = c.dst.Unit() > 1 && (c.plan.Inherited > 0 || c.plan.Known < c.plan.Size)
	}
	return r
}

// The method run copies everything. Whenever the connection to the target is lost, it opens the
// target again and continues at the last checkpoint.
func (c *copying) run(ctx context.Context) error {
	if err := c.begin(c.dst, c.o.Resume, c.o.Resume != nil); err != nil {
		return err
	}
	var since time.Time // when the target was lost for the first time since the copy made progress
	for failures := 0; ; failures++ {
		err := c.runOnce(ctx)
		if err == nil {
			return c.unchanged(ctx)
		}
		if !errors.Is(err, sink.ErrLost) || c.o.Reopen == nil {
			return err
		}
		if c.keeper.last.Offset > c.start || since.IsZero() {
			failures, since = 0, time.Now()
		}
		_ = c.dst.Suspend() // the connection is gone, whatever Suspend returns
		dst, err := c.reopen.reopen(ctx, c.keeper, err, failures, since)
		if err != nil {
			return err
		}
		if err := c.begin(dst, c.keeper.last, c.keeper.exists); err != nil {
			return err
		}
		c.replanWork()
	}
}

// runOnce runs one pipeline, which copies to the current target.
func (c *copying) runOnce(ctx context.Context) error {
	p, err := newPipeline(ctx, c)
	if err != nil {
		return err
	}
	return p.run(ctx)
}

// The method begin prepares the copy to dst. The copy begins at the given checkpoint, or at the
// start of the disk if checkpoint is nil. The parameter stored is true if Options.Keep has stored
// the checkpoint, so that a later run of the program can continue there.
func (c *copying) begin(dst sink.Disk, checkpoint *Checkpoint, stored bool) (err error) {
	c.dst, c.zeroed, c.begun = dst, isZeroed(dst), false
	checkpoints := c.o.Keep != nil || c.o.Reopen != nil
	if checkpoint == nil {
		checkpoint = new(Checkpoint)
		if checkpoints {
			// The checkpoint gets the state that the sink has before the first write. If the
			// connection to the target is lost before a later checkpoint can be used,
			// Options.Reopen opens the target at offset 0 with this state. The state tells the sink
			// that the target may hold data already.
			if checkpoint.State, _, err = dst.Checkpoint(0); err != nil {
				return err
			}
			c.reopen.origin = checkpoint.State
		}
	}
	c.start = checkpoint.Offset
	if c.sums, err = checkpoint.sums(c.o); err == nil {
		c.begun = true
	}
	if checkpoints {
		c.keeper = newKeeper(c.o, dst, c.sums, checkpoint, stored)
	}
	return err
}

// The method unchanged returns an error if the source or the backing image has changed since the
// copy was planned.
func (c *copying) unchanged(ctx context.Context) error {
	now, err := identityOf(ctx, c.src)
	if err != nil {
		return err
	}
	if now != c.plan.identity {
		return fmt.Errorf("%w: its identity was %s and is now %s; copy from a snapshot, or stop the programs that write to the source", ErrSourceChanged, c.plan.identity, now)
	}
	return c.backing.unchanged(ctx)
}

// The method finish makes the target durable, and verifies it if Options.Verify is set. It reads
// places of the source again if the source is a source.Rereadable, or Options.Reread is set. Then
// it publishes the target, which gives it its final name, or suspends it if Options.Hold is set. It
// also fills in the result.
func (c *copying) finish(ctx context.Context, result *Result) error {
	c.o.Counters.Enter(progress.Finish)
	defer c.o.Counters.Background(progress.WaitTarget)()
	again := c.isRereadable()
	if c.keeper != nil && c.o.Keep != nil && (c.o.Verify || c.o.Hold || again) {
		// A checkpoint is taken before the target is read back, because reading it back takes long.
		// If a signal interrupts the reading, a later run continues at this checkpoint. With Hold,
		// a later run continues there if this process is killed before Whole has returned.
		if err := c.keeper.takeFinal(ctx); err != nil {
			return err
		}
	}
	if err := c.dst.Finish(ctx); err != nil {
		return err
	}
	c.finished = true
	result.Counts = c.o.Counters.Snapshot()
	if len(c.sums) > 0 {
		result.Digest = &report.Digest{Algorithm: string(c.sums[0].Algorithm()), Value: c.sums[0].Value()}
	}
	if c.o.Verify {
		after := int64(0) // bytes that are read again later
		if again {
			after = rereadBytes(c.plan.Size)
		}
		v := verifier{dst: c.dst, sums: c.sums, reader: c.reader(), stop: c.o.stop(), o: CompareOptions{
			RequestSize: c.o.RequestSize, Requests: c.o.Requests, Counters: c.o.Counters,
			account: newCheck(c.o.Counters, after),
		}}
		var err error
		if result.Verify, err = v.verify(ctx); err != nil {
			return err
		}
		c.o.Counters.Enter(progress.Finish)
		// The backing image is checked here because it may have changed while the target was read
		// back.
		if err := c.backing.unchanged(ctx); err != nil {
			return err
		}
	}
	if again {
		c.o.Counters.Enter(progress.Verify)
		var err error
		if result.Reread, err = c.reread(ctx); err != nil {
			return err
		}
		c.o.Counters.Enter(progress.Finish)
	}
	// The target is complete and lacks only its name, so Options.Stop is ignored from here on. The
	// method Publish also ignores the end of ctx, because a copy whose target has its final name
	// must not be reported as canceled.
	if err := context.Cause(ctx); err != nil {
		return err
	}
	if c.o.Hold {
		if err := c.dst.Suspend(); err != nil {
			return fmt.Errorf("cannot close the complete target: %w", err)
		}
	}
	if c.o.Whole != nil {
		c.o.Whole()
	}
	if c.o.Hold {
		killpoint.At("held")
		return nil
	}
	return c.dst.Publish(context.WithoutCancel(ctx))
}

// The method end closes the target of a copy that failed with the error err, and keeps or removes
// the target. The comment of Copy says when the target is kept. If the target is kept, the method
// stores a last checkpoint. If err is nil, the method does nothing.
func (c *copying) end(ctx context.Context, err error) error {
	if err == nil || isKept(err) {
		return err // the target is published, or the check that has failed has suspended it
	}
	if c.holds(err) {
		return suspend(c.dst, err)
	}
	if c.keeper == nil || c.o.Keep == nil || leavesNothing(err) {
		return abort(c.dst, err) // abort does not remove a file that has its final name already
	}
	existed := c.keeper.exists
	if !existed && !c.stopped(ctx) && !isTemporary(err, c.src) {
		return abort(c.dst, err)
	}
	kept := c.keeper.keepLast(ctx, c.begun && !c.finished)
	if !existed && kept == nil && c.keeper.last.Offset == 0 && isHopeless(err) {
		return abort(c.dst, err) // nothing was done that could be kept
	}
	if c.stopped(ctx) {
		err = c.stopCause(err)
	}
	if kept != nil {
		err = fmt.Errorf("%w (and no checkpoint can be stored, so a later run starts over: %w)", err, kept)
	}
	return &ResumableError{Err: suspend(c.dst, err), Offset: c.keeper.last.Offset}
}

// The method holds reports whether the target is kept after the error err although the source has
// changed. Options.Hold says when that is.
func (c *copying) holds(err error) bool {
	return c.o.Hold && c.o.Keep != nil && c.keeper != nil && c.keeper.exists && errors.Is(err, ErrSourceChanged)
}

// The method stopped reports whether the copy was asked to stop.
func (c *copying) stopped(ctx context.Context) bool {
	return ctx.Err() != nil || c.o.stop().Err() != nil
}

// stopCause is called with the error of a copy that was stopped. If err is a consequence of the end
// of the context Options.Stop, stopCause returns the cause of this end, such as a signal. In every
// other case it returns err.
func (c *copying) stopCause(err error) error {
	cause := context.Cause(c.o.stop())
	if cause != nil && (errors.Is(err, errStopped) || errors.Is(err, cause) || errors.As(err, new(*sourceError))) {
		return cause
	}
	return err
}
