package vddk

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// maxClose is how long a worker that only read has to close the disk: longer
// than a host takes, and not as long as it may hang.
const maxClose = 20 * time.Second

// handle is one connection of the disk: a session, and the next one when that
// is lost.
type handle struct {
	free   func()        // gives its share of the budget back
	retire chan struct{} // closed: it is not needed any more

	// Guarded by Disk.mu.
	session  *session // nil: it is being opened
	retiring bool
	inFlight int       // requests with the library
	waiting  int       // for their turn
	turn     sync.Cond // a request ended, or the session did
	failures int       // losses and failed openings in a row, without a request that succeeded
	since    time.Time // of the first of them
}

func newHandle(d *Disk, free func()) *handle {
	return &handle{free: free, retire: make(chan struct{}), turn: sync.Cond{L: &d.mu}}
}

// run keeps the handle open until the disk is closed, its context ends, or the
// handle is retired or given up.
func (d *Disk) run(h *handle, s *session) {
	defer d.background.Done()
	defer h.free()
	for s != nil {
		select {
		case <-s.proc.Done():
		case <-h.retire:
			d.debug("datapath", "one connection less")
			d.finish(h, s)
			return
		case <-d.ending.Done():
			d.finish(h, s)
			return
		}
		d.lose(h, s, d.rangeOf("idle time of", 0, 0), time.Now())
		s = d.replace(h, s)
	}
}

