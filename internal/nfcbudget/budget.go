// Package nfcbudget shares the memory that an ESXi host has for NFC connections, with which clients
// read and write its disks. All connections to the host get their part of this memory from one
// [Budget]:
//
//	budget := nfcbudget.NewHost(48<<20, 52)
//	release, err := budget.Acquire(ctx, budget.Of(1, buffers.Bytes()))
//
// When this memory is used up, the host refuses further connections, and requests on existing
// ones.
package nfcbudget

import (
	"context"
	"sync"

	"golang.org/x/sync/semaphore"

	"github.com/vddkcp/vddkcp/internal/observer"
)

// Budget is the NFC memory of one host. If several callers wait for memory, they get it in the
// order of their calls. A Budget is safe for concurrent use.
type Budget struct {
	limit int64 // bytes
	least int64 // the bytes that a connection with small buffers counts as
	free  *semaphore.Weighted
}

// New returns a budget with the given number of bytes. It does not limit the number of
// connections.
func New(bytes int64) *Budget {
	return &Budget{limit: bytes, free: semaphore.NewWeighted(bytes)}
}

// NewHost returns a budget with the given number of bytes for a host that allows the given
// number of open connections, at least 1. Each connection counts as at least
// totalBytes/maxConnections bytes, even if its buffers are smaller. Therefore the budget also
// limits the number of connections.
func NewHost(totalBytes int64, maxConnections int) *Budget {
	b := New(totalBytes)
	b.least = (totalBytes + int64(maxConnections) - 1) / int64(maxConnections)
	return b
}

// Of returns the number of bytes that n connections take from the budget. nfcBytes is the
// number of bytes that the buffers of one connection have. The result is for Acquire or
// TryAcquire.
func (b *Budget) Of(n int, nfcBytes int64) int64 { return int64(n) * max(nfcBytes, b.least) }

// Acquire waits until the given number of bytes of the budget are free, and takes these
// bytes. If ctx ends first, Acquire returns the cause of ctx. The function release gives the
// bytes back; further calls of it do nothing. While Acquire waits, it tells the Observer of ctx.
//
// If the given number is more than the whole budget, Acquire takes the whole budget. The host
// then decides whether it refuses the connection.
func (b *Budget) Acquire(ctx context.Context, nfcBytes int64) (release func(), err error) {
	if release, ok := b.TryAcquire(nfcBytes); ok && ctx.Err() == nil {
		return release, nil
	} else if ok {
		release()
	}
	nfcBytes = b.share(nfcBytes)
	defer observer.Wait(ctx)()
	if err := b.free.Acquire(ctx, nfcBytes); err != nil {
		return nil, context.Cause(ctx)
	}
	return b.releaser(nfcBytes), nil
}

// TryAcquire takes the given number of bytes if they are free and no call of Acquire is
// waiting. It does not wait.
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
