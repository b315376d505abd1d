// Package progress counts the work of a copy and shows the counts while the copy runs.
//
// The copy updates [Counters]. A [Display] shows the counters of one copy, and a [BatchDisplay]
// those of many copies. Other output to the same stream must go through the method Write of the
// display.
package progress

import (
	"sync"
	"sync/atomic"
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
//
// Two kinds of work are planned: copying, and checks that read the target back. The number of
// planned bytes is known when the copy begins, and stays the same. Ranges that the plan has not
// examined are planned as work. If they turn out to be holes, they are counted as done when the
// copy reaches them.
type Counters struct {
	phase                         atomic.Int32
	planned, done, skipped        atomic.Int64 // of the copy, without checks
	checks, checked               atomic.Int64 // of checks: planned and done
	free                          atomic.Int64 // see Snapshot.Free
	late                          atomic.Int64 // see AddFree
	read, written, zeroed, cloned atomic.Int64
	examined, size                atomic.Int64 // see Examined
	connections                   atomic.Int64
	wait                          waiting

	mu   sync.Mutex
	lost int64 // bytes of done that must be done again; guarded by mu
}

// Enter records that the copy has entered a phase.
func (c *Counters) Enter(p Phase) { c.phase.Store(int32(p)) }

// Examined records that the extents of the first n bytes of the disk are known. The parameter size
// is the size of the disk, in bytes.
func (c *Counters) Examined(n, size int64) {
	c.examined.Store(n)
	c.size.Store(size)
}

// AddPlanned adds n bytes that the copy must move or zero.
func (c *Counters) AddPlanned(n int64) { c.planned.Add(n) }

// AddDone adds n planned bytes that are done. Bytes that repeat work of Lose do not count again.
func (c *Counters) AddDone(n int64) { c.done.Add(c.repeat(n)) }

// AddFree adds n planned bytes that needed no work, because they are holes that were not known when
// the copy began, or because an earlier run has copied them.
func (c *Counters) AddFree(n int64) {
	c.free.Add(n)
	n = c.repeat(n)
	c.late.Add(n)
	c.done.Add(n)
}

// Restart records that the copy begins again at a place from which it must do n planned bytes. The
// number of done bytes does not decrease. It increases again when the lost work is repeated.
func (c *Counters) Restart(n int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lost = max(0, c.done.Load()+n-c.planned.Load())
}

// repeat returns how many of n done bytes are not a repetition of lost work.
func (c *Counters) repeat(n int64) int64 {
	c.mu.Lock()
	defer c.mu.Unlock()
	again := min(n, c.lost)
	c.lost -= again
	c.free.Add(-again)
	return n - again
}

// AddSkipped adds n bytes that need no work, such as holes. A negative n says that skipped bytes
// need work after all.
func (c *Counters) AddSkipped(n int64) { c.skipped.Add(n) }

// AddChecks adds n bytes that will be read back after the copy.
func (c *Counters) AddChecks(n int64) { c.checks.Add(n) }

// AddChecked adds n bytes of AddChecks that are done. The parameter read is how many bytes were
// read for that.
func (c *Counters) AddChecked(n, read int64) {
	c.free.Add(n - read)
	c.checked.Add(n)
}

// AddUnchecked adds up to n bytes of AddChecks that need no reading, because they are holes of the
// target.
func (c *Counters) AddUnchecked(n int64) {
	if n = min(n, c.checks.Load()-c.checked.Load()); n > 0 {
		c.AddChecked(n, 0)
	}
}

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
	Planned, Done                 int64 // with checks; Planned is 0 while the size of a stream is not known
	Checks, Checked               int64 // the parts of Planned and Done that are checks
	Skipped                       int64
	Read, Written, Zeroed, Cloned int64

	Free int64 // bytes of Done that needed no work, minus bytes whose work was repeated
	Late int64 // bytes of Planned and Done that AddFree has counted

	Examined, Size int64 // see Counters.Examined

	Waits       Waits
	Reads       int // reads of the source that are in progress or wait for the rate limit
	Connections int // see Counters.SetConnections
}

// Snapshot returns the present values. Done never exceeds Planned, unless Planned is 0 because the
// size of a stream is not known yet.
func (c *Counters) Snapshot() Snapshot {
	// The counter of done bytes is loaded first. A copy plans work before it does it, so work
	// between the two loads cannot make the done bytes exceed the planned bytes.
	done, checked, late := c.done.Load(), c.checked.Load(), c.late.Load()
	checks := c.checks.Load()
	waits, reads := c.wait.snapshot()
	return Snapshot{
		Phase:   Phase(c.phase.Load()),
		Planned: c.planned.Load() + checks, Done: done + checked, Skipped: c.skipped.Load(),
		Checks: checks, Checked: checked, Free: c.free.Load(), Late: late,
		Read: c.read.Load(), Written: c.written.Load(), Zeroed: c.zeroed.Load(), Cloned: c.cloned.Load(),
		Examined: c.examined.Load(), Size: c.size.Load(),
		Waits: waits, Reads: reads, Connections: int(c.connections.Load()),
	}
}

// Work returns how many bytes the copy has to move or zero, as far as that is known.
func (s Snapshot) Work() int64 { return s.Planned - s.Checks - s.Late }

// Moved returns how many bytes the copy and its checks have really processed. Bytes whose work was
// repeated count twice.
func (s Snapshot) Moved() int64 { return s.Done - s.Free }

// Add adds the counts of another copy. The field Phase of s stays as it is.
func (s *Snapshot) Add(other Snapshot) {
	s.Planned += other.Planned
	s.Done += other.Done
	s.Checks += other.Checks
	s.Checked += other.Checked
	s.Skipped += other.Skipped
	s.Read += other.Read
	s.Written += other.Written
	s.Zeroed += other.Zeroed
	s.Cloned += other.Cloned
	s.Free += other.Free
	s.Late += other.Late
	s.Examined += other.Examined
	s.Size += other.Size
	for i := range s.Waits {
		s.Waits[i] += other.Waits[i]
	}
	s.Reads += other.Reads
	s.Connections += other.Connections
}
