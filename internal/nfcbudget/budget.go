// Package nfcbudget shares the memory that an ESXi host has for NFC connections among all
// connections to that host:
//
//	budget := nfcbudget.NewHost(48<<20, 52)
//	release, err := budget.Acquire(ctx, budget.Of(1, buffers.Bytes()))
//
// A host refuses connections, and requests on them, when its memory is used up.
package nfcbudget

import (
	"context"
	"sync"

	"golang.org/x/sync/semaphore"
)

// Budget is the NFC memory of one host. Callers that wait for memory get it in the order of
// their calls. It is safe for concurrent use.
type Budget struct {
	limit int64 // bytes
	least int64 // the bytes that a connection with small buffers counts as
	free  *semaphore.Weighted
}

// New returns a budget of the given number of bytes, for any number of connections.
func New(bytes int64) *Budget {
	return &Budget{limit: bytes, free: semaphore.NewWeighted(bytes)}
}

// NewHost returns a budget of the given number of bytes that also limits the number of open
// connections, which must be at least 1. To limit them, Of counts at least bytes divided by
// connections for each connection.
func NewHost(bytes int64, connections int) *Budget {
	b := New(bytes)
	b.least = (bytes + int64(connections) - 1) / int64(connections)
	return b
}

// Of returns the number of bytes to acquire for n connections with nfcBytes bytes of
// buffers each.
func (b *Budget) Of(n int, nfcBytes int64) int64 { return int64(n) * max(nfcBytes, b.least) }

// Acquire waits until nfcBytes bytes are free and takes them. If nfcBytes is more than the
// budget has, it takes the whole budget, and leaves it to the host to refuse the
// connection. When ctx ends first, the error is its cause. release returns the bytes; only
// its first call counts.
func (b *Budget) Acquire(ctx context.Context, nfcBytes int64) (release func(), err error) {
	nfcBytes = b.share(nfcBytes)
	if err := b.free.Acquire(ctx, nfcBytes); err != nil {
		return nil, context.Cause(ctx)
	}
	return b.releaser(nfcBytes), nil
}

// TryAcquire takes nfcBytes bytes if they are free and no call of Acquire waits.
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
