package vddk

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/observer"
)

// maxClose is the time that a worker process has to close a disk that was not opened for writing.
// Closing normally takes less time. A worker that hangs must not delay the end of a copy for longer
// than maxClose.
const maxClose = 20 * time.Second

// handle is one connection of a pool. Its session is a worker process in which the disk is open.
// A lost session is replaced by a new one.
type handle struct {
	pool   *pool
	free   func()        // frees the reservation of the connection in the Budget; used by run only
	budget *Budget       // in which free has reserved memory; used by run only
	retire chan struct{} // closed when the connection is not needed any more

	// These fields are guarded by pool.mu.
	session  *session  // nil while it is being opened again
	retiring bool      // no new request is to use the handle
	inFlight int       // requests that have a permit
	waiting  int       // requests that wait for a permit
	changed  sync.Cond // signals that a request has ended, or the session was lost
	failures int       // losses and failed openings since the last request that succeeded
	since    time.Time // when the first of these failures happened
	lastLoss error     // why the last session was lost
}

// newHandle returns a handle without a session. The function free frees memory that is reserved in
// the given Budget.
func newHandle(p *pool, free func(), budget *Budget) *handle {
	return &handle{pool: p, free: free, budget: budget, retire: make(chan struct{}), changed: sync.Cond{L: &p.mu}}
}

// usableLocked reports whether new requests may use the handle.
func (h *handle) usableLocked() bool { return h.session != nil && !h.retiring }

// waitLocked waits until a request on the handle has ended. The parameter limited says that the
// host has no memory for more requests on the handle.
func (h *handle) waitLocked(limited bool) {
	h.waiting++
	defer func() { h.waiting-- }()
	if limited {
		defer observer.Wait(h.pool.life.Context)()
	}
	h.changed.Wait()
}

// setSessionLocked sets the session of the handle, and tells the observer of the disk's context how
// the number of connections changes.
func (h *handle) setSessionLocked(s *session) {
	n := 0
	if h.session != nil {
		n--
	}
	if s != nil {
		n++
	}
	h.session = s
	observer.Connections(h.pool.life.Context, n)
}

// The method run waits for the end of session s, replaces it by a new session, waits for the end of
// that one, and so on. It returns when the disk is closed, its context ends, the handle is not
// needed any more, or the disk cannot be opened again.
func (h *handle) run(s *session) {
	defer func() { h.free() }()
	p := h.pool
	h.moveReservation(s)
	for s != nil {
		select {
		case <-s.proc.Done():
		case <-h.retire:
			p.report.debug("datapath", "one connection less")
			h.finish(s)
			return
		case <-p.life.ending.Done():
			h.finish(s)
			return
		}
		p.lose(h, s, p.explain.rangeOf("idle time of", 0, 0), time.Now())
		s = h.replace(s)
	}
}

// moveReservation reserves memory in the Budget of another host if the disk has moved there, and
// frees the memory on the old host.
//
// If the Budget has no memory left, the connection is used without a reservation. It must not wait:
// the memory on the old host may become free only when all connections of the disk have moved (see
// split), so two disks that move to each other's host would wait for each other for ever.
func (h *handle) moveReservation(s *session) {
	if s.at.budget == h.budget {
		return
	}
	h.free()
	h.free, h.budget = func() {}, s.at.budget
	if !nfc(s.opened.Transport) {
		return
	}
	if free, ok := h.pool.opener.tryReserve(s.at); ok {
		h.free = free
	} else {
		h.pool.report.debug("", "the disk has moved to a host whose connections are all in use; one more is opened")
	}
}

