package source

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
)

// RetryOptions say how often and how long Retry repeats a call. With the zero value,
// Retry never repeats a call.
type RetryOptions struct {
	// Retries is the number of times that a failed call is tried again before its error
	// is returned. A negative number means no limit.
	Retries int
	// Timeout limits the time without progress: a failed call is no longer tried again
	// when no call of the disk has succeeded for this long. 0 means 15 minutes.
	Timeout time.Duration
	// Permanent reports whether an error makes a retry useless. It is called only for
	// errors that IsPermanent does not recognise. If Permanent is nil, a call is
	// retried after each error that IsPermanent does not recognise.
	Permanent func(error) bool
	// Backoff returns the delay before retry n, counted from 1. If it is nil, the delay
	// is 1 s, doubles with each retry up to 60 s, and is then shortened by a random
	// amount of up to half.
	Backoff func(n int) time.Duration
	// OnRetry, if it is not nil, is called before each wait, with the error that made
	// the retry necessary. Several calls of OnRetry may run at the same time.
	OnRetry func(err error, wait time.Duration)
	// Revive is for programs that serve the disk to clients which come and go. A disk
	// can end while it is open, for example because another disk has taken its place
	// (see Ender), and an attempt to open it again can fail with a permanent error. In
	// both cases the calls in progress fail. With Revive, the next call opens the disk
	// again. Without Revive, all later calls fail too.
	Revive bool
	// Mutable says that other programs may change the disk while it is read, and that
	// each read should return the content that the disk has at the time of the read.
	//
	// Without Mutable, the content of the disk should stay the same. Some disks cannot
	// prove this. When such a disk is opened again, some ranges that were read before are
	// read again, and the content is compared. There is no such comparison if Revive is
	// set or the disk is Writable.
	Mutable bool
}

// Policy returns the options that package internal/retry needs: those that decide
// whether and when a call is tried again.
func (o RetryOptions) Policy() retry.Policy {
	return retry.Policy{Retries: o.Retries, Timeout: o.Timeout, Permanent: o.Permanent, Backoff: o.Backoff, OnRetry: o.OnRetry}
}

// Permanent marks err as an error that every further attempt would return too, so that
// the call is not tried again. The text of err does not change.
func Permanent(err error) error { return retry.Permanent(err) }

// IsPermanent reports whether err was marked with Permanent, or says that a file does
// not exist or that a permission is missing. The error of an ended context is not
// permanent, because a timeout of a connection returns the same error. Retry checks
// separately whether its own context has ended.
func IsPermanent(err error) bool { return retry.IsPermanent(err) }

// ErrChanged says that a disk is no longer in the state in which it was first opened:
// data that was read earlier and data that is read now may belong to different states.
// If a disk could not be opened, its state is not known, and the error does not wrap
// ErrChanged.
var ErrChanged = errors.New("the source changed while it was copied")

// Changed makes err wrap ErrChanged and marks it with Permanent. The text of err does
// not change.
func Changed(err error) error { return Permanent(&changedError{err}) }

type changedError struct{ error }

func (e *changedError) Unwrap() []error { return []error{e.error, ErrChanged} }

// ErrGone says that the requested state of the disk no longer exists, for example
// because its snapshot was removed. Opening the same address again never succeeds.
var ErrGone = errors.New("the requested state of the disk (such as a snapshot) no longer exists")

// ErrReopen says that a disk which was open before could not be opened again. Even if
// the error is marked as permanent, a later attempt may succeed, because an
// administrator can correct a password, a certificate or a server.
var ErrReopen = errors.New("cannot open the source again")

// Retry opens a disk and returns a Disk that repeats failed calls. If the disk cannot be
// opened at first, Retry returns the error. The first retry of a call uses the same
// opened disk. Before each later retry the disk is closed and opened again. Calls that
// fail at about the same time share one reopening.
//
// If the identity or the size differs after the disk was opened again, the failed calls
// return a permanent error. They also do so if Retry has compared the content with data
// that was read before (see RetryOptions.Mutable), and the two differ.
//
// The returned Disk has the ability Counted. It has Allocator, Described, Identified,
// Uncached and Writable if the opened disk has them. It has InFile only until the disk
// is opened again. If the disk is opened again after a write that was not flushed, the
// next Flush and all later ones fail.
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

// withAbilities returns r as a Disk that also has the abilities Allocator and Described,
// if the opened disk has them.
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

	// The field work counts the calls in progress, and also the goroutine that opens the
	// disk again, if it runs. Close waits for all of them. Its method Add is called with
	// mu locked, and not after Close was called.
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

// outage describes the time in which no disk is open. It begins when the open disk is
// lost: after an error, Retry closes the disk, or no longer uses it and lets a later call
// close it.
type outage struct {
	reopening *reopening  // in progress, or nil
	abandoned *openedDisk // must be closed before the disk is opened again, or nil
	since     time.Time   // when the last disk was lost
	failures  int         // openings that failed since then
	lastErr   error       // of the last of these failures
	failedAt  time.Time   // when that was
}
