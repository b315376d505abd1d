package transfer

import (
	"context"
	"time"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// Options tune a copy. The zero value has the default of every option.
type Options struct {
	// RequestSize is how many bytes are read at once; 0 means 1 MiB. It is rounded up to a
	// multiple of the sink's unit, such as a cluster.
	RequestSize int
	// Requests is how many reads are in progress at a time; 0 means 4.
	Requests int
	// Sparse is the shortest run of zeros, in bytes, that becomes a hole of the target; 0 means
	// the default. The default is 4 KiB, or 64 KiB for a target whose unwritten ranges do not
	// read as zeros.
	Sparse int64
	// If KeepZeros is true, the copy writes zeros that are stored as data in the source. If it is
	// false, the copy searches data for zeros and makes holes of them.
	KeepZeros bool

	// Backing is the backing image of the target, if the target is an overlay. The content of an
	// Inherited range of the source is in a parent image, and the target leaves such a range to
	// the backing image. But if the range shares a unit of the sink, such as a cluster, with other
	// ranges, the copy reads the content of the range from Backing and writes the whole unit.
	Backing source.Disk
	// BackingIdentity is the identity that Backing had when it was opened. If it is "", the copy
	// queries the identity at its own beginning. The target holds only differences from the backing
	// image, so a change of the backing image is an error.
	BackingIdentity string
	// ReopenBacking opens the file that now has the name of the backing image. Later readers of the
	// target use that file, so the copy fails if the identity of that file is not the identity of
	// Backing. If ReopenBacking is nil, the copy does not check the file.
	ReopenBacking func(context.Context) (source.Disk, error)

	// Reflink says whether the copy makes the target share blocks of the file system with the
	// file of the source: never, where possible, or always.
	Reflink Reflink
	// Digest is the algorithm of a digest of the content, which is computed during the
	// copy; "" means none.
	Digest digest.Algorithm
	// Verify reads the target back and compares it with the source, before the target gets its
	// final name.
	Verify bool
	// Limit limits the rate of reading; nil means no limit.
	Limit *Limiter
	// Counters are updated during the copy. They may be nil.
	Counters *progress.Counters

	// Interrupt must end a blocked Read of the stream, so that the Read returns. CopyStream
	// calls Interrupt, with the cause, when the copy has failed, because the stream may never
	// deliver more data. The call may even come after CopyStream has returned. If Interrupt is
	// nil, CopyStream waits for the Read.
	Interrupt func(cause error)

	// Stop is a context for stopping a copy in a state that can be resumed. When Stop ends, the
	// copy finishes the pieces in progress and returns the cause of the end. If Stop is nil,
	// only the end of the context of Copy stops the copy.
	Stop context.Context
	// Resume is the checkpoint at which an earlier copy of the same disk stopped, or nil to start
	// at the beginning of the disk. The target must have been opened with the State and the Offset
	// of this checkpoint.
	Resume *Checkpoint
	// Keep stores a checkpoint durably, so that a later run can continue there. The copy calls Keep
	// when the target is durable up to the checkpoint. While Keep runs, the copy continues, but it
	// does not call Keep again until Keep has returned. If Keep is nil, a failed copy cannot be
	// resumed.
	Keep func(Checkpoint) error
	// Whole is called when the target is complete and durable, before it gets its
	// final name. It may be nil.
	Whole func()
	// Hold makes the copy end with Suspend instead of Publish: the target is complete and durable,
	// but a file does not get its final name. Whole is called after Suspend. With Hold and Keep, a
	// failed copy with a checkpoint keeps the target and its checkpoints even if the source has
	// changed. Such an error is not a *ResumableError.
	Hold bool
	// Reread makes the copy read places of the source again when the target is complete, and compare
	// them with the target. The copy always does that if the source is a source.Rereadable.
	Reread bool
	// Interval is the time between two checkpoints; 0 means 5 s. A checkpoint is
	// also taken after each GiB of data.
	Interval time.Duration
	// Reopen opens the target again after the connection to the target was lost (the error
	// sink.ErrLost). state and resume are the State and the Offset of the checkpoint at which
	// the copy continues. The field Lost limits how often, and for how long, the copy calls
	// Reopen. If Reopen is nil, the copy fails when the connection is lost.
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
	// workedSparse is the smallest hole, in bytes, for which a call of ZeroAt pays off if unwritten
	// ranges of the target do not read as zeros.
	workedSparse = 64 << 10
)

// The method normal returns the options with their defaults filled in. The parameter zeroed says
// whether ranges of dst that are never written read as zeros.
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

// The method sums returns a new digest.Sum for each digest that the copy needs. If Verify is set,
// the last Sum in the slice computes a blksum, which is one kind of digest. The copy later compares
// this blksum of the source with the blksum of the target.
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