// finish closes a session that nothing uses any more; a worker that does not
// end in time is killed, and with the context it is killed at once.
func (d *Disk) finish(h *handle, s *session) {
	timeout := d.o.Timeout
	if !d.o.Writable {
		timeout = min(timeout, maxClose)
	}
	ctx, cancel := context.WithTimeout(d.ctx, timeout)
	defer cancel()
	err := s.proc.Close(ctx)
	s.proc.Kill()
	if err != nil {
		d.debug("", "closing a worker failed", "error", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err != nil {
		d.closeErr = errors.Join(d.closeErr, err)
		d.messy = true
	}
	h.session = nil
	d.endedLocked(s)
}

// lose notes, once, that a session is gone, so that nothing is asked of it any
// more. Its process may have to be waited for still. Since is when the request
// was made that noticed it.
func (d *Disk) lose(h *handle, s *session, op string, since time.Time) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if s.lost {
		return
	}
	s.lost = true
	d.messy = true
	d.o.Registry.doubt(&d.params)
	if h.session == s {
		h.session = nil
	}
	h.failedLocked(since)
	d.lastLoss = s.gone(op)
	if d.written > d.flushed && d.flushErr == nil {
		d.flushErr = fmt.Errorf("%s: what was written before and not flushed is lost: %w: %w", d.params.File, errIO, d.lastLoss)
	}
	h.turn.Broadcast()
	d.changed.Broadcast()
}

// replace opens the disk again in place of a lost session. It returns nil when
// the handle is given up, or the disk is closed.
func (d *Disk) replace(h *handle, old *session) *session {
	<-old.proc.Done()
	d.mu.Lock()
	d.endedLocked(old)
	err := d.lastLoss
	d.mu.Unlock()
	for {
		if !d.goOn(h, err) {
			return nil
		}
		d.restarts.Add(1)
		d.mu.Lock()
		// At first a lost worker's buffers may still be on the host.
		shrink := h.failures > 3
		since := h.since
		d.mu.Unlock()
		var s *session
		if s, err = d.openAgain(shrink, since); err == nil {
			d.mu.Lock()
			h.session = s
			d.addSlotsLocked(h, s)
			d.changed.Broadcast()
			changed := d.usesLocked(s.opened.Transport)
			d.mu.Unlock()
			d.warnTransport(changed)
			return s
		}
		if !errors.Is(err, source.ErrChanged) {
			err = &reopeningError{err}
		}
		d.mu.Lock()
		h.failedLocked(time.Now())
		d.mu.Unlock()
	}
}

// openAgain opens a session in place of one that was lost at a time, and takes no
// longer than the patience lasts.
func (d *Disk) openAgain(shrink bool, since time.Time) (*session, error) {
	limit := d.timeout(5*d.o.Timeout, since)
	ctx, cancel := context.WithTimeoutCause(d.ending, limit, fmt.Errorf("no answer within %v", limit.Round(time.Millisecond)))
	defer cancel()
	return d.openSession(ctx, true, shrink)
}

// failedLocked counts a failure. The first one may be of something that made no
// progress since an earlier time.
func (h *handle) failedLocked(since time.Time) {
	if h.failures++; h.failures == 1 {
		h.since = since
	}
}

// goOn waits before a handle is opened again, which err is the reason of. It
// says false when there is no sense in that.
func (d *Disk) goOn(h *handle, err error) bool {
	d.mu.Lock()
	n := h.failures
	others := 0
	for _, o := range d.handles {
		if o != h && o.session != nil {
			others++
		}
	}
	gaveUp := d.gaveUp(err, n, h.since)
	switch {
	case d.ending.Err() != nil || h.retiring || d.dead != nil:
		d.removeLocked(h)
		d.mu.Unlock()
		return false
	case gaveUp == nil && (others == 0 || n <= 3):
	case others > 0 && !errors.Is(err, source.ErrChanged):
		// The host may have a limit that it did not have before. The others
		// do the work.
		d.removeLocked(h)
		if d.tuner != nil {
			d.tuner.Failed(others)
		}
		d.mu.Unlock()
		d.warn(fmt.Sprintf("%s: a connection was lost and can't be had again; reading goes on with %d: %v", d.params.File, others, err))
		return false
	default:
		d.dead = gaveUp
		d.removeLocked(h)
		for _, o := range d.handles {
			o.turn.Broadcast()
		}
		d.changed.Broadcast()
		d.mu.Unlock()
		return false
	}
	idle := d.idle(h.since)
	d.mu.Unlock()
	wait := time.Duration(0)
	if n > 1 { // the first time at once: the host did nothing wrong
		wait, _ = d.o.Retry.Wait(n-1, idle)
	}
	if d.o.Retry.OnRetry != nil {
		d.o.Retry.OnRetry(err, wait)
	}
	if sleep(d.ending, h.retire, wait) {
		return true
	}
	d.mu.Lock()
	d.removeLocked(h)
	d.mu.Unlock()
	return false
}

// gaveUp returns the error with which to give up after n failures in a row,
// the first one at since and the last one err, or nil.
func (d *Disk) gaveUp(err error, n int, since time.Time) error {
	r, idle := &d.o.Retry, d.idle(since)
	_, patient := r.Wait(n, idle)
	switch {
	case source.IsPermanent(err), isRefusedLogin(err), r.Permanent != nil && r.Permanent(err), r.Retries == 0:
		return err
	case r.Retries > 0 && n > r.Retries:
		return fmt.Errorf("given up after %d retries: %w", r.Retries, err)
	case !patient:
		return fmt.Errorf("given up after %v without a read that succeeded: %w", idle.Round(time.Second), err)
	}
	return nil
}

// idle is how long there has been no request that succeeded, at most since a time.
func (d *Disk) idle(since time.Time) time.Duration {
	if last := d.started.Add(time.Duration(d.lastSuccess.Load())); last.After(since) {
		since = last
	}
	return time.Since(since)
}

// timeout is how long one attempt may take of what has made no progress since a
// time: no longer than the patience lasts.
func (d *Disk) timeout(most time.Duration, since time.Time) time.Duration {
	return min(most, max(d.o.Retry.Patience()-d.idle(since), time.Millisecond))
}

// sleep waits, and says whether it was for so long.
func sleep(ctx context.Context, stop <-chan struct{}, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
	case <-stop:
	}
	return false
}

// removeLocked takes a handle out of the pool. The caller holds mu.
func (d *Disk) removeLocked(h *handle) {
	for i, o := range d.handles {
		if o == h {
			d.handles = append(d.handles[:i:i], d.handles[i+1:]...)
			break
		}
	}
	d.changed.Broadcast()
}

// slotRef is where memory that was handed out belongs.
type slotRef struct {
	h    *handle
	s    *session
	slot int
}

