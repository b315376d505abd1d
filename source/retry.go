package source

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
)

// RetryOptions say how long Retry goes on. The zero value never tries again.
type RetryOptions struct {
	// Retries is how often a call is tried again before its error is returned;
	// negative: without limit.
	Retries int
	// Timeout ends the retries of a call after so long without any read of the
	// disk that succeeded; 0 means 15 minutes.
	Timeout time.Duration
	// Permanent says of which errors a retry makes no sense, beside those of
	// IsPermanent; nil: no others.
	Permanent func(error) bool
	// Backoff is how long to wait before the n-th retry, from 1; nil: 1 s,
	// doubling to 60 s, less up to half of it by chance.
	Backoff func(n int) time.Duration
	// OnRetry is called, concurrently, before such a wait; nil: nothing is.
	OnRetry func(err error, wait time.Duration)
	// Revive makes a disk that was refused when it was opened again, or that is an
	// Ender and has ended, fail only the calls in progress: the next call opens it
	// again. It is for servers, whose clients come and go.
	Revive bool
	// Mutable says that others may change the disk while it is read, and that the
	// caller wants what it holds at the time. Without it, what was read before of a
	// disk whose content nothing proves is compared when it is opened again.
	Mutable bool
}

// Policy returns the part of o that says when a call is tried again.
func (o RetryOptions) Policy() retry.Policy {
	return retry.Policy{Retries: o.Retries, Timeout: o.Timeout, Permanent: o.Permanent, Backoff: o.Backoff, OnRetry: o.OnRetry}
}

// Permanent marks err as an error that every further attempt would meet again. The
// text of err does not change.
func Permanent(err error) error { return retry.Permanent(err) }

// IsPermanent reports whether err was marked with Permanent, or says that a file
// does not exist or that a permission is missing. The end of a context is not
// permanent by itself, because the timeout of a connection looks the same; Retry
// checks its own context.
func IsPermanent(err error) bool { return retry.IsPermanent(err) }

// ErrChanged says that a disk is not what it was when it was opened first: what
// was read before and what is read now may belong to two states of it. An error
// that only says that a disk could not be opened is never an ErrChanged.
var ErrChanged = errors.New("the source changed while it was copied")

// Changed marks an error as an ErrChanged that no retry helps against, and keeps
// its text.
func Changed(err error) error { return Permanent(&changedError{err}) }

type changedError struct{ error }

func (e *changedError) Unwrap() []error { return []error{e.error, ErrChanged} }

// ErrGone says that the state of the disk that was named no longer exists, for
// example because its snapshot was removed: the same address never opens it again.
var ErrGone = errors.New("the state of the disk that was named is gone")

// ErrReopen says that a disk which was open before could not be opened again.
// That may pass, also where the error is permanent: a password, a certificate or
// a server can be mended.
var ErrReopen = errors.New("open the source again")

// Retry opens a disk and returns one that repeats calls which fail. The first
// retry of a call is of the same disk; before the later ones the disk is closed
// and opened again, once for all calls that fail at the time. A disk that has
// another identity or size then is a permanent error, and so is one whose content
// is another, as far as RetryOptions.Mutable describes. The first opening is not
// repeated.
//
// The disk has the abilities of the opened one as far as they can outlive it:
// Allocator, Described, Identified and Uncached, InFile until it is opened
// again, and Writable: after that, Flush fails for good if anything that was
// written before had not been flushed. It is Counted.
func Retry(ctx context.Context, open func(context.Context) (Disk, error), o RetryOptions) (Disk, error) {
	r := &retrying{ctx: ctx, open: open, policy: o.Policy(), revive: o.Revive, progress: retry.NewProgress(), generation: 1}
	r.ending, r.end = context.WithCancelCause(ctx)
	first, err := r.openOnce(0)
	if err != nil {
		r.end(err)
		return nil, err
	}
	r.first, r.disk = first, first
	_, writable := Ability[Writable](first.Disk)
	if !o.Mutable && !o.Revive && !writable && !Proved(first.proof) {
		r.samples = new(Samples)
	}
	if writable {
		return &retryingWritable{Disk: r.able(), r: r}, nil
	}
	return r.able(), nil
}

// able returns r with those of its abilities that not every disk has.
func (r *retrying) able() Disk {
	_, allocates := Ability[Allocator](r.first.Disk)
	described, describes := Ability[Described](r.first.Disk)
	switch {
	case allocates && describes:
		return struct {
			*retrying
			retryingBuffer
			retryingInfo
		}{r, retryingBuffer{r}, retryingInfo{described.Info()}}
	case allocates:
		return struct {
			*retrying
			retryingBuffer
		}{r, retryingBuffer{r}}
	case describes:
		return struct {
			*retrying
			retryingInfo
		}{r, retryingInfo{described.Info()}}
	}
	return r
}

// Delay is Policy().Delay.
func (o RetryOptions) Delay(n int) time.Duration { p := o.Policy(); return p.Delay(n) }

// Patience is Policy().Patience.
func (o RetryOptions) Patience() time.Duration { p := o.Policy(); return p.Patience() }

// Wait is Policy().Wait.
func (o RetryOptions) Wait(n int, idle time.Duration) (wait time.Duration, ok bool) {
	p := o.Policy()
	return p.Wait(n, idle)
}

// retrying is the disk that Retry returns.
type retrying struct {
	ctx    context.Context
	open   func(context.Context) (Disk, error)
	policy retry.Policy
	revive bool // RetryOptions.Revive
	first  *openedDisk
	ending context.Context // ends with ctx, and when Close is called
	end    context.CancelCauseFunc

	progress            *retry.Progress // successful reads and writes
	retries, reopenings atomic.Int64
	samples             *Samples // nil if the content of the disk needs no comparison

	// work counts calls and the reopening in progress; Close waits for it. It is
	// added to under mu, and only before Close.
	work sync.WaitGroup

	mu         sync.Mutex
	closed     bool
	dead       error       // why no reopening can help, or nil
	disk       *openedDisk // nil while it is being opened again, and after that failed
	generation int         // counts the disks that were opened
	inFile     bool        // the first disk handed out its file, which must stay open until Close
	uncached   bool        // ReadUncached was called
	outage     outage
}

// outage describes the time since the last disk was lost.
type outage struct {
	reopening *reopening  // in progress, or nil
	abandoned *openedDisk // must be closed before the disk is opened again, or nil
	since     time.Time   // when the last disk was lost
	failures  int         // openings that failed since then
	lastErr   error       // of the last of these failures
	failedAt  time.Time   // when that was
}
