package vddk

import "sync"

// rangeLock locks ranges of the disk. While a range is locked, no range that overlaps it can be
// locked. The zero value has no locked range. It is safe for concurrent use.
type rangeLock struct {
	mu       sync.Mutex
	unlocked sync.Cond // signals that a range was unlocked
	locked   [][2]int64
}

// The method lock waits until no locked range overlaps the range [start, end). Then it locks this
// range.
func (r *rangeLock) lock(start, end int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unlocked.L = &r.mu
	for r.overlaps(start, end) {
		r.unlocked.Wait()
	}
	r.locked = append(r.locked, [2]int64{start, end})
}

func (r *rangeLock) overlaps(start, end int64) bool {
	for _, l := range r.locked {
		if start < l[1] && l[0] < end {
			return true
		}
	}
	return false
}

// The method unlock unlocks the range [start, end). The method lock was called with the same two
// numbers.
func (r *rangeLock) unlock(start, end int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, l := range r.locked {
		if l == [2]int64{start, end} {
			r.locked = append(r.locked[:i], r.locked[i+1:]...)
			break
		}
	}
	r.unlocked.Broadcast()
}
