package source

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
)

// RetryOptions say how often and how long Retry repeats a call. The zero value never
// repeats one.
type RetryOptions struct {
	// Retries is how often a call is tried again before its error is returned. A
	// negative number means no limit.
	Retries int
	// Timeout ends the retries of a call after this time without a successful call of
	// the disk. 0 means 15 minutes.
	Timeout time.Duration
	// Permanent reports whether a retry is useless, for errors that IsPermanent does
	// not recognise. If it is nil, there are no such errors.
	Permanent func(error) bool
	// Backoff returns the delay before retry n, counted from 1. If it is nil, the delay
	// is 1 s, doubles with each retry up to 60 s, and is then shortened by a random
	// amount of up to half.
	Backoff func(n int) time.Duration
	// OnRetry is called before each wait, with the error that caused it. Calls may be
	// concurrent. It may be nil.
	OnRetry func(err error, wait time.Duration)
	// Revive is for servers, whose clients come and go. If the disk is an Ender and has
	// ended, or is refused when it is opened again, only the calls in progress fail;
	// the next call opens the disk again.
	Revive bool
	// Mutable says that others may change the disk while it is read, and that each read
	// is to return the content at that time. Otherwise, if the disk cannot prove that
	// its content is unchanged, some of the ranges that were read are compared when the
	// disk is opened again.
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

// ErrChanged says that a disk is no longer in the state in which it was first opened:
// data that was read earlier and data that is read now may belong to different states.
// An error that only says that a disk could not be opened never wraps ErrChanged.
var ErrChanged = errors.New("the source changed while it was copied")

// Changed makes err wrap ErrChanged and marks it with Permanent. The text of err does
// not change.
func Changed(err error) error { return Permanent(&changedError{err}) }

type changedError struct{ error }

func (e *changedError) Unwrap() []error { return []error{e.error, ErrChanged} }

// ErrGone says that the requested state of the disk no longer exists, for example
// because its snapshot was removed. Opening the same address again never succeeds.
var ErrGone = errors.New("the requested state of the disk (such as a snapshot) no longer exists")

// ErrReopen says that a disk which was open before could not be opened again. A later
// attempt may succeed even if the error is permanent, because an administrator can
// correct a password, a certificate or a server.
var ErrReopen = errors.New("cannot open the source again")

// Retry opens a disk and returns a Disk that repeats failed calls. The first retry of a
// call uses the same disk. Before later retries the disk is closed and opened again,
// once for all calls that failed in the meantime. If the disk then has another identity
// or size, or another content as far as RetryOptions.Mutable describes, the call fails
// with a permanent error. The first opening is not repeated.
//
// The returned Disk is Counted. It is Allocator, Described, Identified, Uncached and
// Writable if the opened disk is, and InFile until the disk is opened again. A Flush
// fails, with all later ones, if the disk was opened again after a write that had not
// been flushed.
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
		return &retryingWritable{Disk: r.withAbilities(), r: r}, nil
	}
	return r.withAbilities(), nil
}

// withAbilities returns r with the abilities that only some disks have.
func (r *retrying) withAbilities() Disk {
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
