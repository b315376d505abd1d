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

	"vddkcp/sink"
	"vddkcp/source"
	"vddkcp/transfer/digest"
	"vddkcp/transfer/progress"
)

// Options tune a copy. The zero value is the default.
type Options struct {
	RequestSize int                // bytes read at once; 0: 1 MiB. Rounded up to the sink's unit
	Requests    int                // reads in flight; 0: 4
	Sparse      int64              // zeros of at least so many bytes become holes; 0: 4 KiB, or 64 KiB where the sink must work for a hole
	KeepZeros   bool               // zeros in data are written as they are, not looked for
	Backing     source.Disk        // where the parts that the source calls Same are read, when they share a unit with others
	Reflink     Reflink            // whether blocks are shared with the source's file
	Digest      digest.Algorithm   // of the content, computed while copying; "": none
	Verify      bool               // read the target back before it is published
	Limit       *Limiter           // nil: none
	Counters    *progress.Counters // filled while copying; nil: not
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

// ErrSourceChanged says that the source is not what it was when it was
// planned, so that the target may hold parts of both.
var ErrSourceChanged = errors.New("the source changed while it was copied")

// Copy fills dst with all of src, makes it durable and publishes it. Plan is
// NewPlan's for src. On any error, the end of ctx among them, dst is aborted:
// what was made for it is removed; but after a *MismatchError it is kept.
func Copy(ctx context.Context, src source.Disk, dst sink.Disk, plan *Plan, o Options) (result Result, err error) {
	defer abortFailed(dst, &err)
	result.Size = src.Size()
	if plan.Size != src.Size() {
		return result, fmt.Errorf("the plan is for %d bytes, the source has %d", plan.Size, src.Size())
	}
	zeroed := isZeroed(dst)
	o = o.normal(dst, zeroed)
	// What is not known yet counts as work until it shows to be none.
	rest := plan.Size - plan.Known
	if zeroed {
		o.Counters.AddPlanned(plan.Data + rest)
		o.Counters.AddSkipped(plan.Zero + plan.Same)
	} else {
		o.Counters.AddPlanned(plan.Data + plan.Zero + rest)
		o.Counters.AddSkipped(plan.Same)
	}
	o.Counters.Enter(progress.Copy)
	p := newPipeline(src, dst, plan, o, zeroed)
	if err := p.run(ctx); err != nil {
		return result, err
	}
	now, err := identity(ctx, src)
	if err != nil {
		return result, err
	}
	if now != plan.identity {
		return result, fmt.Errorf("%w: it was %s, it is %s; copy from a snapshot, or with its user stopped", ErrSourceChanged, plan.identity, now)
	}
	return result, p.finish(ctx, &result)
}

// abortFailed is deferred by what ends with finish: where there is an error it
// removes what was made.
func abortFailed(dst sink.Disk, err *error) {
	if *err == nil {
		return
	}
	if aborted := dst.Abort(); aborted != nil {
		*err = fmt.Errorf("%w (and cleaning up failed: %w)", *err, aborted)
	}
}

// finish makes the target durable, gives it its name, and tells the digests.
func (p *pipeline) finish(ctx context.Context, result *Result) error {
	p.o.Counters.Enter(progress.Finish)
	if err := p.dst.Finish(ctx); err != nil {
		return err
	}
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
	}
	// From the rename on the copy is complete: a signal that comes between
	// must not report as stopped what has its final name.
	if err := context.Cause(ctx); err != nil {
		return err
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
		return "", fmt.Errorf("identify the source: %w", err)
	}
	return id, nil
}
