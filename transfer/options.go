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
	// RequestSize is how many bytes are read at once; 0 means 1 MiB. It is rounded
	// up to a multiple of the sink's unit.
	RequestSize int
	// Requests is how many reads are in progress at a time; 0 means 4.
	Requests int
	// Sparse is the shortest run of zeros, in bytes, that becomes a hole of the target;
	// 0 means 4 KiB, or 64 KiB if the sink must zero holes.
	Sparse int64
	// KeepZeros writes the zeros in data as they are instead of searching for them.
	KeepZeros bool

	// Backing is the backing image of the target, if the target is an overlay. Inherited
	// ranges are read from it if they share a unit of the sink with other ranges.
	Backing source.Disk
	// BackingIdentity is the identity of Backing when it was opened; if it is "",
	// the copy queries it when it begins. The target holds only differences from
	// the backing image, so a change of the backing image is an error.
	BackingIdentity string
	// ReopenBacking opens the file that now has the name of the backing image. Later
	// readers of the target use that file, so it is an error if it has another
	// identity. If ReopenBacking is nil, the copy does not check the file.
	ReopenBacking func(context.Context) (source.Disk, error)

	// Reflink says whether the target shares blocks with the file of the source.
	Reflink Reflink
	// Digest is the algorithm of a digest of the content, which is computed during the
	// copy; "" means none.
	Digest digest.Algorithm
	// Verify reads the target back before it is published.
	Verify bool
	// Limit limits the rate of reading; nil means no limit.
	Limit *Limiter
	// Counters are updated during the copy. They may be nil.
	Counters *progress.Counters

	// Interrupt makes a Read of the stream that waits for data return. CopyStream
	// calls it, with the cause, when the copy has failed, because no more data may
	// ever arrive. CopyStream may call it after it has returned, too. If Interrupt
	// is nil, CopyStream waits for the Read.
	Interrupt func(cause error)

	// Stop is a context that stops a copy which can be resumed. When Stop ends, the copy
	// finishes the pieces in progress and returns the cause of the end. If Stop is nil, only
	// the end of the context of Copy stops the copy.
	Stop context.Context
	// Resume is the checkpoint at which an earlier copy of the same disk stopped;
	// nil means none. The target must have been opened with its State and Offset.
	Resume *Checkpoint
	// Keep stores a checkpoint durably. The target is durable up to the checkpoint
	// when Keep is called. Calls are made one at a time while the copy continues. If Keep
	// is nil, a failed copy cannot be resumed.
	Keep func(Checkpoint) error
	// Whole is called when the target is complete and durable, before it gets its
	// final name. It may be nil.
	Whole func()
	// Interval is the time between two checkpoints; 0 means 5 s. A checkpoint is
	// also taken after each GiB of data.
	Interval time.Duration
	// Reopen opens the target again after a sink.ErrLost. Lost says how often and how long
	// this is tried. If Reopen is nil, a lost target is an error.
	Reopen func(ctx context.Context, state []byte, resume int64) (sink.Disk, error)
	Lost   source.RetryOptions
}

// stop returns Options.Stop, or a context that never ends if Options.Stop is nil.
func (o Options) stop() context.Context {
	if o.Stop != nil {
		return o.Stop
	}
	return context.Background()
}

const (
	defaultRequest  = 1 << 20
	defaultRequests = 4
	// defaultSparse is the smallest hole, in bytes, that common file systems can make.
	defaultSparse = 4 << 10
	// workedSparse is the smallest hole, in bytes, that is worth a call of ZeroAt to a
	// sink that must zero holes.
	workedSparse = 64 << 10
)

// normal returns the options with their defaults filled in. zeroed says whether
// unwritten ranges of dst already read as zeros.
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

// sums returns a new digest.Sum for each digest that the copy needs. The last one is
// a blksum if Verify is set.
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
