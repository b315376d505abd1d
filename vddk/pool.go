package vddk

import (
	"context"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
	"golang.org/x/sync/errgroup"
)

// seat is the permission for one request: a turn on a handle, and a slot.
type seat struct {
	slotRef
	spare bool   // the slot is a spare one
	asked uint64 // see pace.next
	write bool   // it is for a write
}

// memory is that of the slot.
func (t *seat) memory() []byte { return t.s.proc.Slot(t.slot) }

// take waits for a turn. When p is the whole buffer of a session that lives, and no
// longer than a request may be, it is the slot; else a spare one is. A part of a
// buffer is not: a library that writes beyond it would overwrite the other parts.
func (d *Disk) take(p []byte) (t seat, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	var waited *handle // where a turn was waited for and came
	for {
		if err := d.stuckNow(false); err != nil {
			return seat{}, err
		}
		l, asked := d.pace.Next()
		home, direct := slotRef{}, false
		if len(p) > 0 && len(p) <= l.Size {
			home, direct = d.slots[&p[0]]
			direct = direct && home.h.session == home.s && len(p) == home.s.handed[home.slot]
		}
		h := home.h
		if !direct {
			h = d.leastLocked()
		}
		if waited != nil && waited != h {
			waited.turn.Signal() // it goes to the next one
			d.retireIdleLocked(waited)
		}
		waited = nil
		if h == nil {
			if err := d.stuckNow(true); err != nil {
				return seat{}, err
			}
			d.changed.Wait()
			continue
		}
		s := h.session
		if h.inFlight >= l.Depth || !direct && len(s.spare) == 0 {
			h.waiting++
			h.turn.Wait()
			h.waiting--
			waited = h
			continue
		}
		h.inFlight++
		if h.waiting > 0 && h.inFlight < l.Depth {
			h.turn.Signal() // the depth grew
		}
		if direct {
			return seat{slotRef: home, asked: asked}, nil
		}
		slot := s.spare[len(s.spare)-1]
		s.spare = s.spare[:len(s.spare)-1]
		s.used++
		return seat{slotRef: slotRef{h, s, slot}, spare: true, asked: asked}, nil
	}
}

// leastLocked returns the open handle with the least to do, or nil. The caller
// holds mu.
func (d *Disk) leastLocked() *handle {
	var best *handle
	for _, h := range d.handles {
		if h.session == nil || h.retiring {
			continue
		}
		if best == nil || h.inFlight+h.waiting < best.inFlight+best.waiting {
			best = h
		}
	}
	return best
}

// give ends a turn. Of a request that succeeded, with n bytes, it takes note.
// It says whether the session is still there: what a lost worker wrote may be
// lost with it.
func (d *Disk) give(t seat, n int64, succeeded bool) (alive bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	h := t.h
	if succeeded {
		now := time.Since(d.started)
		d.lastSuccess.Store(int64(now))
		// An answer that came before a loss says nothing of what follows it.
		if !t.s.lost {
			h.failures = 0
			if t.write {
				d.written++
			}
		}
		d.pace.Served()
		d.tuneLocked(now, n)
	}
	h.inFlight--
	if t.spare {
		t.s.spare = append(t.s.spare, t.slot)
		t.s.used--
		d.releaseLocked(t.s)
	}
	d.retireIdleLocked(h)
	h.turn.Signal()
	return !t.s.lost
}

