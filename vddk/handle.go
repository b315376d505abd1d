package vddk

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/source"
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
