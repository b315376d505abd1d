package progress

import (
	"sync"
	"time"
)

// Wait is something that a copy waits for. The waits of a copy show which part of the copy limits
// its speed.
type Wait int

// These are the things that a copy waits for.
const (
	WaitSource     Wait = iota // reads of the source
	WaitEncoders               // the goroutines that inspect, hash and compress data
	WaitTarget                 // writes and syncs of the target
	WaitRateLimit              // the limit of bytes per second that the user has set
	WaitHostBudget             // the memory and the connections that copies may use on an ESXi host
	numWaits
)

// String returns the name of w, as messages show it.
func (w Wait) String() string {
	return [...]string{"source", "encoders", "target", "rate limit", "host budget"}[w]
}

// Waits holds, for each Wait, the time that a copy has spent on waiting for it. A copy waits for
// one thing at a time, so the sum of the times is at most the duration of the copy.
type Waits [numWaits]time.Duration

// Since returns the times that have been added since an earlier value of the same Waits.
func (w Waits) Since(earlier Waits) Waits {
	for i := range w {
		w[i] -= earlier[i]
	}
	return w
}

// Longest returns the Wait with the longest time. The result ok is false if all times are zero.
func (w Waits) Longest() (longest Wait, ok bool) {
	for i := range w {
		if w[i] > w[longest] {
			longest = Wait(i)
		}
	}
	return longest, w[longest] > 0
}

// The type waiting finds out what a copy waits for, and adds up the times. Each part of the copy,
// such as a worker, records what it waits for itself. The method longest says what the copy as a
// whole waits for. The methods whose names end in Locked are called with mu held.
type waiting struct {
	mu         sync.Mutex
	parts      [numWaits]int // numbers of parts of the copy, by what they wait for
	background [numWaits]int // see Counters.Background
	finished   int           // see Counters.Finished
	collecting bool          // the collector has a piece; field by says what it does with it
	by         Wait

	times Waits     // up to the time since
	since time.Time // when the last change was made
	whole Wait      // what the whole copy waits for since then; none: nothing
}

// none is the value of waiting.whole if the copy waits for nothing. Before the first change, whole
// has no meaning, and since is the zero time.
const none Wait = -1

// changeLocked adds the time since the last change to the times. The caller changes the fields
// afterwards, and then calls decideLocked.
func (w *waiting) changeLocked() {
	now := time.Now()
	if !w.since.IsZero() && w.whole != none {
		w.times[w.whole] += now.Sub(w.since)
	}
	w.since = now
}

// decideLocked decides what the whole copy waits for.
//
// If a part of the copy waits for the host budget or the rate limit, the whole copy does. The other
// parts would otherwise have more to do: while the target or the encoders are the slowest, no part
// reaches the limit. In every other case, the copy waits for the stage at which most of its pieces
// wait, because pieces pile up before the slowest stage.
//
// A piece that is being read waits for the source. A piece that the workers have finished waits for
// the collector, and so for what the collector does now. However, while the collector itself waits
// for the next piece in order, the pieces behind that one do not count.
func (w *waiting) decideLocked() {
	parts := w.parts
	if w.collecting {
		parts[w.by] += w.finished
	}
	switch {
	case parts[WaitHostBudget] > 0:
		w.whole = WaitHostBudget
		return
	case parts[WaitRateLimit] > 0:
		w.whole = WaitRateLimit
		return
	}
	w.whole = none
	most := 0
	for i, n := range parts {
		if n > most {
			w.whole, most = Wait(i), n
		}
	}
	for i := len(w.background) - 1; i >= 0 && w.whole == none; i-- {
		if w.background[i] > 0 {
			w.whole = Wait(i)
		}
	}
}

func (w *waiting) add(wait Wait, n int) {
	w.mu.Lock()
	w.changeLocked()
	w.parts[wait] += n
	w.decideLocked()
	w.mu.Unlock()
}

// Begin records that a part of the copy begins to wait for w. The caller calls End afterwards. A
// part that waits for WaitSource is a read of the source in progress.
func (c *Counters) Begin(w Wait) { c.wait.add(w, 1) }

// End ends what Begin has begun.
func (c *Counters) End(w Wait) { c.wait.add(w, -1) }

// Background records what the copy waits for while none of its parts waits for anything. The caller
// calls the result at the end. If Background is called again before that, for another Wait, the
// later constant counts.
func (c *Counters) Background(w Wait) (end func()) {
	c.wait.addBackground(w, 1)
	return func() { c.wait.addBackground(w, -1) }
}

func (w *waiting) addBackground(wait Wait, n int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.changeLocked()
	w.background[wait] += n
	w.decideLocked()
}

// Finished records that a piece is ready for the collector, the part of the copy that gets all
// pieces in order.
func (c *Counters) Finished() {
	w := &c.wait
	w.mu.Lock()
	w.changeLocked()
	w.finished++
	w.decideLocked()
	w.mu.Unlock()
}

// Collecting records that the collector works on a piece that is Finished, and what this piece and
// the other pieces that are Finished wait for meanwhile.
func (c *Counters) Collecting(by Wait) {
	w := &c.wait
	w.mu.Lock()
	w.changeLocked()
	w.collecting, w.by = true, by
	w.decideLocked()
	w.mu.Unlock()
}

// Collected records that the collector has ended its work on a piece.
func (c *Counters) Collected() { c.wait.collected(1) }

// DropFinished records that no piece is Finished any more, because the collector has ended.
func (c *Counters) DropFinished() { c.wait.collected(-1) }

// The method collected takes n pieces from those that are finished, or all pieces if n is -1.
func (w *waiting) collected(n int) {
	w.mu.Lock()
	w.changeLocked()
	if n < 0 {
		n = w.finished
	}
	w.finished, w.collecting = w.finished-n, false
	w.decideLocked()
	w.mu.Unlock()
}

// SetConnections records the number of connections that the source uses now. It stays 0 for a
// source without connections, such as a file.
func (c *Counters) SetConnections(n int) { c.connections.Store(int64(n)) }

// snapshot returns the times up to now, and the number of reads that are in progress or wait for
// the rate limit.
func (w *waiting) snapshot() (times Waits, reads int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.changeLocked()
	w.decideLocked()
	return w.times, w.parts[WaitSource] + w.parts[WaitRateLimit]
}
