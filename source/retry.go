package source

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"
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

// Permanent marks an error as one that comes again however often the call is
// repeated.
func Permanent(err error) error { return &permanentError{err} }

type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }

func (e *permanentError) Unwrap() error { return e.err }

// IsPermanent reports whether err is marked by Permanent, or is of a kind that
// comes again: no such file, no permission. The end of a context is none by
// itself, since timeouts of a connection look like it; Retry sees the end of its
// own.
func IsPermanent(err error) bool {
	var marked *permanentError
	return errors.As(err, &marked) ||
		errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
}

// ErrChanged says that a disk is not what it was when it was opened first: what
// was read before and what is read now may belong to two states of it. An error
// that only says that a disk could not be opened is never an ErrChanged.
var ErrChanged = errors.New("the source changed while it was copied")

// Changed marks an error as an ErrChanged that no retry helps against, and keeps
// its text.
func Changed(err error) error { return Permanent(&changedError{err}) }

type changedError struct{ error }

func (e *changedError) Unwrap() []error { return []error{e.error, ErrChanged} }

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
	r := &retrying{ctx: ctx, open: open, o: o, started: time.Now(), generation: 1}
	r.closing, r.startClosing = context.WithCancel(context.WithoutCancel(ctx))
	first, err := r.openOnce(0)
	if err != nil {
		return nil, err
	}
	r.first, r.disk = first, first
	_, writable := Ability[Writable](first.Disk)
	r.sampled = !o.Mutable && !o.Revive && !writable && !Proved(first.proof)
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

// Delay is how long to wait before the n-th retry, from 1.
func (o RetryOptions) Delay(n int) time.Duration {
	if o.Backoff != nil {
		return o.Backoff(n)
	}
	d := time.Minute
	if n < 7 {
		d = time.Second << (n - 1)
	}
	return d - rand.N(d/2)
}

// Patience is after how long without progress a call is given up.
func (o RetryOptions) Patience() time.Duration { return cmp.Or(o.Timeout, 15*time.Minute) }

// leastAttempt is how long an attempt must be able to take to be worth a wait.
const leastAttempt = 250 * time.Millisecond

// Wait is how long to wait before the n-th retry of a call that has had no
// progress for idle. It leaves an attempt a part of the rest of the patience; ok
// is false where the patience is over.
func (o RetryOptions) Wait(n int, idle time.Duration) (wait time.Duration, ok bool) {
	left := o.Patience() - idle
	if left < min(leastAttempt, o.Patience()/20) {
		return 0, false
	}
	return min(o.Delay(n), left/4*3), true
}

// retrying is the disk that Retry returns.
type retrying struct {
	ctx          context.Context
	open         func(context.Context) (Disk, error)
	o            RetryOptions
	started      time.Time
	first        *openedDisk
	closing      context.Context // ends when Close is called
	startClosing context.CancelFunc

	lastRead            atomic.Int64 // when a read succeeded last, in ns since started
	retries, reopenings atomic.Int64

	sampled bool // nothing else proves that the content is the same
	samples Samples

	// work counts reads and the reopening in progress, for Close to wait. It is
	// added to under mu, and only before Close.
	work sync.WaitGroup

	mu         sync.Mutex
	closed     bool
	dead       error       // what no reopening helps against
	disk       *openedDisk // nil: it is being opened again, or that failed
	generation int         // counts the disks
	inFile     bool        // the first disk handed out its file, which lives until Close
	uncached   bool        // ReadUncached was called
	reopening  *reopening  // in progress
	abandoned  *openedDisk // to be closed before it is opened again; nil: none
	lostAt     time.Time   // when the last disk was lost
	failures   int         // of reopenings, since the last that succeeded
	lastErr    error       // of the last of them, which was at failedAt
	failedAt   time.Time
}
