package server

import (
	"context"
	"math/bits"
	"sync"
	"time"
)

const (
	// maxPiece is the maximum size, in bytes, of a buffer for the data of requests. The data
	// of longer requests are processed in several pieces.
	maxPiece = 1 << 20
	// minPiece is the minimum size, in bytes, of a buffer for the data of requests.
	minPiece = 4 << 10
	// The constant reserve is the size, in bytes, of a buffer that each connection can
	// always get in addition to the shared memory. This buffer is called the reserve of
	// the connection.
	reserve = 16 << 10
	// The constant patience is how long a connection waits for shared memory at a time.
	// After this time, the connection uses its reserve or waits again (see maxTries). The
	// same limit applies to a client that sends the data for a buffer of more than 16 KiB
	// (see receive).
	patience = 500 * time.Millisecond
	// maxTries is the maximum number of times that a connection waits for shared memory
	// before it uses its reserve. Each wait takes half a second (the constant patience).
	// After a wait without success, the connection waits again only if other connections
	// have released memory during this wait.
	maxTries = 4
)

// The type memory keeps the account of the shared memory: the memory for the data of
// requests in progress, from which all connections take their buffers. A connection that
// holds no shared memory gets a buffer if the buffer fits in the free part of the shared
// memory. A connection that already holds shared memory gets another buffer only if all
// connections together then use at most half of the shared memory. The connections of
// one peer together can use at most three quarters of the shared memory.
//
// In addition, each connection can always get one buffer of up to 16 KiB (the constant
// reserve), however much memory other connections hold. Therefore slow clients and slow
// disks of other connections delay a request only for a limited time.
type memory struct {
	all        int64  // size of the shared memory in bytes
	onPressure func() // called when a connection has to use its reserve

	mu       sync.Mutex
	used     int64     // bytes of the shared memory
	released uint64    // number of buffers of the shared memory that were released
	waiting  []*waiter // in the order of their arrival

	free [9]sync.Pool // free buffers (*buffer) by size, from minPiece to maxPiece
}

// The type peer stands for an IP address, or a process on this machine, from which
// connections to the server come.
type peer struct {
	held        int64 // bytes of the shared memory, guarded by memory.mu
	connections int   // guarded by Server.mu
}

// The type holder is the memory account of one connection. All fields except peer are
// guarded by memory.mu.
type holder struct {
	peer *peer

	held          int64 // bytes of the shared memory
	reserved      bool  // the reserve is in use
	mayUseReserve bool  // the connection waited in vain, and uses the reserve without waiting again
}

// The type waiter stands for a connection that waits for a buffer.
type waiter struct {
	holder  *holder
	n       int64         // size of the buffer in bytes
	reserve bool          // the connection got its reserve instead
	ready   chan struct{} // closed when the connection got memory
}

// The type buffer is a piece of memory for the data of a request. The code that uses a
// buffer may shorten its slice b.
type buffer struct {
	b       []byte
	holder  *holder
	n       int64 // size in bytes, whatever the length of b
	reserve bool  // the buffer is the reserve of its holder
}

// newMemory returns the account for a shared memory that has the given size in bytes, or
// four times maxPiece if that is more. The account calls the function onPressure when a
// connection uses its reserve.
func newMemory(size int64, onPressure func()) *memory {
	return &memory{all: max(size, 4*maxPiece), onPressure: onPressure}
}

// The function class returns the number of the size class of a buffer of n bytes. The
// number is an index of memory.free.
func class(n int) int { return bits.Len(uint(max(n, minPiece)-1)) - bits.Len(minPiece-1) }

// The method acquire returns a buffer of n bytes, where n is at most maxPiece. If the
// connection has waited too long for shared memory (see patience and maxTries), the
// buffer is the connection's reserve, and has at most 16 KiB (the constant reserve).
// acquire fails only if ctx ends.
func (m *memory) acquire(ctx context.Context, h *holder, n int) (*buffer, error) {
	w := &waiter{holder: h, n: minPiece << class(n)}
	if err := m.wait(ctx, w); err != nil {
		return nil, err
	}
	if !w.reserve {
		return m.buffer(h, n), nil
	}
	b := m.buffer(h, min(n, reserve))
	b.reserve = true
	m.onPressure()
	return b, nil
}

// tryAcquire returns a buffer of n bytes from the shared memory, or nil if memory is short.
// It does not wait.
func (m *memory) tryAcquire(h *holder, n int) *buffer {
	w := waiter{holder: h, n: minPiece << class(n)}
	m.mu.Lock()
	if m.decide(&w, len(m.waiting) > 0) != fits {
		m.mu.Unlock()
		return nil
	}
	m.charge(&w)
	m.mu.Unlock()
	return m.buffer(h, n)
}

