package vddk

import (
	"context"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/source"
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

// tuneLocked tells the tuner of n bytes that were read until now, and does what
// it says. The caller holds mu.
func (d *Disk) tuneLocked(now time.Duration, n int64) {
	if d.tuner == nil || d.ended() != nil {
		return
	}
	have, busy := 0, 0
	for _, h := range d.handles {
		if h.session != nil && !h.retiring {
			have++
		}
		busy += h.inFlight + h.waiting
	}
	want := d.tuner.Add(now, n, have, busy >= have*(d.o.Depth+1)/2)
	switch {
	case want > len(d.handles) && have == len(d.handles) && !d.growing:
		d.growing = true
		d.background.Go(d.grow)
	case want < have:
		h := d.handles[len(d.handles)-1] // the first one stays
		if !h.retiring {
			h.retiring = true
			d.retireIdleLocked(h)
		}
	}
}

// retireIdleLocked closes h if it is to retire, no request uses it and no request
// waits for it. The caller holds mu.
func (d *Disk) retireIdleLocked(h *handle) {
	if !h.retiring || h.inFlight+h.waiting > 0 {
		return
	}
	d.removeLocked(h)
	h.session = nil
	select {
	case <-h.retire:
	default:
		close(h.retire)
	}
}

// grow adds a connection where the host has room for it.
func (d *Disk) grow() {
	defer d.grown()
	free := func() {}
	if d.o.Budget != nil && d.params.Remote() {
		d.mu.Lock()
		bytes := d.buffers.Bytes()
		d.mu.Unlock()
		var ok bool
		if free, ok = d.o.Budget.TryAcquire(d.o.Budget.Of(1, bytes)); !ok {
			d.mu.Lock()
			d.tuner.Denied(len(d.handles))
			d.mu.Unlock()
			return
		}
	}
	d.addHandle(free)
}

// grown says that the opening of further connections is over.
func (d *Disk) grown() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.growing = false
	d.changed.Broadcast()
}

// addHandle opens a connection more. One that can't be had is done without.
func (d *Disk) addHandle(free func()) (added bool) {
	s, err := d.openSession(d.ending, false, false)
	if err == nil && d.ending.Err() != nil {
		s.proc.Kill()
		s.proc.Release()
		err = d.ended()
	}
	if err != nil {
		free()
		d.mu.Lock()
		n := len(d.handles)
		if d.tuner != nil {
			d.tuner.Failed(n)
		}
		d.mu.Unlock()
		if d.ended() == nil {
			d.warnOnce(&d.warnedGrowth, fmt.Sprintf("%s: no further connection can be had; reading goes on with %d: %v", d.params.File, n, err))
		}
		return false
	}
	h := newHandle(d, free)
	defer d.debug("datapath", "one connection more")
	changed := ""
	defer func() { d.warnTransport(changed) }()
	d.mu.Lock()
	defer d.mu.Unlock()
	changed = d.usesLocked(s.opened.Transport)
	h.session = s
	d.handles = append(d.handles, h)
	d.most = max(d.most, len(d.handles))
	d.addSlotsLocked(h, s)
	d.changed.Broadcast()
	for _, o := range d.handles {
		o.turn.Broadcast() // some of those who wait may go to the new one
	}
	d.background.Add(1)
	go d.run(h, s)
	return true
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

// attempts are those of one request.
type attempts struct {
	d        *Disk
	failures int
	denied   int       // of them for memory, which don't count as long as less can be asked
	since    time.Time // when the request was made
}

// again is told of a failure in a seat that was given back. It waits and
// returns nil when the request is to be made once more.
func (a *attempts) again(t seat, err error) error {
	d := a.d
	if ended := d.ended(); ended != nil {
		return ended
	}
	if e := asError(err); e != nil && e.noMemory() && d.pace.Denied(t.asked) {
		d.debug("", "the host has no memory for a request; asking for less", "error", err)
		a.denied++
		d.retries.Add(1)
		d.pause(min(time.Duration(a.denied)*5*time.Millisecond, 100*time.Millisecond))
		return nil
	}
	a.failures++
	if err := d.gaveUp(err, a.failures, a.since); err != nil {
		return err
	}
	d.retries.Add(1)
	if isLost(err) {
		return nil // the handle that opens it again waits
	}
	wait, _ := d.o.Retry.Wait(a.failures, d.idle(a.since))
	if d.o.Retry.OnRetry != nil {
		d.o.Retry.OnRetry(err, wait)
	}
	if !d.pause(wait) {
		return d.ended()
	}
	if e := asError(err); a.failures > 1 && (e == nil || !e.noMemory()) && d.expendable() {
		// It may be the connection.
		t.s.kill(fmt.Errorf("replaced after errors: %w", err))
		d.lose(t.h, t.s, d.rangeOf("requests to", 0, 0), a.since)
	}
	return nil
}

// expendable says whether a worker may be given up that still answers: one with
// writes that were not flushed would take them along.
func (d *Disk) expendable() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.written == d.flushed
}

// pause waits, unless the disk ends.
func (d *Disk) pause(wait time.Duration) bool {
	return sleep(d.ctx, d.closed, wait)
}

var _ interface {
	source.Disk
	source.Allocator
	source.Identified
	source.Described
	source.Counted
	source.Writable
} = (*Disk)(nil)
