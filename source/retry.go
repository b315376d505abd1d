package source

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"math/rand/v2"
	"os"
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

type openedDisk struct {
	Disk
	forget    context.CancelCauseFunc // ends its context
	id, proof string
}

func (d *openedDisk) Close() error {
	defer d.forget(os.ErrClosed)
	return d.Disk.Close()
}

// reopening is one for all calls that wait for it.
type reopening struct {
	done chan struct{}
	err  error // once done is closed
}

// openOnce opens the disk and asks for its identity. Close ends it, and so does
// the limit, where it is not 0.
func (r *retrying) openOnce(limit time.Duration) (*openedDisk, error) {
	ctx, cancel := context.WithCancelCause(r.ctx)
	stop := context.AfterFunc(r.closing, func() { cancel(os.ErrClosed) })
	defer stop()
	if limit > 0 {
		late := time.AfterFunc(limit, func() { cancel(errNoAnswer) })
		defer late.Stop()
	}
	d, err := r.open(ctx)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	o := &openedDisk{Disk: d, forget: cancel}
	if i, ok := Ability[Identified](d); ok {
		if o.id, o.proof, err = i.Identity(ctx); err != nil {
			o.Close()
			return nil, err
		}
	}
	if ctx.Err() != nil { // it was opened when it was too late
		o.Close()
		return nil, context.Cause(ctx)
	}
	return o, nil
}

// current returns the disk, after it was opened again where that has to be. It
// waits as long as the call has patience.
func (r *retrying) current(a *attempts) (d *openedDisk, generation int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if err := r.endedLocked(a.ctx); err != nil {
			return nil, 0, err
		}
		if r.disk != nil {
			return r.disk, r.generation, nil
		}
		if r.reopening == nil {
			r.startReopening(nil)
		}
		f := r.reopening
		r.mu.Unlock()
		patience, late := time.NewTimer(r.o.Patience()-a.idle()), false
		select {
		case <-f.done:
			err = f.err
		case <-patience.C:
			late = true
		case <-a.ctx.Done():
		case <-r.ctx.Done():
		}
		patience.Stop()
		r.mu.Lock()
		if late {
			err = r.lastErr
			if err == nil {
				err = fmt.Errorf("%w: %w", ErrReopen, errNoAnswer)
			}
		}
		if err != nil {
			return nil, 0, err
		}
	}
}

// discard has the disk opened again, unless another call did that already.
func (r *retrying) discard(generation int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.disk == nil || r.generation != generation {
		return
	}
	old := r.disk
	if old == r.first && r.inFile {
		old = nil // Close closes it
	}
	r.disk = nil
	r.startReopening(old)
}

// abandon gives the disk up, so that the next call opens it again.
func (r *retrying) abandon(generation int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.disk == nil || r.generation != generation {
		return
	}
	if r.disk != r.first || !r.inFile {
		r.abandoned = r.disk
	}
	r.disk = nil
}

// leave is called when a call with the disk of the generation gave up.
func (r *retrying) leave(generation int) {
	if !r.o.Revive || generation == 0 {
		return
	}
	r.mu.Lock()
	d := r.disk
	r.mu.Unlock()
	if d == nil {
		return
	}
	if e, ok := Ability[Ender](d.Disk); ok && e.Ended() != nil {
		r.abandon(generation)
	}
}

// Ended implements Ender.
func (r *retrying) Ended() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dead
}

// startReopening is called with mu held, before Close.
func (r *retrying) startReopening(old *openedDisk) {
	if old == nil {
		old, r.abandoned = r.abandoned, nil
	}
	if r.failures == 0 {
		r.lostAt = time.Now()
	}
	r.reopening = &reopening{done: make(chan struct{})}
	r.work.Add(1)
	go r.reopen(r.reopening, old, r.pauseLocked(), r.lastErr)
}