// The method buffer returns a buffer of n bytes. The caller must have counted the
// memory of the buffer as used (see charge).
func (m *memory) buffer(h *holder, n int) *buffer {
	c := class(n)
	b, _ := m.free[c].Get().(*buffer)
	if b == nil {
		b = &buffer{b: make([]byte, minPiece<<c)}
	}
	b.b, b.holder, b.n, b.reserve = b.b[:n], h, minPiece<<c, false
	return b
}

// The method release frees a buffer, so that other connections can get the memory of
// this buffer.
func (m *memory) release(b *buffer) {
	h, size, own := b.holder, b.n, b.reserve
	b.holder = nil
	m.free[class(int(size))].Put(b)
	m.mu.Lock()
	defer m.mu.Unlock()
	if own {
		h.reserved = false
	} else {
		m.refund(h, size)
	}
	m.grant()
}

// The type verdict says whether a waiter can get the memory for its buffer.
type verdict uint8

const (
	fits        verdict = iota // the waiter can get it now
	memoryShort                // memory is short: later waiters that hold memory wait, too
	peerFull                   // the peer holds its three quarters: waiters of other peers go first
)

// The method decide returns whether a waiter can get its memory now. If earlierWaits
// is true, memory is too short for an earlier waiter. In this case a waiter gets
// memory only if its connection holds no shared memory. The caller holds m.mu.
func (m *memory) decide(w *waiter, earlierWaits bool) verdict {
	switch {
	case w.holder.peer.held+w.n > m.all-m.all/4:
		return peerFull
	case w.holder.held == 0 && m.used+w.n <= m.all:
		return fits
	case w.holder.held != 0 && !earlierWaits && m.used+w.n <= m.all/2:
		return fits
	}
	return memoryShort
}

// The method grant goes through the waiters in the order of their arrival. It gives
// shared memory, or the reserve of the connection, to each waiter that can get it. The
// caller holds m.mu.
func (m *memory) grant() {
	if len(m.waiting) == 0 {
		return
	}
	still, refused := m.waiting[:0], false
	for _, w := range m.waiting {
		found := m.decide(w, refused)
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
		refused = refused || found == memoryShort
		still = append(still, w)
	}
	clear(m.waiting[len(still):])
	m.waiting = still
}

// The method charge records that a waiter now holds the shared memory that it waited for.
// The caller holds m.mu.
func (m *memory) charge(w *waiter) {
	m.used += w.n
	w.holder.held += w.n
	w.holder.peer.held += w.n
	w.holder.mayUseReserve = false
}

// The method refund records that a connection has released n bytes of the shared
// memory. The parameter h is the account of this connection. The caller holds m.mu.
func (m *memory) refund(h *holder, n int64) {
	m.released++
	m.used -= n
	h.held -= n
	h.peer.held -= n
}

// useReserve gives a waiter the reserve of its connection, which is not a part of the
// shared memory. The caller holds m.mu.
func (m *memory) useReserve(w *waiter) { w.reserve, w.holder.reserved = true, true }

// holdsShared reports whether a connection holds shared memory.
func (m *memory) holdsShared(h *holder) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return h.held > 0
}

// acquireOrQueue returns true if a waiter can get shared memory or the reserve of its
// connection at once. Otherwise it adds the waiter to the queue m.waiting and returns
// false.
func (m *memory) acquireOrQueue(w *waiter) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.decide(w, len(m.waiting) > 0) == fits:
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

// The method wait returns when a waiter has got shared memory or the reserve of its
// connection. It fails only if ctx ends.
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
				// Other connections released memory during the wait. So memory is short because
				// disks are slow, and not because other clients no longer send or receive their
				// data. Therefore it is worth waiting longer for a large buffer.
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

// The method releases returns how many buffers of the shared memory have been
// released since the start of the server.
func (m *memory) releases() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.released
}

// allowReserve lets a waiter get the reserve of its connection, now or as soon as the
// reserve is free.
func (m *memory) allowReserve(w *waiter) {
	m.mu.Lock()
	defer m.mu.Unlock()
	select {
	case <-w.ready: // w has got memory meanwhile
	default:
		w.holder.mayUseReserve = true
		m.grant()
	}
}

// The method cancel removes a waiter from the queue m.waiting. If the waiter has
// got memory in the meantime, cancel releases this memory.
func (m *memory) cancel(w *waiter) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i, other := range m.waiting {
		if other == w {
			m.waiting = append(m.waiting[:i], m.waiting[i+1:]...)
			m.grant() // later waiters may have waited for w
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

// The method allocate returns a buffer of n bytes for a request, or of fewer bytes if
// memory is short. Only the goroutine that reads requests calls it. It fails only if the
// connection ends.
func (c *conn) allocate(n int) (*buffer, error) {
	if b := c.s.memory.tryAcquire(&c.holder, n); b != nil {
		return b, nil
	}
	c.out.flushReplies()
	return c.s.memory.acquire(c.ctx, &c.holder, n)
}