// addSlotsLocked makes the memory of a session known. The caller holds mu.
func (d *Disk) addSlotsLocked(h *handle, s *session) {
	for _, slot := range s.buffers {
		d.slots[&s.proc.Slot(slot)[0]] = slotRef{h, s, slot}
	}
}

// endedLocked notes that the process of a session was waited for, and gives
// its memory back unless somebody has a buffer of it. The caller holds mu.
func (d *Disk) endedLocked(s *session) {
	s.ended, s.lost = true, true
	for _, t := range s.timers {
		t.Stop()
	}
	d.releaseLocked(s)
}

func (d *Disk) releaseLocked(s *session) {
	if !s.ended || s.used > 0 {
		return
	}
	for _, slot := range s.buffers {
		delete(d.slots, &s.proc.Slot(slot)[0])
	}
	s.proc.Release()
}

// openSession starts a worker and opens the disk in it. Replacing says that a
// worker was lost before, which may have left things on the host. With shrink
// the connection gets smaller buffers where the host lacks memory; those of the
// first one all later ones get.
func (d *Disk) openSession(ctx context.Context, replacing, shrink bool) (*session, error) {
	d.mu.Lock()
	buffers := d.buffers
	d.mu.Unlock()
	for {
		s, err := d.openWith(ctx, buffers, replacing)
		var e *Error
		if !errors.As(err, &e) || !e.noMemory() || !shrink {
			return s, err
		}
		smaller, ok := buffers.Halved()
		if !ok {
			return nil, err
		}
		d.debug("", "the host has no memory for the NFC buffers; trying smaller ones", "size", smaller.Size, "count", smaller.Count, "error", err)
		buffers = smaller
		if !replacing {
			d.mu.Lock()
			d.buffers = smaller
			d.mu.Unlock()
		}
	}
}

// openWith opens the disk with a connection of such buffers, when its login is due.
func (d *Disk) openWith(ctx context.Context, buffers NFCBuffers, replacing bool) (s *session, err error) {
	ended, err := d.o.Registry.login(ctx, &d.params)
	if err != nil {
		if stopped := d.ended(); stopped != nil {
			return nil, stopped
		}
		return nil, d.failed(err)
	}
	defer func() { ended(err) }()
	timeout := 5 * d.o.Timeout
	late := fmt.Errorf("no answer within %v", timeout)
	limited, cancel := context.WithTimeoutCause(ctx, timeout, late)
	defer cancel()
	mark := d.log.mark()
	fail := func(op string, err error) error {
		if stopped := d.ended(); stopped != nil {
			return stopped
		}
		if limited.Err() != nil {
			return &lostError{d.rangeOf(op, 0, 0), context.Cause(limited), true}
		}
		return d.explain(op, 0, 0, mark, err)
	}

	p, err := d.startWorker(limited, buffers, d.nBuffers+d.nSpare, d.o.RequestSize)
	if err != nil {
		return nil, fail("start", err)
	}
	stop := context.AfterFunc(limited, p.Kill) // also when it hangs in a call below
	defer stop()
	defer func() {
		if err == nil {
			return
		}
		// Closing undoes what was done on the host before the error.
		if !isLost(err) {
			p.Close(limited)
		}
		p.Kill()
		p.Release()
	}()
	if replacing && d.params.Remote() {
		if err := d.cleanUp(limited, p, mark); err != nil {
			return nil, fail("open", err)
		}
	}
	opened, err := p.Open(limited, d.request)
	if err != nil {
		return nil, fail("open", err)
	}
	if d.o.Writable && !p.Has("VixDiskLib_Flush") {
		return nil, d.failed(fmt.Errorf("%s: VDDK %d has no VixDiskLib_Flush: writing needs VDDK 6.0 or later", d.params.File, d.library.Version))
	}
	if err := d.same(opened); err != nil {
		return nil, err
	}
	s = newSession(p, opened, d.nBuffers, d.nSpare, min(d.o.Timeout, d.o.Retry.Patience()))
	if err := d.compare(limited, s); err != nil {
		if limited.Err() != nil {
			err = fail("open", err)
		}
		return nil, err
	}
	if !stop() {
		return nil, fail("open", &lostError{d.rangeOf("open", 0, 0), late, true})
	}
	return s, nil
}

