package vddk

import (
	"fmt"
	"time"
)

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
