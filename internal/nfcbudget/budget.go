package nfcbudget

import (
	"context"
	"sync"

	"golang.org/x/sync/semaphore"
)

// Budget is the NFC memory that one host has for all connections to it. Who
// waits gets it in turn. It is safe for concurrent use.
type Budget struct {
	limit int64
	least int64 // what a connection counts, however small its buffers
	free  *semaphore.Weighted
}

// New returns a budget of so many bytes.
func New(bytes int64) *Budget {
	return &Budget{limit: bytes, free: semaphore.NewWeighted(bytes)}
}

// NewHost returns a budget of so many bytes that lets no more than so many
// connections be open at once, at least one. A connection with buffers smaller
// than its share of the bytes counts as that share.
func NewHost(bytes int64, connections int) *Budget {
	b := New(bytes)
	b.least = (bytes + int64(connections) - 1) / int64(connections)
	return b
}

// Of is what n connections with so many bytes of buffers each take.
func (b *Budget) Of(n int, nfcBytes int64) int64 { return int64(n) * max(nfcBytes, b.least) }

// Acquire waits until nfcBytes are free, or ctx ends, whose cause it returns
// then. Whoever wants more than there is gets all of it, once that is free: the
// host decides then. Release may be called more than once.
func (b *Budget) Acquire(ctx context.Context, nfcBytes int64) (release func(), err error) {
	nfcBytes = b.share(nfcBytes)
	if err := b.free.Acquire(ctx, nfcBytes); err != nil {
		return nil, context.Cause(ctx)
	}
	return b.releaser(nfcBytes), nil
}

// TryAcquire takes nfcBytes where they are free and nobody waits for them.
func (b *Budget) TryAcquire(nfcBytes int64) (release func(), ok bool) {
	nfcBytes = b.share(nfcBytes)
	if !b.free.TryAcquire(nfcBytes) {
		return nil, false
	}
	return b.releaser(nfcBytes), true
}

func (b *Budget) share(n int64) int64 { return max(0, min(n, b.limit)) }

func (b *Budget) releaser(n int64) func() {
	return sync.OnceFunc(func() { b.free.Release(n) })
}
