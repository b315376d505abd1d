package vddk

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/internal/pacing"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/source"
)

// maxPieces is the largest number of requests that are in flight at the same time for one read or
// write. A long read or write is divided into several requests.
const maxPieces = 16

// A pool has all connections of one open disk, its handles. Its method carryOut makes a read or a
// write over these connections. It divides a call that is too long for one request, waits for a
// connection that can take another request, and repeats requests that fail. Lost connections are
// replaced (see handle), and the number of connections is adapted to the host (see growth). All
// methods are safe for concurrent use.
//
// The mutex mu guards the fields of pool below it, and those fields of handle and session that are
// marked in these types. mu is never held during a call to a worker process, or to a function of
// the Options (OnRetry, Warn, Log).
//
// Locks are acquired in this order: the one inside Disk.flushes, outline.mu,
// allocationQueries.querying, allocationQueries.mu, pool.mu. The locks that are acquired while
// pool.mu is held, such as those inside pacing.Pace and Registry, are held for a short time, and no
// further lock is acquired while they are held. Methods whose names end in Locked are called with
// mu held.
type pool struct {
	life     *lifetime
	o        *Options
	opener   *opener
	explain  *explainer
	report   *reporter
	policy   *retry.Policy
	progress *retry.Progress // successful requests
	pace     *pacing.Pace
	retries  atomic.Int64 // requests that were repeated

	mu        sync.Mutex
	changed   sync.Cond // signals that a session was opened or lost, a slot was freed, or the disk has ended
	handles   []*handle
	slots     map[*byte]slotRef // the slots of all sessions, by the address of their first byte
	growth    growth
	flusher   flusher
	transport string // transport mode of the connection that was opened last
	most      int    // the largest number of handles so far
	dead      error  // why no request can succeed any more; nil as long as one can
	closeErr  error  // errors of closing workers
}

// openPool opens the first connection of the disk. If more connections are wanted, growth.start
// opens them in the background.
func openPool(ctx context.Context, life *lifetime, op *opener) (*pool, error) {
	p := &pool{
		life: life, o: op.o, opener: op, explain: op.explain, report: op.report, slots: make(map[*byte]slotRef),
		policy: &op.policy, progress: retry.NewProgress(),
		pace: pacing.NewPace(op.o.RequestSize, op.o.Depth),
	}
	p.changed.L = &p.mu
	p.growth.pool, p.growth.started, p.flusher.pool = p, time.Now(), p
	connections := max(p.o.Connections, 1)
	at := op.at.Load()
	free, err := op.reserve(ctx, at, connections)
	if err != nil {
		return nil, err
	}
	s, err := op.openFirst(ctx)
	if err != nil {
		free()
		return nil, err
	}
	share := split(connections, free)
	h := newHandle(p, share, at.budget)
	if !nfc(s.opened.Transport) {
		free() // other transport modes use no NFC memory of the host
		h.free = func() {}
	}
	p.mu.Lock()
	p.addLocked(h, s)
	p.mu.Unlock()
	p.growth.start(s.opened.Transport, connections-1, share, at.budget)
	// When the disk is closed or its context ends, the calls that wait for a connection must be
	// woken.
	context.AfterFunc(life.ending, p.wake)
	return p, nil
}

// carryOut makes a read or write of any length. If the host does not accept so long a request at
// present, carryOut divides the read or write into several requests.
func (p *pool) carryOut(r request) error {
	if r.n == 0 {
		return nil
	}
	if l, _ := p.pace.Next(); r.fits(l.Size) {
		return p.repeat(r)
	}
	return p.doPieces(r)
}

// doPieces divides the request r into pieces and carries out up to maxPieces of them at the same
// time. All borders between pieces are multiples of the sector size.
func (p *pool) doPieces(r request) error {
	l, _ := p.pace.Next()
	var g errgroup.Group
	g.SetLimit(maxPieces)
	for piece := range r.pieces(int64(l.Size)) {
		g.Go(func() error { return p.repeat(piece) })
	}
	return g.Wait()
}

