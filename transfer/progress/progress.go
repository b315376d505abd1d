// Package progress counts what a copy has done and shows it while it runs.
package progress

import (
	"sync/atomic"
	"time"
)

// Phase is the part of a copy that is under way.
type Phase int32

// The phases of a copy, in their order.
const (
	Plan Phase = iota
	Copy
	Verify
	Finish
)

func (p Phase) String() string {
	return [...]string{"plan", "copy", "verify", "finish"}[p]
}

// Counters are filled by a copy while others read them. They count bytes that
// are done, never bytes that were only asked for. The zero value is ready; all
// methods are safe for concurrent use.
type Counters struct {
	phase                         atomic.Int32
	planned, done, skipped        atomic.Int64
	read, written, zeroed, cloned atomic.Int64
	examined, size                atomic.Int64 // of the plan
}

// Enter starts a phase.
func (c *Counters) Enter(p Phase) { c.phase.Store(int32(p)) }

// Examined sets how many bytes of a disk of a size were asked for their
// allocation.
func (c *Counters) Examined(n, size int64) {
	c.examined.Store(n)
	c.size.Store(size)
}

// AddPlanned adds n bytes to what the copy has to move or to zero.
func (c *Counters) AddPlanned(n int64) { c.planned.Add(n) }

// AddDone adds n bytes of what was planned.
func (c *Counters) AddDone(n int64) { c.done.Add(n) }

// AddSkipped adds n bytes that need nothing to be done.
func (c *Counters) AddSkipped(n int64) { c.skipped.Add(n) }

// AddRead adds n bytes read from the source.
func (c *Counters) AddRead(n int64) { c.read.Add(n) }

// AddWritten adds n bytes written to the target.
func (c *Counters) AddWritten(n int64) { c.written.Add(n) }

// AddZeroed adds n bytes that the target holds as zeros without their being
// written.
func (c *Counters) AddZeroed(n int64) { c.zeroed.Add(n) }

// AddCloned adds n bytes that the target shares with the source.
func (c *Counters) AddCloned(n int64) { c.cloned.Add(n) }

// Snapshot is what Counters held at one moment, in bytes.
type Snapshot struct {
	Phase                         Phase
	Planned, Done, Skipped        int64
	Read, Written, Zeroed, Cloned int64

	Examined, Size int64 // of the plan: how much of which disk
}

// Snapshot returns the present values.
func (c *Counters) Snapshot() Snapshot {
	// Done is loaded before planned. A copy plans work before it does it, so a
	// snapshot never has more done than planned.
	done := c.done.Load()
	return Snapshot{
		Phase:   Phase(c.phase.Load()),
		Planned: c.planned.Load(), Done: done, Skipped: c.skipped.Load(),
		Read: c.read.Load(), Written: c.written.Load(), Zeroed: c.zeroed.Load(), Cloned: c.cloned.Load(),
		Examined: c.examined.Load(), Size: c.size.Load(),
	}
}

// meter turns snapshots into a rate: the mean of the last ten seconds, so that
// a pause shows and a burst does not promise too much.
type meter struct {
	at   [11]time.Time
	done [11]int64
	n    int
}

// add takes a snapshot's Done at a time, about once a second, and returns the
// rate in bytes a second. Done decreases when a copy has lost its target and repeats
// work; the rate is then that of the work before, and never negative.
func (m *meter) add(now time.Time, done int64) float64 {
	if m.n > 0 {
		if back := m.done[m.n-1] - done; back > 0 {
			for i := range m.n {
				m.done[i] -= back
			}
		}
	}
	if m.n < len(m.at) {
		m.at[m.n], m.done[m.n] = now, done
		m.n++
	} else {
		copy(m.at[:], m.at[1:])
		copy(m.done[:], m.done[1:])
		m.at[m.n-1], m.done[m.n-1] = now, done
	}
	elapsed := now.Sub(m.at[0]).Seconds()
	if elapsed <= 0 {
		return 0
	}
	return float64(done-m.done[0]) / elapsed
}
