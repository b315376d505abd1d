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
	"syscall"
	"time"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// Options tune a copy. The zero value is the default.
type Options struct {
	RequestSize int         // bytes read at once; 0: 1 MiB. Rounded up to the sink's unit
	Requests    int         // reads in flight; 0: 4
	Sparse      int64       // zeros of at least so many bytes become holes; 0: 4 KiB, or 64 KiB where the sink must work for a hole
	KeepZeros   bool        // zeros in data are written as they are, not looked for
	Backing     source.Disk // of an overlay; parts that the source calls Inherited are read here, when they share a unit with others
	// BackingIdentity is the Identity of Backing when it was opened; "": the copy
	// asks for it when it begins. What differs from the backing is all that an
	// overlay has, so a backing that changes meanwhile is an error.
	BackingIdentity string
	// ReopenBacking opens the file that has the name of the backing by then: whoever reads
	// the overlay gets that, and not the file that was open during the copy. It is
	// an error where that has another identity; nil: not looked at.
	ReopenBacking func(context.Context) (source.Disk, error)
	Reflink       Reflink            // whether blocks are shared with the source's file
	Digest        digest.Algorithm   // of the content, computed while copying; "": none
	Verify        bool               // read the target back before it is published
	Limit         *Limiter           // nil: none
	Counters      *progress.Counters // filled while copying; nil: not

	// Interrupt makes a Read of the stream that waits for data return. CopyStream
	// calls it, with the cause, when the copy has failed, since nothing may ever come
	// on the stream. CopyStream may call it after it has returned, too. If Interrupt
	// is nil, CopyStream waits for the Read.
	Interrupt func(cause error)

	// Stop, when it ends, makes the copy finish what is in flight and end with
	// its cause. It is for copies that can go on later; nil: never.
	Stop context.Context
	// Resume is where an earlier copy of the same stopped; nil: from the start.
	// The target must have been opened with its State and Offset.
	Resume *Checkpoint
	// Keep makes a checkpoint durable, which the target is by then. It is called
	// beside the further copy, one call at a time; nil: a failed copy can't go on.
	Keep func(Checkpoint) error
	// Whole is called when the target is whole and durable, before it gets its
	// final name; nil: not.
	Whole    func()
	Interval time.Duration // between checkpoints; 0: 5 s. One is also due every GiB
	// Reopen opens the target again after a sink.ErrLost, as Lost says; nil: not.
	Reopen func(ctx context.Context, state []byte, resume int64) (sink.Disk, error)
	Lost   source.RetryOptions
}

// stop is Stop, or what never ends.
func (o Options) stop() context.Context {
	if o.Stop != nil {
		return o.Stop
	}
	return context.Background()
}

const (
	defaultRequest  = 1 << 20
	defaultRequests = 4
	// Zeros are found in blocks of this size: the smallest that a file system
	// makes a hole of.
	defaultSparse = 4 << 10
	// A hole that costs a call of its own is worth it from here on.
	workedSparse = 64 << 10
)

func (o Options) normal(dst sink.Disk, zeroed bool) Options {
	if o.RequestSize == 0 {
		o.RequestSize = defaultRequest
	}
	unit := int(dst.Unit())
	o.RequestSize = (o.RequestSize + unit - 1) / unit * unit
	if o.Requests == 0 {
		o.Requests = defaultRequests
	}
	if o.Sparse == 0 {
		o.Sparse = defaultSparse
		if !zeroed {
			o.Sparse = workedSparse
		}
	}
	if o.Counters == nil {
		o.Counters = new(progress.Counters)
	}
	return o
}

// sums returns a Sum for each digest that the copy needs.
func (o Options) sums() []*digest.Sum {
	var sums []*digest.Sum
	if o.Digest != "" {
		sums = append(sums, digest.New(o.Digest))
	}
	if o.Verify && o.Digest != digest.Blksum {
		sums = append(sums, digest.New(digest.Blksum))
	}
	return sums
}

// Result is what a copy tells beside its counters.
type Result struct {
	Size   int64             // of the disk, bytes
	Counts progress.Snapshot // of the copy, when all was written: reading back counts on
	Digest *Digest           // the one that was asked for, else the one that Verify needed; nil: none
	Verify Verify
}

// ErrSourceChanged says that the source, or the backing of the target, is not what
// it was when it was planned or opened, so that the target may hold parts of two
// states. It is the only error of a copy that removes work which a checkpoint
// covers.
var ErrSourceChanged = source.ErrChanged

// changedBackingError is an ErrSourceChanged that concerns the backing.
type changedBackingError struct{ was, is string }

func (e *changedBackingError) Error() string {
	return fmt.Sprintf("the backing changed while the target was written: it was %s, it is %s; nothing may write to a backing file", e.was, e.is)
}

func (e *changedBackingError) Is(target error) bool { return target == ErrSourceChanged }

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

// unchanged returns an error where the source or the backing is not what it was
// when the copy was planned.
func (p *pipeline) unchanged(ctx context.Context) error {
	now, err := identity(ctx, p.src)
	if err != nil {
		return err
	}
	if now != p.plan.identity {
		return fmt.Errorf("%w: it was %s, it is %s; copy from a snapshot, or with its user stopped", ErrSourceChanged, p.plan.identity, now)
	}
	return p.o.backingUnchanged(ctx)
}

