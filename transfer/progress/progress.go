// Package progress counts the work of a copy and shows the counts while the copy runs.
//
// The copy updates [Counters]. A [Display] shows the counters of one copy, and a [BatchDisplay]
// those of many copies. Other output to the same stream must go through the method Write of the
// display.
package progress

import (
	"sync/atomic"
	"time"
)

// Phase is a stage in the life of a copy.
type Phase int32

// These are the phases of a copy, in order.
const (
	Plan Phase = iota
	Copy
	Verify
	Finish
)

// String returns the name of the phase in JSON output.
func (p Phase) String() string {
	return [...]string{"plan", "copy", "verify", "finish"}[p]
}

// Counters count the bytes of a copy. Work that is in progress is not counted as
// done. The zero value is ready to use, and all methods are safe for concurrent use.
type Counters struct {
	phase                         atomic.Int32
	planned, done, skipped        atomic.Int64
	read, written, zeroed, cloned atomic.Int64
	examined, size                atomic.Int64 // see Examined
	waits                         [numWaits]atomic.Int64
	reads, connections            atomic.Int64
}

// Enter records that the copy has entered a phase.
func (c *Counters) Enter(p Phase) { c.phase.Store(int32(p)) }

// Examined records that the extents of the first n bytes of the disk are known. The parameter size
// is the size of the disk, in bytes.
func (c *Counters) Examined(n, size int64) {
	c.examined.Store(n)
	c.size.Store(size)
}

// AddPlanned adds n bytes that the copy must move or zero. A negative n says that planned bytes need
// no work after all.
func (c *Counters) AddPlanned(n int64) { c.planned.Add(n) }

// AddDone adds n planned bytes that are done. A negative n says that done work is lost and must be
// done again.
func (c *Counters) AddDone(n int64) { c.done.Add(n) }

// AddSkipped adds n bytes that need no work, such as holes. A negative n says that skipped bytes
// need work after all.
func (c *Counters) AddSkipped(n int64) { c.skipped.Add(n) }

// AddRead adds n bytes read from the source.
func (c *Counters) AddRead(n int64) { c.read.Add(n) }

// AddWritten adds n bytes written to the target.
func (c *Counters) AddWritten(n int64) { c.written.Add(n) }

// AddZeroed adds n bytes that were zeroed in the target without writing zeros.
func (c *Counters) AddZeroed(n int64) { c.zeroed.Add(n) }

// AddCloned adds n bytes whose blocks the target shares with the source.
func (c *Counters) AddCloned(n int64) { c.cloned.Add(n) }

// Snapshot holds the values of Counters at one moment, in bytes.
type Snapshot struct {
	Phase                         Phase
	Planned, Done, Skipped        int64
	Read, Written, Zeroed, Cloned int64

	Examined, Size int64 // see Counters.Examined

	Waits       Waits
	Reads       int // reads of the source that are in progress
	Connections int // see Counters.SetConnections
}

// Snapshot returns the present values. Done never exceeds Planned.
func (c *Counters) Snapshot() Snapshot {
	// The counter of done bytes is loaded first. A copy plans work before it does it, so work
	// between the two loads cannot make the done bytes exceed the planned bytes.
	done := c.done.Load()
	return Snapshot{
		Phase:   Phase(c.phase.Load()),
		Planned: c.planned.Load(), Done: done, Skipped: c.skipped.Load(),
		Read: c.read.Load(), Written: c.written.Load(), Zeroed: c.zeroed.Load(), Cloned: c.cloned.Load(),
		Examined: c.examined.Load(), Size: c.size.Load(),
		Waits: c.waited(), Reads: int(c.reads.Load()), Connections: int(c.connections.Load()),
	}
}

// meter computes the rate of a copy over the last ten intervals between calls of add. If add is
// called each second, a pause of the copy shows soon in the rate, and a burst does not raise the
// rate too much.
type meter struct {
	at   [11]time.Time
	done [11]int64 // Snapshot.Done at these times
	n    int       // number of points in use
}

// add records a value of the counter Snapshot.Done, and the time at which the counter had this
// value. It should be called about once a second, and returns the rate in bytes per second. When a
// copy has lost the connection to its target and repeats work, the counter decreases. add then
// reduces all recorded values by the same number, so that the rate is never negative.
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
