package server

import (
	"context"
	"math/bits"
	"sync"
	"time"
)

const (
	// maxPiece is the most bytes of a request that are in memory as one: longer
	// ones are worked on in pieces.
	maxPiece = 1 << 20
	minPiece = 4 << 10
	// stall is how long a client may take nothing while others wait for memory.
	stall = 20 * time.Second
)

// memory is what requests in work have for their data. A connection that holds
// none gets its first piece out of all of it; more than that comes out of one
// half. So clients that ask for much and take nothing leave the other half to
// all others. Where even that is used up, those are dropped whose client has
// taken nothing for a while.
type memory struct {
	all         int64
	dropStalled func(time.Duration)

	mu      sync.Mutex
	used    int64
	waiting []*waiter // in the order they came

	free [9]sync.Pool // of *buffer, by size: minPiece to maxPiece
}

// holder is a connection as memory sees it.
type holder struct{ held int64 } // under memory.mu

type waiter struct {
	of    *holder
	n     int64
	ready chan struct{}
}

// buffer is a piece of memory; b may be cut by who has it.
type buffer struct {
	b  []byte
	of *holder
	n  int64 // its size
}

func newMemory(all int64, dropStalled func(time.Duration)) *memory {
	return &memory{all: max(all, 4*maxPiece), dropStalled: dropStalled}
}

// class is the index of the smallest size that n bytes fit in.
func class(n int) int { return bits.Len(uint(max(n, minPiece)-1)) - bits.Len(minPiece-1) }

// get returns n bytes, at most maxPiece, and waits for them until ctx ends.
func (m *memory) get(ctx context.Context, of *holder, n int) (*buffer, error) {
	if err := m.wait(ctx, &waiter{of: of, n: minPiece << class(n)}); err != nil {
		return nil, err
	}
	return m.buffer(of, n), nil
}

// try is get without waiting; nil: there is none.
func (m *memory) try(of *holder, n int) *buffer {
	if !m.now(&waiter{of: of, n: minPiece << class(n)}) {
		return nil
	}
	return m.buffer(of, n)
}

// buffer returns n of the bytes that were taken.
func (m *memory) buffer(of *holder, n int) *buffer {
	c := class(n)
	b, _ := m.free[c].Get().(*buffer)
	if b == nil {
		b = &buffer{b: make([]byte, minPiece<<c)}
	}
	b.b, b.of, b.n = b.b[:n], of, minPiece<<c
	return b
}

func (m *memory) put(b *buffer) {
	of, size := b.of, b.n
	b.of = nil
	m.free[class(int(size))].Put(b)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.used -= size
	of.held -= size
	m.grant()
}

// fits reports whether w can have its memory; others say that more than the
// first piece is refused for now.
func (m *memory) fits(w *waiter, others bool) bool {
	if w.of.held == 0 {
		return m.used+w.n <= m.all
	}
	return !others && m.used+w.n <= m.all/2
}

// grant gives memory to those that wait, in order. The caller holds m.mu.
func (m *memory) grant() {
	if len(m.waiting) == 0 {
		return
	}
	still, refused := m.waiting[:0], false
	for _, w := range m.waiting {
		if !m.fits(w, refused) {
			refused = true
			still = append(still, w)
			continue
		}
		m.take(w)
		close(w.ready)
	}
	clear(m.waiting[len(still):])
	m.waiting = still
}

func (m *memory) take(w *waiter) {
	m.used += w.n
	w.of.held += w.n
}

// now gives w its memory if nobody waits for it.
func (m *memory) now(w *waiter) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.fits(w, len(m.waiting) > 0) {
		return false
	}
	m.take(w)
	return true
}

func (m *memory) wait(ctx context.Context, w *waiter) error {
	m.mu.Lock()
	if m.fits(w, len(m.waiting) > 0) {
		m.take(w)
		m.mu.Unlock()
		return nil
	}
	w.ready = make(chan struct{})
	m.waiting = append(m.waiting, w)
	m.mu.Unlock()

	timer := time.NewTicker(stall)
	defer timer.Stop()
	for {
		select {
		case <-w.ready:
			return nil
		case <-timer.C:
			m.dropStalled(stall)
		case <-ctx.Done():
			m.mu.Lock()
			defer m.mu.Unlock()
			for i, other := range m.waiting {
				if other == w {
					m.waiting = append(m.waiting[:i], m.waiting[i+1:]...)
					m.grant() // it may have kept others waiting
					return context.Cause(ctx)
				}
			}
			m.used -= w.n // it came at the same time
			w.of.held -= w.n
			m.grant()
			return context.Cause(ctx)
		}
	}
}