// pauseLocked is how long to wait before the disk is opened again: not at all the
// first time, and else less what has passed since the last attempt. The caller
// holds mu.
func (r *retrying) pauseLocked() time.Duration {
	if r.failures == 0 {
		return 0
	}
	n := r.failures + 2 // 1 and 2 were before the first reopening
	lastRead := r.started.Add(time.Duration(r.lastRead.Load()))
	if r.lostAt.After(lastRead) {
		lastRead = r.lostAt
	}
	pause, ok := r.o.Wait(n, time.Since(lastRead))
	if !ok {
		pause = r.o.Delay(n) // whoever began before has given up by then
	}
	return max(pause-time.Since(r.failedAt), 0)
}

// reopen closes old first, where there is one, since the host may count
// connections. It runs beside the calls that wait for it, because any of them
// may be given up. A pause is what the failure before, lastErr, makes it wait.
func (r *retrying) reopen(f *reopening, old *openedDisk, pause time.Duration, lastErr error) {
	defer r.work.Done()
	defer close(f.done)
	if old != nil {
		old.Close() // an error of a disk that failed says nothing new
	}
	var d *openedDisk
	err := error(nil)
	if lastErr != nil {
		err = r.wait(r.ctx, lastErr, pause)
	}
	if err == nil {
		r.reopenings.Add(1)
		d, err = r.openOnce(r.o.Patience())
	}
	if err == nil {
		if err = r.same(d); err == nil && r.sampled {
			err = r.compare(d)
		}
		if err != nil {
			d.Close()
		}
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrReopen, err)
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	r.reopening, f.err = nil, err
	if err != nil {
		r.failures++
		r.lastErr, r.failedAt = err, time.Now()
		if errors.As(err, new(*permanentError)) && (!r.o.Revive || errors.Is(err, ErrChanged)) {
			r.dead = err
		}
		return
	}
	r.disk, r.failures, r.lastErr = d, 0, nil
	r.generation++
	if u, ok := Ability[Uncached](d.Disk); ok && r.uncached {
		u.ReadUncached()
	}
}

// same returns an error unless d is the disk that was opened first.
func (r *retrying) same(d *openedDisk) error {
	if d.Size() != r.Size() {
		return Changed(fmt.Errorf("it is another disk: it had %d bytes (identity %q) and has %d (identity %q)", r.Size(), r.first.id, d.Size(), d.id))
	}
	if d.id != r.first.id || d.proof != r.first.proof {
		return Changed(fmt.Errorf("it is another disk or was changed: its identity was %q (%s) and is %q (%s)", r.first.id, r.first.proof, d.id, d.proof))
	}
	return nil
}

// compare returns an error unless d holds what was read before. Close ends it, and
// so does the patience.
func (r *retrying) compare(d *openedDisk) error {
	stop := context.AfterFunc(r.closing, func() { d.forget(os.ErrClosed) })
	defer stop()
	late := time.AfterFunc(r.o.Patience(), func() { d.forget(errNoAnswer) })
	defer late.Stop()
	return r.samples.Check(func(p []byte, off int64) (goOn bool, err error) {
		_, err = readFull(d.Disk, p, off)
		return true, err
	})
}

// wait waits before a retry, which err is the reason of.
func (r *retrying) wait(ctx context.Context, err error, d time.Duration) error {
	if r.o.OnRetry != nil {
		r.o.OnRetry(err, d)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	case <-r.closing.Done():
		return os.ErrClosed
	}
}

// endedLocked returns why no call can be made any more, or not under ctx. The
// caller holds mu.
func (r *retrying) endedLocked(ctx context.Context) error {
	switch {
	case r.ctx.Err() != nil:
		return context.Cause(r.ctx)
	case r.closed:
		return os.ErrClosed
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return r.dead
}

// begin makes Close wait until work.Done.
func (r *retrying) begin() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.endedLocked(r.ctx); err != nil {
		return err
	}
	r.work.Add(1)
	return nil
}

// attempts are those of one call.
type attempts struct {
	r        *retrying
	ctx      context.Context
	failures int
	since    time.Duration // since r.started: when the call began, or was last known to get on
}