// The method finish closes a session that no request uses any more. It kills the worker process if
// the process does not end in time, or if the context of the disk ends first.
func (h *handle) finish(s *session) {
	p := h.pool
	timeout := p.o.Timeout
	if !p.o.Writable {
		timeout = min(timeout, maxClose)
	}
	ctx, cancel := context.WithTimeout(p.life.Context, timeout)
	defer cancel()
	err := s.proc.Close(ctx)
	s.proc.Kill()
	if err != nil {
		p.report.debug("", "closing a worker failed", "error", err)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if err != nil {
		p.closeErr = errors.Join(p.closeErr, err)
		p.opener.messy.Store(true)
	}
	h.setSessionLocked(nil)
	p.exitedLocked(s)
}

// The method replace waits until the process of a lost session has ended. Then it opens the disk
// again and returns the new session. It returns nil if the handle gets no new session: the method
// planReopening decides that.
func (h *handle) replace(old *session) *session {
	p := h.pool
	<-old.proc.Done()
	p.mu.Lock()
	p.exitedLocked(old)
	err := h.lastLoss
	p.mu.Unlock()
	for {
		if !h.waitToReopen(err) {
			return nil
		}
		p.opener.restarts.Add(1)
		var s *session
		if s, err = h.reopen(); err == nil {
			h.moveReservation(s)
			p.mu.Lock()
			before := p.installLocked(h, s)
			p.mu.Unlock()
			p.warnTransport(before, s.opened.Transport)
			return s
		}
		if !isFinal(err) {
			err = &reopeningError{err}
		}
		p.mu.Lock()
		h.failedLocked(time.Now())
		p.mu.Unlock()
	}
}

// reopen opens the disk again. It fails if that takes longer than the retry policy allows, or
// longer than five times Options.Timeout.
func (h *handle) reopen() (*session, error) {
	p := h.pool
	p.mu.Lock()
	// Smaller buffers are tried only after several failures. Before that, the host may still hold
	// the buffers of the lost worker. When it frees them, there may be memory for buffers of the
	// full size.
	shrink := h.failures > 3
	since := h.since
	p.mu.Unlock()
	limit := p.timeout(5*p.o.Timeout, since)
	ctx, cancel := context.WithTimeoutCause(p.life.ending, limit, fmt.Errorf("the disk was not opened again within %v", limit.Round(time.Millisecond)))
	defer cancel()
	return p.opener.open(ctx, true, shrink)
}

// failedLocked counts one failure of the connection: a lost session or a failed opening of the
// disk. The failure happened at the given time.
func (h *handle) failedLocked(when time.Time) {
	if h.failures++; h.failures == 1 {
		h.since = when
	}
}

// waitToReopen waits before the disk is opened again after the error err. It returns false if
// the disk must not be opened again. In that case the handle has been removed from the pool.
func (h *handle) waitToReopen(err error) bool {
	p := h.pool
	wait, warning, again := h.planReopening(err)
	if warning != "" {
		p.report.warn(warning)
	}
	if !again {
		return false
	}
	if p.policy.Pause(p.life.ending, err, wait, h.retire) {
		return true
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.removeLocked(h)
	return false
}

// planReopening decides whether the disk is opened again after the error err, and how long to wait
// before that. If the disk is not opened again, planReopening removes the handle from the pool. The
// pool then continues with the sessions of its other handles. All later requests of the pool fail
// if there is no other session, if the content of the disk has changed, or if Options.Refresh has
// returned a permanent error.
func (h *handle) planReopening(err error) (wait time.Duration, warning string, again bool) {
	p := h.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	n, others := h.failures, 0
	for _, o := range p.handles {
		if o != h && o.session != nil {
			others++
		}
	}
	gaveUp := p.policy.GiveUp(err, n, p.progress.Idle(h.since))
	switch {
	case p.life.ending.Err() != nil || h.retiring || p.dead != nil:
		p.removeLocked(h)
		return 0, "", false
	case gaveUp == nil && (others == 0 || n <= 3):
		if n > 1 { // the first reopening follows at once, since the host need not be the cause
			wait, _ = p.policy.Wait(n-1, p.progress.Idle(h.since))
		}
		return wait, "", true
	case others > 0 && !isFinal(err):
		// The host may allow fewer connections than before. Therefore the pool continues with only
		// its other handles.
		p.removeLocked(h)
		if t := p.growth.tuner; t != nil {
			t.Failed(others)
		}
		return 0, fmt.Sprintf("%s: a lost connection cannot be opened again, reading continues with %d: %v", p.life.Name, others, err), false
	}
	p.removeLocked(h)
	p.dieLocked(gaveUp)
	return 0, "", false
}