// compare returns an error unless the disk of a session that was just opened holds
// what was read before.
func (d *Disk) compare(ctx context.Context, s *session) error {
	slot, timeout := s.spare[0], min(d.o.Timeout, d.o.Retry.Patience())
	err := d.samples.Check(func(p []byte, off int64) (goOn bool, err error) {
		for len(p) > 0 {
			n := min(len(p), d.o.RequestSize)
			mark := d.log.mark()
			if err := s.read(ctx, timeout, slot, uint64(off/sectorSize), n/sectorSize); err != nil {
				if err = d.explain("read", off, int64(n), mark, err); isLost(err) {
					s.proc.Kill()
					return false, s.gone(d.rangeOf("read", off, int64(n)))
				}
				return ctx.Err() == nil, err
			}
			copy(p, s.proc.Slot(slot)[:n])
			p, off = p[n:], off+int64(n)
		}
		return true, nil
	})
	if errors.Is(err, source.ErrChanged) {
		return source.Changed(fmt.Errorf("%s, opened again: %w", d.params.File, err))
	}
	return err
}

// startWorker starts a worker with a connection of such buffers, and so many slots
// of slotSize bytes.
func (d *Disk) startWorker(ctx context.Context, buffers NFCBuffers, slots, slotSize int) (process, error) {
	file, err := newConfigFile(d.config.file(buffers))
	if err != nil {
		return nil, startError(err)
	}
	defer file.Close()
	return d.start(ctx, worker.Config{
		Library: d.library.Path, Root: d.library.Root, Dir: d.library.Dir, Version: d.library.Version,
		ConfigFile: file.path, Slots: slots, SlotSize: slotSize,
		Log: func(level worker.Level, line string) {
			d.log.add(level == worker.Warning || level == worker.Panic, line)
		},
	})
}

// startError makes a lack of descriptors or memory known as one that may pass.
func startError(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return &worker.StartError{Err: err}
}

// cleanUp removes what lost workers left on the host. Only a refused login is an
// error, because then the disk need not be asked for.
func (d *Disk) cleanUp(ctx context.Context, p process, mark int64) error {
	cleaned, remaining, err := p.Cleanup(ctx, d.request)
	if err == nil {
		d.mu.Lock()
		d.messy = false
		d.mu.Unlock()
	}
	d.debug("", "cleaned up after a lost worker", "cleaned", cleaned, "remaining", remaining, "error", err)
	if e := asError(d.explain("open", 0, 0, mark, err)); err != nil && e != nil && e.refusedByLog() {
		return err
	}
	return nil
}

// failed marks an error of opening the disk as permanent, unless the disk was open
// before: then nothing is.
func (d *Disk) failed(err error) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.first == nil {
		return source.Permanent(err)
	}
	return err
}

// same returns an error unless what was opened is the disk that was opened
// first.
func (d *Disk) same(o worker.Opened) error {
	d.mu.Lock()
	first := d.first
	d.mu.Unlock()
	if first == nil || first.Capacity == o.Capacity && first.UUID == o.UUID {
		return nil
	}
	if o.Capacity == 0 { // what no disk has is no proof that this is another one
		return fmt.Errorf("%s, opened again: the library says that it has no sectors", d.params.File)
	}
	return source.Changed(fmt.Errorf("%s, opened again: it is another disk: it had %d bytes (uuid %q) and has %d (uuid %q)", d.params.File,
		first.Capacity*sectorSize, first.UUID, o.Capacity*sectorSize, o.UUID))
}

// usesLocked notes the transport mode of a connection that was opened. Where it is
// another one than before, it returns that. The caller holds mu.
func (d *Disk) usesLocked(transport string) (before string) {
	d.wasAttached = d.wasAttached || attached(transport)
	if before = d.transport; before == transport {
		return ""
	}
	d.transport = transport
	return before
}

// warnTransport warns that a connection uses another transport mode than the ones
// before; "" is none.
func (d *Disk) warnTransport(before string) {
	if before == "" {
		return
	}
	d.mu.Lock()
	now := d.transport
	d.mu.Unlock()
	d.warn(fmt.Sprintf("%s: a connection was opened with the transport mode %q, where the one before had %q", d.params.File, now, before))
}