// attempt begins a call.
func (r *retrying) attempt(ctx context.Context) attempts {
	return attempts{r: r, ctx: ctx, since: time.Since(r.started)}
}

// idle is for how long there has been no progress that the call could hope from.
func (a *attempts) idle() time.Duration {
	return time.Since(a.r.started) - max(a.since, time.Duration(a.r.lastRead.Load()))
}

// gaveUp is the error of a call whose patience is over.
func (a *attempts) gaveUp(err error) error {
	return fmt.Errorf("given up after %v without a read that succeeded: %w", a.idle().Round(time.Second), err)
}

// errNoAnswer ends a disk that hangs for longer than the patience.
var errNoAnswer = errors.New("no answer")

// watch ends the disk d when a call to it, which is about to begin, takes longer
// than the patience and nothing else gets on either. Stop says that the call has
// returned.
func (a *attempts) watch(d *openedDisk, generation int) (stop func()) {
	var mu sync.Mutex // guards what follows
	var timer *time.Timer
	stopped := false
	look := func() {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return
		}
		if left := a.r.o.Patience() - a.idle(); left > 0 {
			timer.Reset(left)
			return
		}
		a.r.abandon(generation)
		d.forget(errNoAnswer)
	}
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(max(a.r.o.Patience()-a.idle(), 0), look)
	return func() {
		mu.Lock()
		defer mu.Unlock()
		stopped = true
		timer.Stop()
	}
}

// again is told of a failure with the disk of the generation, or with opening
// it (0). It waits and returns nil when the call is to be made once more, with
// the current disk.
func (a *attempts) again(generation int, err error) error {
	r := a.r
	r.mu.Lock()
	ended := r.endedLocked(a.ctx)
	replaced := generation != 0 && (r.disk == nil || r.generation != generation)
	r.mu.Unlock()
	switch {
	case ended != nil:
		return ended
	case replaced && a.idle() < r.o.Patience(): // under this call, which may be all that is wrong
		return nil
	case IsPermanent(err), r.o.Permanent != nil && r.o.Permanent(err):
		return err
	}
	a.failures++
	if r.o.Retries >= 0 && a.failures > r.o.Retries {
		r.leave(generation)
		if r.o.Retries == 0 {
			return err
		}
		return fmt.Errorf("given up after %d retries: %w", r.o.Retries, err)
	}
	wait, ok := r.o.Wait(a.failures, a.idle())
	if !ok {
		r.leave(generation)
		return a.gaveUp(err)
	}
	r.retries.Add(1)
	if generation == 0 {
		return nil // the next reopening waits
	}
	if err := r.wait(a.ctx, err, wait); err != nil {
		return err
	}
	if a.failures > 1 {
		r.discard(generation)
	}
	return nil
}

func (r *retrying) Size() int64 { return r.first.Size() }

func (r *retrying) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at negative offset %d", off)
	}
	if err := r.begin(); err != nil {
		return 0, err
	}
	defer r.work.Done()
	a := r.attempt(r.ctx)
	for {
		d, generation, err := r.current(&a)
		if err == nil {
			var n int
			stop := a.watch(d, generation)
			n, err = readFull(d.Disk, p, off)
			stop()
			if err == nil || err == io.EOF {
				r.lastRead.Store(int64(time.Since(r.started)))
				if r.sampled {
					r.samples.Add(p[:n], off)
				}
				return n, err
			}
		}
		if err := a.again(generation, err); err != nil {
			return 0, err
		}
	}
}

