package vddk

import "sync"

// rangeLock lets one at a time have a range. The zero value is ready.
type rangeLock struct {
	mu   sync.Mutex
	free sync.Cond
	held [][2]int64
}

func (r *rangeLock) lock(from, to int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.free.L = &r.mu
	for r.overlaps(from, to) {
		r.free.Wait()
	}
	r.held = append(r.held, [2]int64{from, to})
}

func (r *rangeLock) overlaps(from, to int64) bool {
	for _, h := range r.held {
		if from < h[1] && h[0] < to {
			return true
		}
	}
	return false
}

func (r *rangeLock) unlock(from, to int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, h := range r.held {
		if h == [2]int64{from, to} {
			r.held = append(r.held[:i], r.held[i+1:]...)
			break
		}
	}
	r.free.Broadcast()
}
