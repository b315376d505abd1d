package vddk

import "context"

// Budget is the NFC memory that one host has for all connections to it. It is
// safe for concurrent use.
type Budget struct {
	limit int64
}

// NewBudget returns a budget of so many bytes.
func NewBudget(bytes int64) *Budget { return &Budget{limit: bytes} }

// Acquire waits until nfcBytes are free, or ctx ends.
func (b *Budget) Acquire(ctx context.Context, nfcBytes int64) (release func(), err error) {
	panic("not implemented")
}

// TryAcquire takes nfcBytes where they are free.
func (b *Budget) TryAcquire(nfcBytes int64) (release func(), ok bool) { panic("not implemented") }