// readFull reads from d and takes an end that is not d's for an error.
func readFull(d Disk, p []byte, off int64) (int, error) {
	n, err := d.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return n, err
	}
	if want := min(int64(len(p)), max(d.Size()-off, 0)); int64(n) != want {
		return n, fmt.Errorf("read [%d, %d) of a disk of %d bytes: got %d bytes, want %d: %w", off, off+int64(len(p)), d.Size(), n, want, io.ErrUnexpectedEOF)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Extents goes on behind the last extent that was yielded.
func (r *retrying) Extents(ctx context.Context, off, length int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		end := off + length
		if off < 0 || length < 0 || end < off || end > r.Size() {
			yield(Extent{}, fmt.Errorf("extents [%d, %d) of a disk of %d bytes", off, end, r.Size()))
			return
		}
		a := r.attempt(ctx)
		for {
			d, generation, err := r.current(&a)
			if err == nil {
				stop := a.watch(d, generation)
				for e, extentsErr := range d.Extents(ctx, off, end-off) {
					stop()
					if err = extentsErr; err != nil {
						break
					}
					if !yield(e, nil) {
						return
					}
					off = e.End()
					a.failures, a.since = 0, time.Since(r.started)
					stop = a.watch(d, generation)
				}
				stop()
			}
			if err == nil {
				return
			}
			if err := a.again(generation, err); err != nil {
				yield(Extent{}, err)
				return
			}
		}
	}
}

// Identity is that of the disk now. A disk that is not Identified has an empty
// one that proves nothing.
func (r *retrying) Identity(ctx context.Context) (id, proof string, err error) {
	a := r.attempt(ctx)
	for {
		d, generation, err := r.current(&a)
		if err == nil {
			i, ok := Ability[Identified](d.Disk)
			if !ok {
				return "", "none", nil
			}
			stop := a.watch(d, generation)
			id, proof, err = i.Identity(ctx)
			stop()
			if err == nil {
				return id, proof, nil
			}
		}
		if err := a.again(generation, err); err != nil {
			return "", "", err
		}
	}
}

func (r *retrying) ReadUncached() {
	r.mu.Lock()
	r.uncached = true
	d := r.disk
	r.mu.Unlock()
	if d == nil {
		return // reopen passes it on to the disk that it opens
	}
	if u, ok := Ability[Uncached](d.Disk); ok {
		u.ReadUncached()
	}
}

func (r *retrying) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.disk != r.first {
		return nil, 0, 0, false
	}
	i, ok := Ability[InFile](r.first.Disk)
	if !ok {
		return nil, 0, 0, false
	}
	f, pos, n, ok = i.InFile(off)
	r.inFile = r.inFile || ok
	return f, pos, n, ok
}

// Stats are the disk's own, where it counts, and the retries.
func (r *retrying) Stats() Stats {
	var s Stats
	r.mu.Lock()
	d := r.disk
	if d == nil {
		d = r.first
	}
	r.mu.Unlock()
	if c, ok := Ability[Counted](d.Disk); ok {
		s = c.Stats()
	}
	s.Retries += r.retries.Load()
	s.Reopenings += r.reopenings.Load()
	return s
}

// Close ends waits and a reopening in progress, and waits for calls.
func (r *retrying) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return os.ErrClosed
	}
	r.closed = true
	r.mu.Unlock()
	r.startClosing()
	r.work.Wait()
	var err error
	if r.disk != nil {
		err = r.disk.Close()
	}
	if r.abandoned != nil {
		r.abandoned.Close() // an error of a disk that failed says nothing new
	}
	if r.disk != r.first && r.inFile {
		err = errors.Join(err, r.first.Close())
	}
	return err
}

type retryingInfo struct{ info Info }

func (i retryingInfo) Info() Info { return i.info }

type retryingBuffer struct{ r *retrying }

// Buffer is not among what Close waits for: it may wait for buffers that are
// freed only later. The disk below ends it.
func (b retryingBuffer) Buffer(ctx context.Context, n int) ([]byte, func(), error) {
	a := b.r.attempt(ctx)
	for {
		d, generation, err := b.r.current(&a)
		if err == nil {
			allocator, ok := Ability[Allocator](d.Disk)
			if !ok {
				return make([]byte, n), func() {}, nil
			}
			var p []byte
			var free func()
			if p, free, err = allocator.Buffer(ctx, n); err == nil {
				return p, free, nil
			}
			if a.failures == 0 {
				// Until now it may have waited for a buffer to be freed.
				a.since = time.Since(b.r.started)
			}
		}
		if err := a.again(generation, err); err != nil {
			return nil, nil, err
		}
	}
}
