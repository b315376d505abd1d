package progress

import "time"

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

// AddWait records that the copy has spent the time d on waiting for w.
func (c *Counters) AddWait(w Wait, d time.Duration) { c.waits[w].Add(int64(d)) }

// AddReads adds n to the number of reads of the source that are in progress. The caller adds 1
// before a read and -1 after it.
func (c *Counters) AddReads(n int) { c.reads.Add(int64(n)) }

// SetConnections records the number of connections that the source uses now. It stays 0 for a
// source without connections, such as a file.
func (c *Counters) SetConnections(n int) { c.connections.Store(int64(n)) }

// waited returns the present values of the counters of AddWait.
func (c *Counters) waited() (w Waits) {
	for i := range w {
		w[i] = time.Duration(c.waits[i].Load())
	}
	return w
}
