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
// another identity or size then is a permanent error. The first opening is not
// repeated.
//
// The disk has the abilities of the opened one as far as they can outlive it:
// Allocator, Described, Identified and Uncached, InFile until it is opened
// again, and Writable: after that, Flush fails for good if anything that was
// written before had not been flushed. It is Counted.
func Retry(ctx context.Context, open func(context.Context) (Disk, error), o RetryOptions) (Disk, error) {
	r := &retrying{ctx: ctx, open: open, o: o, started: time.Now(), generation: 1}
	r.closing, r.startClosing = context.WithCancel(context.WithoutCancel(ctx))
	first, err := r.openOnce()
	if err != nil {
		return nil, err
	}
	r.first, r.disk = first, first
	if _, ok := Ability[Writable](first.Disk); ok {
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
	uncached            atomic.Bool

	// work counts reads and the reopening in progress, for Close to wait. It is
	// added to under mu, and only before Close.
	work sync.WaitGroup

	mu         sync.Mutex
	closed     bool
	dead       error       // what no reopening helps against
	disk       *openedDisk // nil: it is being opened again, or that failed
	generation int         // counts the disks
	inFile     bool        // the first disk handed out its file, which lives until Close
	reopening  *reopening  // in progress
	failures   int         // of reopenings, since the last that succeeded
	lastErr    error       // of the last of them
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

// openOnce opens the disk and asks for its identity. Close ends it.
func (r *retrying) openOnce() (*openedDisk, error) {
	ctx, cancel := context.WithCancelCause(r.ctx)
	stop := context.AfterFunc(r.closing, func() { cancel(os.ErrClosed) })
	defer stop()
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
	if u, ok := Ability[Uncached](d); ok && r.uncached.Load() {
		u.ReadUncached()
	}
	return o, nil
}

// current returns the disk, after it was opened again where that has to be.
func (r *retrying) current(ctx context.Context) (d *openedDisk, generation int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if err := r.endedLocked(ctx); err != nil {
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
		select {
		case <-f.done:
			err = f.err
		case <-ctx.Done():
		case <-r.ctx.Done():
		}
		r.mu.Lock()
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

// startReopening is called with mu held, before Close.
func (r *retrying) startReopening(old *openedDisk) {
	r.reopening = &reopening{done: make(chan struct{})}
	r.work.Add(1)
	go r.reopen(r.reopening, old, r.failures, r.lastErr)
}

// reopen closes old first, where there is one, since the host may count
// connections. It runs beside the calls that wait for it, because any of them
// may be given up. The failures before it, the last with lastErr, make it wait.
func (r *retrying) reopen(f *reopening, old *openedDisk, failures int, lastErr error) {
	defer r.work.Done()
	defer close(f.done)
	if old != nil {
		old.Close() // an error of a disk that failed says nothing new
	}
	var d *openedDisk
	err := error(nil)
	if failures > 0 {
		err = r.wait(r.ctx, lastErr, failures+2) // 1 and 2 were before the first
	}
	if err == nil {
		r.reopenings.Add(1)
		d, err = r.openOnce()
	}
	if err == nil {
		if err = r.same(d); err != nil {
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
		r.lastErr = err
		if errors.As(err, new(*permanentError)) {
			r.dead = err
		}
		return
	}
	r.disk, r.failures = d, 0
	r.generation++
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

// wait waits before the n-th retry, which err is the reason of.
func (r *retrying) wait(ctx context.Context, err error, n int) error {
	d := r.o.Delay(n)
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
	since    time.Duration // since r.started, of the first failure
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
	case replaced: // under this call, which may be all that is wrong
		return nil
	case IsPermanent(err), r.o.Permanent != nil && r.o.Permanent(err):
		return err
	}
	now := time.Since(r.started)
	if a.failures++; a.failures == 1 {
		a.since = now
	}
	if r.o.Retries >= 0 && a.failures > r.o.Retries {
		if r.o.Retries == 0 {
			return err
		}
		return fmt.Errorf("given up after %d retries: %w", r.o.Retries, err)
	}
	if idle := now - max(a.since, time.Duration(r.lastRead.Load())); idle >= r.o.Patience() {
		return fmt.Errorf("given up after %v without a read that succeeded: %w", idle.Round(time.Second), err)
	}
	r.retries.Add(1)
	if generation == 0 {
		return nil // the next reopening waits
	}
	if err := r.wait(a.ctx, err, a.failures); err != nil {
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
	a := attempts{r: r, ctx: r.ctx}
	for {
		d, generation, err := r.current(r.ctx)
		if err == nil {
			var n int
			if n, err = readFull(d.Disk, p, off); err == nil || err == io.EOF {
				r.lastRead.Store(int64(time.Since(r.started)))
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
		a := attempts{r: r, ctx: ctx}
		for {
			d, generation, err := r.current(ctx)
			if err == nil {
				for e, extentsErr := range d.Extents(ctx, off, end-off) {
					if err = extentsErr; err != nil {
						break
					}
					if !yield(e, nil) {
						return
					}
					off = e.End()
					a.failures = 0
				}
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
	a := attempts{r: r, ctx: ctx}
	for {
		d, generation, err := r.current(ctx)
		if err == nil {
			i, ok := Ability[Identified](d.Disk)
			if !ok {
				return "", "none", nil
			}
			if id, proof, err = i.Identity(ctx); err == nil {
				return id, proof, nil
			}
		}
		if err := a.again(generation, err); err != nil {
			return "", "", err
		}
	}
}

func (r *retrying) ReadUncached() {
	r.uncached.Store(true)
	r.mu.Lock()
	d := r.disk
	r.mu.Unlock()
	if d == nil {
		return // it is called when it is open
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
	a := attempts{r: b.r, ctx: ctx}
	for {
		d, generation, err := b.r.current(ctx)
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
		}
		if err := a.again(generation, err); err != nil {
			return nil, nil, err
		}
	}
}
