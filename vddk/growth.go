package vddk

import (
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/pacing"
)

// maxAuto is the largest number of connections that a pool opens if Options.Connections is 0. The
// number is then chosen automatically.
const maxAuto = 4

// growth adds connections to a pool and removes them. Its fields are guarded by pool.mu.
type growth struct {
	pool    *pool
	started time.Time     // the tuner counts time from here
	tuner   *pacing.Tuner // nil if the number of connections is fixed
	opening bool          // further connections are being opened in the background
	warned  sync.Once     // the user was told that no further connection could be opened
}

// The method start is called when the first connection is open. The parameter transport is the
// transport mode of that connection. start distinguishes three cases:
//   - Options.Connections is 0 and the transport mode uses NFC. The tuner chooses the number of
//     connections later.
//   - Options.Connections is more than 1, but the transport mode attaches the disk to this machine.
//     start opens no other connection, because all connections would share the attached device.
//   - Options.Connections is more than 1, with any other transport mode. start opens the other
//     connections in the background. count is the number of these other connections.
//
// The parameter budget limits the memory that all connections use on the host. The function
// giveBack gives the memory of one connection back to it. In the third of the cases above, giveBack
// is called once for each of the other connections: when that connection is closed, or when a
// failure prevents its opening.
func (g *growth) start(transport string, count int, giveBack func(), budget *Budget) {
	p := g.pool
	switch {
	case p.o.Connections > 1 && attached(transport):
		p.report.debug("", "one connection is used: more of this transport mode would share one device", "transport", transport)
	case p.o.Connections > 1:
		p.mu.Lock()
		defer p.mu.Unlock()
		g.opening = true
		p.life.background.Go(func() {
			defer g.opened()
			for ; count > 0; count-- {
				if !g.add(giveBack, budget) { // add has called giveBack for the connection that failed
					for range count - 1 {
						giveBack()
					}
					break
				}
			}
		})
	case p.o.Connections <= 0 && nfc(transport):
		p.mu.Lock()
		defer p.mu.Unlock()
		g.tuner = pacing.NewTuner(maxAuto)
	}
}

// nfc reports whether a transport mode uses the NFC service of the ESXi host. The host limits the
// number and the memory of connections to this service. Several such connections together may be
// faster than a single one.
func nfc(transport string) bool { return transport == "nbd" || transport == "nbdssl" }

// The function attached reports whether a transport mode attaches the disk to this machine as a
// device.
func attached(transport string) bool { return transport == "hotadd" || transport == "san" }

// tuneLocked tells the tuner that a request moved n bytes. The tuner answers with the number of
// connections that the pool should have. If the pool has more or fewer, tuneLocked starts to remove
// or to add one connection. The result says why, and is "" if the number does not change.
func (g *growth) tuneLocked(n int64) (change string) {
	p := g.pool
	if g.tuner == nil || p.life.ended() != nil {
		return ""
	}
	have, busy := 0, 0
	for _, h := range p.handles {
		if h.usableLocked() {
			have++
		}
		busy += h.inFlight + h.waiting
	}
	want := g.tuner.Add(time.Since(g.started), n, have, busy >= have*(p.o.Depth+1)/2)
	switch {
	case want > len(p.handles) && have == len(p.handles) && !g.opening:
		g.opening = true
		p.life.background.Go(g.grow)
	case want < have:
		h := p.handles[len(p.handles)-1] // the first handle is never retired
		if !h.retiring {
			h.retiring = true
			g.retireIdleLocked(h)
		}
	}
	return g.tuner.Change()
}

// retireIdleLocked closes the connection h if it is to be removed from the pool (h.retiring) and
// no request uses it or waits for it.
func (g *growth) retireIdleLocked(h *handle) {
	if !h.retiring || h.inFlight+h.waiting > 0 {
		return
	}
	g.pool.removeLocked(h)
	h.setSessionLocked(nil)
	select {
	case <-h.retire:
	default:
		close(h.retire)
	}
}

// The method grow adds a connection if the Budget of the host has memory for it.
func (g *growth) grow() {
	defer g.opened()
	at := g.pool.opener.at.Load()
	free, ok := g.pool.opener.tryReserve(at)
	if !ok {
		g.denied()
		return
	}
	g.add(free, at.budget)
}

// The method denied records that the host has no memory for one more connection.
func (g *growth) denied() {
	g.pool.mu.Lock()
	n := len(g.pool.handles)
	g.tuner.Denied(n)
	g.pool.mu.Unlock()
	g.pool.report.debug("", fmt.Sprintf("no further connection to %d: the memory and connections that vddkcp may use on the host are in use", n))
}

// The method opened records that the opening of further connections in the background has ended,
// with or without success.
func (g *growth) opened() {
	g.pool.mu.Lock()
	defer g.pool.mu.Unlock()
	g.opening = false
	g.pool.changed.Broadcast()
}

// The method add opens one more connection. If the opening fails, the pool continues without this
// connection, and the user is warned once. However, if Options.Refresh returns a permanent error,
// all later requests of the pool fail. The function free gives the memory of the connection back to
// the given Budget of the host. free is called when the connection is closed or could not be
// opened.
func (g *growth) add(free func(), budget *Budget) (added bool) {
	p := g.pool
	s, err := p.opener.open(p.life.ending, false, false)
	if err == nil && p.life.ending.Err() != nil {
		s.proc.Kill()
		s.proc.Release()
		err = p.life.ended()
	}
	if err != nil {
		free()
		p.mu.Lock()
		n := len(p.handles)
		if g.tuner != nil {
			g.tuner.Failed(n)
		}
		final := errors.As(err, new(*refreshError))
		if final {
			p.dieLocked(err)
		}
		p.mu.Unlock()
		if p.life.ended() == nil && !final {
			p.report.warnOnce(&g.warned, fmt.Sprintf("%s: cannot open one more connection, reading continues with %d: %v", p.life.Name, n, err))
		}
		return false
	}
	p.mu.Lock()
	before := p.addLocked(newHandle(p, free, budget), s)
	p.broadcastLocked() // requests that wait for another handle may use the new one
	p.mu.Unlock()
	p.warnTransport(before, s.opened.Transport)
	p.report.debug("datapath", "one connection more")
	return true
}