// The method repeat makes the request r until it succeeds, or until the retry policy allows no
// further attempt. r must be short enough for one request. If the host accepts only shorter
// requests after a failure, repeat divides r.
func (p *pool) repeat(r request) error {
	if r.write {
		if err := p.readEdges(&r); err != nil {
			return err
		}
	}
	a := attempts{pool: p, since: time.Now()}
	for {
		t, err := p.try(&r, a.since)
		if err == nil || t.s == nil {
			return err
		}
		if e := asError(err); r.write && e != nil && !e.noMemory() {
			// A write is repeated only if the worker was lost or memory was lacking. All other
			// errors of a write are returned, because the caller has to know of them.
			return fmt.Errorf("%w: %w", errIO, err)
		}
		if err := a.again(t, err); err != nil {
			return err
		}
		if l, _ := p.pace.Next(); !r.fits(l.Size) {
			return p.doPieces(r)
		}
	}
}

// readEdges is called before a write. If the write covers the first or the last sector of its
// range only in part, readEdges reads that sector.
func (p *pool) readEdges(r *request) error {
	head, tail := r.edges()
	if head == nil && tail == nil {
		return nil
	}
	first, end := r.sectors()
	if head != nil {
		if err := p.carryOut(request{p: head, off: first, n: sectorSize}); err != nil {
			return err
		}
	}
	if tail != nil {
		return p.carryOut(request{p: tail, off: end - sectorSize, n: sectorSize})
	}
	return nil
}

// The method try makes one attempt at request r. The parameter since is the time when the caller
// made the request. try returns the permit that it used: the right to use one slot for the request.
// If no attempt was made, the session of the permit is nil.
func (p *pool) try(r *request, since time.Time) (permit, error) {
	t, err := p.acquire(r, since)
	if err != nil {
		return permit{}, err
	}
	first, end := r.sectors()
	sector, sectors := uint64(first/sectorSize), int((end-first)/sectorSize)
	mark, timeout := p.opener.log.mark(), p.timeout(p.o.Timeout, since)
	if r.write {
		r.fill(t.memory()[:end-first])
		err = t.s.write(p.life.Context, timeout, t.slot, sector, sectors)
	} else {
		err = t.s.read(p.life.Context, timeout, t.slot, sector, sectors)
	}
	if err != nil {
		err = p.failed(t, r.op(), first, end-first, mark, since, err)
		p.release(t, 0, false)
		return t, err
	}
	if r.write {
		if !p.release(t, end-first, true) {
			// The worker was lost after it had answered. The written data may be lost, too.
			// Therefore the write counts as failed.
			return t, t.s.gone(p.explain.rangeOf("write", first, end-first))
		}
		return t, nil
	}
	p.explain.wasRead.Store(true)
	if t.spare {
		copy(r.p, t.memory()[r.off-first:])
	}
	if p.opener.samples != nil && r.aligned() {
		p.opener.samples.Add(r.p, r.off)
	}
	p.release(t, r.n, true)
	if p.report.debugs("datapath") {
		p.report.debug("datapath", "read", "offset", r.off, "bytes", r.n, "handle_slot", t.slot, "copied", t.spare)
	}
	return t, nil
}

// The method timeout returns the time limit for the next attempt of a call. The parameter since is
// the time when the call began. One attempt may take no longer than maxAttempt. The result is
// shorter than that if the retry policy leaves less time for all attempts of the call together.
func (p *pool) timeout(maxAttempt time.Duration, since time.Time) time.Duration {
	return min(maxAttempt, max(p.policy.Patience()-p.progress.Idle(since), time.Millisecond))
}

