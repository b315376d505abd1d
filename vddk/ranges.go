package vddk

import "sync"

// rangeLock locks ranges of the disk: a range cannot be locked while another one that
// overlaps it is locked. The zero value is unlocked. It is safe for concurrent use.
type rangeLock struct {
	mu       sync.Mutex
	unlocked sync.Cond // signals that a range was unlocked
	locked   [][2]int64
}

// lock locks [from, to). It waits until no range is locked that overlaps it.
func (r *rangeLock) lock(from, to int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unlocked.L = &r.mu
	for r.overlaps(from, to) {
		r.unlocked.Wait()
	}
	r.locked = append(r.locked, [2]int64{from, to})
}

func (r *rangeLock) overlaps(from, to int64) bool {
	for _, l := range r.locked {
		if from < l[1] && l[0] < to {
			return true
		}
	}
	return false
}

// unlock unlocks a range that was locked with the same borders.
func (r *rangeLock) unlock(from, to int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, l := range r.locked {
		if l == [2]int64{from, to} {
			r.locked = append(r.locked[:i], r.locked[i+1:]...)
			break
		}
	}
	r.unlocked.Broadcast()
}
