package transfer

import (
	"context"
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