// The method failed returns the error for a request that failed with err. The returned error also
// names the disk and the range [off, off+n). If the worker process was lost, failed first waits
// until the process has ended. After that nothing writes to the slot of the request any more.
func (p *pool) failed(t permit, op string, off, n, mark int64, since time.Time, err error) error {
	if ended := context.Cause(p.life.Context); ended != nil {
		return ended
	}
	err = p.explain.explain(op, off, n, mark, err)
	if isLost(err) {
		return p.lostDuring(t.h, t.s, p.explain.rangeOf(op, off, n), since)
	}
	return err
}

// lostDuring is called when the operation op failed because the worker process of session s was
// lost. It kills the process if that has not ended yet, records the loss, and returns an error that
// says why the process ended.
func (p *pool) lostDuring(h *handle, s *session, op string, since time.Time) error {
	s.proc.Kill()
	p.lose(h, s, op, since)
	return s.gone(op)
}

// acquire waits for a permit: the right to make one request, with a slot for its data. since is
// the time when the caller made the request.
//
// A read may fill a whole buffer that Disk.Buffer returned. The memory of this buffer is a slot,
// and the read uses this slot, as long as the session of the buffer is alive. All other requests
// use a spare slot, from which or into which the data is copied. A read into a part of a buffer
// uses a spare slot, too: if the library wrote more than it should, it would damage the other parts
// of the buffer.
func (p *pool) acquire(r *request, since time.Time) (permit, error) {
	var memory []byte
	if !r.write && r.aligned() {
		memory = r.p
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var waited *handle // the handle whose cond this call was woken by
	for {
		if err := p.endedForCallsLocked(false); err != nil {
			return permit{}, err
		}
		l, pace := p.pace.Next()
		home, direct := slotRef{}, false
		if len(memory) > 0 && len(memory) <= l.Size {
			home, direct = p.slots[&memory[0]]
			direct = direct && home.h.session == home.s && len(memory) == home.s.handed[home.slot]
		}
		h := home.h
		if !direct {
			h = p.leastBusyLocked()
		}
		if waited != nil && waited != h {
			waited.changed.Signal() // another waiting request can use the room that this one leaves
			p.growth.retireIdleLocked(waited)
		}
		waited = nil
		if h == nil {
			if err := p.endedForCallsLocked(true); err != nil {
				return permit{}, err
			}
			p.changed.Wait()
			continue
		}
		s := h.session
		if h.inFlight >= l.Depth || !direct && len(s.spare) == 0 {
			h.waitLocked(l.Depth < p.o.Depth)
			waited = h
			continue
		}
		h.inFlight++
		if h.waiting > 0 && h.inFlight < l.Depth {
			h.changed.Signal() // Pace has raised the depth
		}
		if direct {
			s.begun[home.slot] = since
			return permit{slotRef: home, pace: pace}, nil
		}
		slot := s.spare[len(s.spare)-1]
		s.spare = s.spare[:len(s.spare)-1]
		s.used++
		s.begun[slot] = since
		return permit{slotRef: slotRef{h, s, slot}, spare: true, pace: pace, write: r.write}, nil
	}
}

// leastBusyLocked returns the open handle with the fewest requests. It is nil if no handle is
// open.
func (p *pool) leastBusyLocked() *handle {
	var best *handle
	for _, h := range p.handles {
		if !h.usableLocked() {
			continue
		}
		if best == nil || h.inFlight+h.waiting < best.inFlight+best.waiting {
			best = h
		}
	}
	return best
}

// The method release gives a permit back after a request. If the request succeeded, n is the number
// of bytes that it moved. release reports whether the session is still alive. If it is not, writes
// that the session has completed may be lost.
func (p *pool) release(t permit, n int64, succeeded bool) (alive bool) {
	p.mu.Lock()
	alive, change := p.releaseLocked(t, n, succeeded)
	p.mu.Unlock()
	if change != "" {
		p.report.debug("", change)
	}
	return alive
}

// releaseLocked implements release. The result change says why the number of connections changes.
// It is "" if the number does not change.
func (p *pool) releaseLocked(t permit, n int64, succeeded bool) (alive bool, change string) {
	h := t.h
	if succeeded {
		p.progress.Mark()
		// The session may have been lost after it had sent the answer to this request. Then the
		// success of the request does not set the number of failures of the handle to 0.
		if !t.s.lost {
			h.failures = 0
			if t.write {
				p.flusher.written++
			}
		}
		p.pace.Served()
		change = p.growth.tuneLocked(n)
	}
	h.inFlight--
	t.s.begun[t.slot] = time.Time{}
	if t.spare {
		t.s.spare = append(t.s.spare, t.slot)
		t.s.used--
		p.unmapLocked(t.s)
	}
	p.growth.retireIdleLocked(h)
	h.changed.Signal()
	return !t.s.lost, change
}

// The method buffer returns the memory of a slot as a buffer of n bytes. n is at most
// Options.RequestSize. The returned function free frees the slot. If no slot is free, the method
// waits until one is, or until ctx ends.
func (p *pool) buffer(ctx context.Context, n int) (b []byte, free func(), err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var stop func() bool
	for {
		if err := p.endedLocked(); err != nil {
			return nil, nil, err
		}
		if ctx.Err() != nil {
			return nil, nil, context.Cause(ctx)
		}
		if s := p.mostBuffersLocked(); s != nil {
			slot := s.buffers[len(s.buffers)-1]
			s.buffers = s.buffers[:len(s.buffers)-1]
			s.used++
			s.handed[slot] = n
			freed := false
			return s.proc.Slot(slot)[:n:n], func() { p.freeBuffer(s, slot, &freed) }, nil
		}
		if stop == nil {
			stop = context.AfterFunc(ctx, p.wake)
			defer stop()
		}
		p.changed.Wait()
	}
}

// mostBuffersLocked returns the session with the most free slots for buffers. It is nil if no open
// handle has such a free slot.
func (p *pool) mostBuffersLocked() *session {
	var best *session
	for _, h := range p.handles {
		if !h.usableLocked() || len(h.session.buffers) == 0 {
			continue
		}
		if best == nil || len(h.session.buffers) > len(best.buffers) {
			best = h.session
		}
	}
	return best
}

// freeBuffer frees the slot of a buffer and sets *freed to true. It does nothing if *freed is true
// already.
func (p *pool) freeBuffer(s *session, slot int, freed *bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if *freed {
		return
	}
	*freed = true
	s.buffers = append(s.buffers, slot)
	s.used--
	p.unmapLocked(s)
	p.changed.Broadcast()
}

// addLocked adds a handle with its first session s. It starts the goroutine that replaces the
// session when it is lost. If the transport mode of s differs from the mode that the pool used
// before, addLocked returns that earlier mode. Otherwise it returns "".
func (p *pool) addLocked(h *handle, s *session) (before string) {
	p.handles = append(p.handles, h)
	p.most = max(p.most, len(p.handles))
	p.life.background.Go(func() { h.run(s) })
	return p.installLocked(h, s)
}

// installLocked makes s the session of handle h and adds the buffers of s to p.slots. If the
// transport mode of s differs from the mode that the pool used before, installLocked returns that
// earlier mode. Otherwise it returns "".
func (p *pool) installLocked(h *handle, s *session) (before string) {
	h.setSessionLocked(s)
	for _, slot := range s.buffers {
		p.slots[&s.proc.Slot(slot)[0]] = slotRef{h, s, slot}
	}
	p.changed.Broadcast()
	if attached(s.opened.Transport) {
		p.opener.attached.Store(true)
	}
	if before = p.transport; before == s.opened.Transport {
		return ""
	}
	p.transport = s.opened.Transport
	return before
}

// warnTransport warns that a new connection uses another transport mode than the connection
// before it. The two modes are current and previous. It does nothing if previous is "".
func (p *pool) warnTransport(previous, current string) {
	if previous != "" {
		p.report.warn(fmt.Sprintf("%s: the last connection uses the transport mode %q, the one before it used %q", p.life.Name, current, previous))
	}
}

// removeLocked removes a handle from the pool, so that no new request uses it.
func (p *pool) removeLocked(h *handle) {
	for i, o := range p.handles {
		if o == h {
			p.handles = append(p.handles[:i:i], p.handles[i+1:]...)
			break
		}
	}
	p.changed.Broadcast()
}

// The method lose records that the worker process of session s was lost or killed during operation
// op. If lose is called again for the same session, it does nothing. No new request uses the
// session, but its process may still be running.
//
// since is the time when the call began that noticed the loss. Other calls that the loss
// interrupted may have begun earlier. The time limit for opening the disk again counts from the
// earliest of them.
func (p *pool) lose(h *handle, s *session, op string, since time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if s.lost {
		return
	}
	s.lost = true
	p.opener.messy.Store(true)
	p.o.Registry.doubt(&s.at.params)
	if h.session == s {
		h.setSessionLocked(nil)
	}
	h.failedLocked(s.interruptedSinceLocked(since))
	h.lastLoss = s.gone(op)
	p.flusher.lostLocked(h.lastLoss)
	h.changed.Broadcast()
	p.changed.Broadcast()
}

// exitedLocked records that the process of a session has ended. It frees the shared memory of
// the session, unless a caller still has a buffer in it.
func (p *pool) exitedLocked(s *session) {
	s.ended, s.lost = true, true
	p.unmapLocked(s)
}

// unmapLocked frees the shared memory of a session if its process has ended and none of its
// slots is in use.
func (p *pool) unmapLocked(s *session) {
	if !s.ended || s.used > 0 {
		return
	}
	for _, slot := range s.buffers {
		delete(p.slots, &s.proc.Slot(slot)[0])
	}
	s.proc.Release()
}

// dieLocked makes all later requests fail with err, and wakes the requests that wait.
func (p *pool) dieLocked(err error) {
	p.dead = err
	p.broadcastLocked()
}

// The method begin starts a call, such as a call of a method of Disk. The call counts as in
// progress until life.End is called. Disk.Close waits until no call is in progress. begin returns
// an error if the disk cannot be used any more.
func (p *pool) begin() error {
	if err := p.ended(); err != nil {
		return err
	}
	return p.life.Begin(p.life.Context)
}

// The method died returns the reason why all calls fail from now on. It returns nil as long as
// calls can succeed.
func (p *pool) died() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.dead
}

