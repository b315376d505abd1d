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
	// reserve is the size of the piece that each connection can always have,
	// beyond what all share.
	reserve = 16 << 10
	// patience is how long a connection waits for shared memory before it works
	// with its reserve, and how long it keeps shared memory for data that do
	// not arrive.
	patience = 500 * time.Millisecond
	// maxTries is how often it waits so long while memory is given back to
	// others.
	maxTries = 4
)

// memory is the memory that requests in work have for their data. All
// connections share it: a connection that holds none gets its first piece out
// of all of it, further pieces come out of one half, and the connections of one
// peer leave a quarter to the others.
//
// Whatever the others hold, and however long, each connection can have one
// piece of reserve bytes beside it. So a request waits for its own client and
// its own disk only. Under pressure, onPressure is told.
type memory struct {
	all        int64
	onPressure func() // a connection has to work with its reserve

	mu       sync.Mutex
	used     int64
	released uint64    // counts pieces of the shared memory that were given back
	waiting  []*waiter // in the order they came

	free [9]sync.Pool // of *buffer, by size: minPiece to maxPiece
}

// peer is a host or process that has connections.
type peer struct {
	held        int64 // under memory.mu
	connections int   // under Server.mu
}

// holder is a connection as memory sees it.
type holder struct {
	peer *peer

	// All under memory.mu.
	held          int64 // of the shared memory
	reserved      bool  // its reserve is in use
	mayUseReserve bool  // it waited in vain, and does not wait again before it uses its reserve
}

type waiter struct {
	holder  *holder
	n       int64
	reserve bool          // what it got is its reserve
	ready   chan struct{} // closed when it got something
}

// buffer is a piece of memory; b may be cut by who has it.
type buffer struct {
	b       []byte
	holder  *holder
	n       int64 // its size
	reserve bool
}

func newMemory(all int64, onPressure func()) *memory {
	return &memory{all: max(all, 4*maxPiece), onPressure: onPressure}
}

// class is the index of the smallest size that n bytes fit in.
func class(n int) int { return bits.Len(uint(max(n, minPiece)-1)) - bits.Len(minPiece-1) }

// get returns n bytes, at most maxPiece, or fewer where memory is short, but
// then min(n, reserve). It waits for them until ctx ends.
func (m *memory) acquire(ctx context.Context, of *holder, n int) (*buffer, error) {
	w := &waiter{holder: of, n: minPiece << class(n)}
	if err := m.wait(ctx, w); err != nil {
		return nil, err
	}
	if !w.reserve {
		return m.buffer(of, n), nil
	}
	b := m.buffer(of, min(n, reserve))
	b.reserve = true
	m.onPressure()
	return b, nil
}

// try is get without waiting, and without the reserve; nil: there is none.
func (m *memory) tryAcquire(of *holder, n int) *buffer {
	w := waiter{holder: of, n: minPiece << class(n)}
	m.mu.Lock()
	if m.room(&w, len(m.waiting) > 0) != fits {
		m.mu.Unlock()
		return nil
	}
	m.charge(&w)
	m.mu.Unlock()
	return m.buffer(of, n)
}

// buffer returns n of the bytes that were taken.
func (m *memory) buffer(of *holder, n int) *buffer {
	c := class(n)
	b, _ := m.free[c].Get().(*buffer)
	if b == nil {
		b = &buffer{b: make([]byte, minPiece<<c)}
	}
	b.b, b.holder, b.n, b.reserve = b.b[:n], of, minPiece<<c, false
	return b
}

func (m *memory) release(b *buffer) {
	of, size, own := b.holder, b.n, b.reserve
	b.holder = nil
	m.free[class(int(size))].Put(b)
	m.mu.Lock()
	defer m.mu.Unlock()
	if own {
		of.reserved = false
	} else {
		m.refund(of, size)
	}
	m.grant()
}

// room says why w can't have its memory.
type verdict uint8