// identifyBacking notes what the backing is, unless the caller did.
func (o *Options) identifyBacking(ctx context.Context) (err error) {
	if o.Backing != nil && o.BackingIdentity == "" {
		o.BackingIdentity, err = identity(ctx, o.Backing)
	}
	return err
}

// backingUnchanged returns an error where the backing is not what it was.
func (o *Options) backingUnchanged(ctx context.Context) error {
	if o.Backing == nil {
		return nil
	}
	now, err := identity(ctx, o.Backing)
	if err == nil && now == o.BackingIdentity && o.ReopenBacking != nil {
		now, err = o.identityByName(ctx)
	}
	if err == nil && now != o.BackingIdentity {
		err = &changedBackingError{o.BackingIdentity, now}
	}
	return err
}

// identityByName returns the identity of the disk that has the backing's name now.
func (o *Options) identityByName(ctx context.Context) (string, error) {
	named, err := o.ReopenBacking(ctx)
	if err != nil {
		return "", fmt.Errorf("look at the backing again: %w", err)
	}
	defer named.Close()
	return identity(ctx, named)
}

// end ends the target of a copy that failed with err, if it did. It is the one
// place that decides whether the work is kept or removed: Copy documents the
// rule. A target that is kept gets the latest possible checkpoint.
func (p *pipeline) end(ctx context.Context, err error) error {
	if err == nil || errors.As(err, new(*MismatchError)) {
		return err // published, or suspended by verify
	}
	if p.keeper == nil || p.o.Keep == nil || nothingLeft(err) {
		return aborted(p.dst, err) // which removes no file that has its final name
	}
	existed := p.keeper.exists
	if !existed && !p.stopped(ctx) && !p.mayPass(err) {
		return aborted(p.dst, err)
	}
	kept := p.keepLast(ctx)
	if !existed && kept == nil && p.keeper.last.Offset == 0 && hopeless(err) {
		return aborted(p.dst, err) // nothing was done that could be kept
	}
	if p.stopped(ctx) {
		err = p.stopCause(err)
	}
	if kept != nil {
		err = fmt.Errorf("%w (and no checkpoint can be written, so that a later run starts over: %w)", err, kept)
	}
	if suspended := p.dst.Suspend(); suspended != nil && !errors.Is(suspended, sink.ErrClosed) {
		err = fmt.Errorf("%w (and closing the target: %w)", err, suspended)
	}
	return &ResumableError{Err: err, Offset: p.keeper.last.Offset}
}

// nothingLeft says whether err leaves nothing that a later run could go on with.
func nothingLeft(err error) bool {
	return errors.Is(err, ErrSourceChanged) || errors.Is(err, sink.ErrElsewhere) || errors.Is(err, sink.ErrUnsynced)
}

// keepLast writes a checkpoint of all that is done. A sink that is finished or
// has failed takes none: then the one before serves, or that of the beginning.
// It is an error where the journal holds no checkpoint afterwards.
func (p *pipeline) keepLast(ctx context.Context) error {
	if p.begun && !p.finished && p.keeper.final(ctx) == nil || p.keeper.exists {
		return nil
	}
	return p.keeper.store(*p.keeper.last)
}

// stopped says whether the copy was asked to stop.
func (p *pipeline) stopped(ctx context.Context) bool {
	return ctx.Err() != nil || p.o.stop().Err() != nil
}

// stopCause returns why the copy was asked to stop where err is only its
// consequence, else err.
func (p *pipeline) stopCause(err error) error {
	cause := context.Cause(p.o.stop())
	if cause != nil && (errors.Is(err, errStopped) || errors.Is(err, cause) || errors.As(err, new(*sourceError))) {
		return cause
	}
	return err
}

// mayPass says whether a later run may get over err, so that even a target
// without any checkpoint is worth keeping.
func (p *pipeline) mayPass(err error) bool {
	if errors.Is(err, sink.ErrLost) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return true
	}
	_, repeats := source.Ability[source.Counted](p.src)
	return repeats && errors.As(err, new(*sourceError))
}

// hopeless says whether a later run meets err again at the same place. It does not
// where a disk or a target that was open once can't be opened again.
func hopeless(err error) bool {
	return source.IsPermanent(err) && !errors.Is(err, source.ErrReopen) && !errors.Is(err, sink.ErrLost)
}

// aborted removes what was made for a copy that failed.
func aborted(dst sink.Disk, err error) error {
	if aborted := dst.Abort(); aborted != nil {
		return fmt.Errorf("%w (and cleaning up failed: %w)", err, aborted)
	}
	return err
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
		result.Digest = &Digest{string(p.sums[0].Algorithm()), p.sums[0].Value()}
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

func identity(ctx context.Context, d source.Disk) (string, error) {
	i, ok := source.Ability[source.Identified](d)
	if !ok {
		return "", nil
	}
	id, _, err := i.Identity(ctx)
	if err != nil {
		return "", fmt.Errorf("identify what is read: %w", err)
	}
	return id, nil
}