// The method ended returns nil as long as new calls may begin. After that it returns the reason why
// they may not.
func (p *pool) ended() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.endedLocked()
}

func (p *pool) endedLocked() error {
	if err := p.life.ended(); err != nil {
		return err
	}
	return p.dead
}

// endedForCallsLocked returns nil as long as a call in progress may continue. After that it returns
// the reason why the call may not continue. While Close waits for calls in progress, they may use
// the worker processes that are still running. But lost workers are not replaced any more.
// Therefore a call that needs a new worker (needsWorker is true) gets an error.
func (p *pool) endedForCallsLocked(needsWorker bool) error {
	switch {
	case p.life.Context.Err() != nil:
		return context.Cause(p.life.Context)
	case p.dead != nil:
		return p.dead
	case needsWorker:
		return p.life.ended()
	}
	return nil
}

// The method wake wakes all waiting calls, so that they notice when the disk is closed or a context
// has ended.
func (p *pool) wake() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.broadcastLocked()
}

func (p *pool) broadcastLocked() {
	p.changed.Broadcast()
	for _, h := range p.handles {
		h.changed.Broadcast()
	}
}

// fillStats sets those fields of the statistics s that the pool knows.
func (p *pool) fillStats(s *source.Stats) {
	p.mu.Lock()
	defer p.mu.Unlock()
	s.Transport, s.Retries, s.Restarts = p.transport, p.retries.Load(), p.opener.restarts.Load()
	s.Connections, s.Most = p.most, max(p.most, p.o.Connections)
	if t := p.growth.tuner; t != nil {
		s.Connections, s.Most = t.Settled(), maxAuto
	}
}