const (
	fits     verdict = iota
	noRoom           // all who come later and hold memory wait too
	peerFull         // that concerns connections of the peer only
)

// room says whether w can have its memory; others says that more than the first
// piece is refused for now. The caller holds m.mu.
func (m *memory) room(w *waiter, others bool) verdict {
	switch {
	case w.holder.peer.held+w.n > m.all-m.all/4:
		return peerFull
	case w.holder.held == 0 && m.used+w.n <= m.all:
		return fits
	case w.holder.held != 0 && !others && m.used+w.n <= m.all/2:
		return fits
	}
	return noRoom
}

// grant gives memory to those that wait, in order. The caller holds m.mu.
func (m *memory) grant() {
	if len(m.waiting) == 0 {
		return
	}
	still, refused := m.waiting[:0], false
	for _, w := range m.waiting {
		found := m.room(w, refused)
		switch {
		case found == fits:
			m.charge(w)
			close(w.ready)
			continue
		case w.holder.mayUseReserve && !w.holder.reserved:
			m.useReserve(w)
			close(w.ready)
			continue
		}
		refused = refused || found == noRoom
		still = append(still, w)
	}
	clear(m.waiting[len(still):])
	m.waiting = still
}

func (m *memory) charge(w *waiter) {
	m.used += w.n
	w.holder.held += w.n
	w.holder.peer.held += w.n
	w.holder.mayUseReserve = false
}

func (m *memory) refund(of *holder, n int64) {
	m.released++
	m.used -= n
	of.held -= n
	of.peer.held -= n
}

func (m *memory) useReserve(w *waiter) { w.reserve, w.holder.reserved = true, true }

// holds reports whether of holds shared memory.
func (m *memory) holdsShared(of *holder) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return of.held > 0
}

// enqueue gives w what it can have at once, and reports whether that is
// something. Else w waits.
func (m *memory) acquireOrQueue(w *waiter) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.room(w, len(m.waiting) > 0) == fits:
		m.charge(w)
		return true
	case w.holder.mayUseReserve && !w.holder.reserved:
		m.useReserve(w)
		return true
	}
	w.ready = make(chan struct{})
	m.waiting = append(m.waiting, w)
	return false
}

func (m *memory) wait(ctx context.Context, w *waiter) error {
	if m.acquireOrQueue(w) {
		return nil
	}
	timer := time.NewTimer(patience)
	defer timer.Stop()
	seen := m.releases()
	for tries := 1; ; tries++ {
		select {
		case <-w.ready:
			return nil
		case <-timer.C:
			if now := m.releases(); now != seen && tries < maxTries {
				// The disks are slow, not the clients: large pieces are worth a
				// longer wait.
				seen = now
				timer.Reset(patience)
				continue
			}
			m.allowReserve(w)
		case <-ctx.Done():
			m.cancel(w)
			return context.Cause(ctx)
		}
	}
}

func (m *memory) releases() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.released
}

// squeeze lets w have its reserve, now or when that is given back.
func (m *memory) allowReserve(w *waiter) {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-w.ready: // at the same time
	default:
		w.holder.mayUseReserve = true
		m.grant()
	}
}

// forget takes back what w waits for, or has got at the same time.
func (m *memory) cancel(w *waiter) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, other := range m.waiting {
		if other == w {
			m.waiting = append(m.waiting[:i], m.waiting[i+1:]...)
			m.grant() // it may have kept others waiting
			return
		}
	}
	if w.reserve {
		w.holder.reserved = false
	} else {
		m.refund(w.holder, w.n)
	}
	m.grant()
}

// memory returns n bytes for a request, or fewer where memory is short.
func (c *conn) allocate(n int) (*buffer, error) {
	if b := c.s.memory.tryAcquire(&c.holder, n); b != nil {
		return b, nil
	}
	c.out.flushReplies()
	return c.s.memory.acquire(c.ctx, &c.holder, n)
}