// Buffer implements source.Allocator. A buffer is a slot of a worker's, which
// the library reads into; one that is larger than Options.RequestSize is
// ordinary memory.
func (d *Disk) Buffer(ctx context.Context, n int) (b []byte, free func(), err error) {
	if n <= 0 || n > d.o.RequestSize {
		return make([]byte, max(n, 0)), func() {}, nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var stop func() bool
	for {
		if err := d.endedNow(); err != nil {
			return nil, nil, err
		}
		if ctx.Err() != nil {
			return nil, nil, context.Cause(ctx)
		}
		var best *handle
		for _, h := range d.handles {
			if h.session == nil || h.retiring || len(h.session.buffers) == 0 {
				continue
			}
			if best == nil || len(h.session.buffers) > len(best.session.buffers) {
				best = h
			}
		}
		if best == nil {
			if stop == nil {
				stop = context.AfterFunc(ctx, d.wake)
				defer stop()
			}
			d.changed.Wait()
			continue
		}
		s := best.session
		slot := s.buffers[len(s.buffers)-1]
		s.buffers = s.buffers[:len(s.buffers)-1]
		s.used++
		s.handed[slot] = n
		freed := false
		return s.proc.Slot(slot)[:n:n], func() {
			d.mu.Lock()
			defer d.mu.Unlock()
			if freed {
				return
			}
			freed = true
			s.buffers = append(s.buffers, slot)
			s.used--
			d.releaseLocked(s)
			d.changed.Broadcast()
		}, nil
	}
}

var _ interface {
	source.Disk
	source.Allocator
	source.Identified
	source.Described
	source.Counted
	source.Writable
} = (*Disk)(nil)

// maxPieces is how many requests one call has in flight at once.
const maxPieces = 16

// read reads what lies in the disk, in pieces of a request each.
func (d *Disk) read(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if l, _ := d.pace.Next(); fits(off, int64(len(p)), l.Size) {
		return d.readPiece(p, off)
	}
	return d.eachRequest(off, int64(len(p)), func(from, to int64) error { return d.readPiece(p[from-off:to-off:to-off], from) })
}

// fits says whether a request of size bytes has the sectors of a range.
func fits(off, n int64, size int) bool { return off%sectorSize+n <= int64(size) }

// eachRequest cuts a range into what fits a request, with borders between that
// are multiples of the sector, and does the parts side by side.
func (d *Disk) eachRequest(off, n int64, do func(from, to int64) error) error {
	l, _ := d.pace.Next()
	var g errgroup.Group
	g.SetLimit(maxPieces)
	for end := off + n; off < end; {
		from, to := off, min(off-off%sectorSize+int64(l.Size), end)
		g.Go(func() error { return do(from, to) })
		off = to
	}
	return g.Wait()
}

// readPiece reads what fits a request, again until it succeeds or that makes no
// sense any more.
func (d *Disk) readPiece(p []byte, off int64) error {
	a := attempts{d: d, since: time.Now()}
	for {
		t, err := d.readOnce(p, off, a.since)
		if err == nil {
			return nil
		}
		if t.s == nil {
			return err // there was no attempt
		}
		if err := a.again(t, err); err != nil {
			return err
		}
		if l, _ := d.pace.Next(); !fits(off, int64(len(p)), l.Size) {
			return d.read(p, off)
		}
	}
}

// readOnce makes one attempt at a read that was asked for at a time. Without a
// session in the seat there was none.
func (d *Disk) readOnce(p []byte, off int64, since time.Time) (seat, error) {
	head := int(off % sectorSize)
	sectors := (head + len(p) + sectorSize - 1) / sectorSize
	var direct []byte
	if head == 0 && len(p)%sectorSize == 0 {
		direct = p
	}
	t, err := d.take(direct)
	if err != nil {
		return seat{}, err
	}
	mark := d.log.mark()
	err = t.s.read(d.ctx, d.timeout(d.o.Timeout, since), t.slot, uint64(off/sectorSize), sectors)
	if err == nil {
		d.anyRead.Store(true)
		if t.spare {
			copy(p, t.memory()[head:])
		}
		if d.sampled && head == 0 && len(p)%sectorSize == 0 {
			d.samples.Add(p, off)
		}
		d.give(t, int64(len(p)), true)
		if d.debugs("datapath") {
			d.debug("datapath", "read", "offset", off, "bytes", len(p), "handle_slot", t.slot, "copied", t.spare)
		}
		return t, nil
	}
	err = d.requestFailed(t, "read", off, int64(sectors)*sectorSize, mark, since, err)
	d.give(t, 0, false)
	return t, err
}

// requestFailed explains the error of a request. Of one whose worker is lost it
// takes note, and waits for the worker's end: nothing may write to the slot
// after that.
func (d *Disk) requestFailed(t seat, op string, off, n, mark int64, since time.Time, err error) error {
	if ended := context.Cause(d.ctx); ended != nil {
		return ended
	}
	err = d.explain(op, off, n, mark, err)
	if isLost(err) {
		t.s.proc.Kill()
		op = d.rangeOf(op, off, n)
		d.lose(t.h, t.s, op, since)
		err = t.s.gone(op)
	}
	return err
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

// query asks one worker for the allocated blocks of n chunks, in units of so
// many.
func (d *Disk) query(first, n, unit uint64) ([]worker.Block, error) {
	d.querying.RLock()
	defer d.querying.RUnlock()
	if d.wrote.Load() {
		return nil, errWrote
	}
	h, s, err := d.sessionForQuery()
	if err != nil {
		return nil, err
	}
	mark := d.log.mark()
	stop := s.deadline(d.o.Timeout)
	blocks, err := s.proc.Query(d.ctx, first*chunkSectors, n*chunkSectors, unit*chunkSectors)
	stop()
	d.mu.Lock()
	s.queries--
	d.mu.Unlock()
	if err != nil {
		err = d.explain("query", int64(first)*chunk, int64(n)*chunk, mark, err)
		if isLost(err) && d.ended() == nil {
			s.proc.Kill()
			op := d.rangeOf("query", int64(first)*chunk, int64(n)*chunk)
			d.lose(h, s, op, time.Now())
			err = s.gone(op)
		}
		return nil, err
	}
	if d.debugs("extents") {
		d.debug("extents", "allocated blocks", "offset", first*chunk, "bytes", n*chunk, "blocks", len(blocks))
	}
	return blocks, nil
}

// sessionForQuery returns the session with the fewest queries.
func (d *Disk) sessionForQuery() (*handle, *session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		if err := d.endedNow(); err != nil {
			return nil, nil, err
		}
		var best *handle
		for _, h := range d.handles {
			if h.session != nil && !h.retiring && (best == nil || h.session.queries < best.session.queries) {
				best = h
			}
		}
		if best != nil {
			best.session.queries++
			return best, best.session, nil
		}
		d.changed.Wait()
	}
}

// flush makes one flush of the library, or up to three if workers are lost.
func (d *Disk) flush() error {
	for lost := 0; ; {
		h, s, written, err := d.sessionForFlush()
		if s == nil {
			return err
		}
		mark := d.log.mark()
		stop := s.deadline(d.o.Timeout)
		err = s.proc.Flush(d.ctx)
		stop()
		if d.ctx.Err() != nil {
			return context.Cause(d.ctx)
		}
		if err == nil {
			d.mu.Lock()
			defer d.mu.Unlock()
			d.flushed = max(d.flushed, written)
			return nil
		}
		err = d.explain("flush", 0, 0, mark, err)
		if isLost(err) {
			s.proc.Kill()
			d.lose(h, s, d.rangeOf("flush", 0, 0), time.Now()) // which fails all flushes where there was something to flush
			if lost++; lost < 3 {
				continue
			}
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.flushErr == nil {
			d.flushErr = fmt.Errorf("%w: %w", errIO, err)
		}
		return d.flushErr
	}
}

// sessionForFlush waits for the one session of a writable disk, and returns the
// writes that its flush will cover. It returns none where there is nothing to
// flush, or no sense in it.
func (d *Disk) sessionForFlush() (*handle, *session, int64, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		if d.flushErr != nil {
			return nil, nil, 0, d.flushErr
		}
		if err := d.stuckNow(false); err != nil {
			return nil, nil, 0, err
		}
		if h := d.leastLocked(); h != nil {
			return h, h.session, d.written, nil
		}
		if err := d.stuckNow(true); err != nil {
			return nil, nil, 0, err
		}
		d.changed.Wait()
	}
}
