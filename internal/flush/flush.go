// Package flush lets concurrent calls that flush the same disk share one flush:
//
//	err := d.flushes.Do(ctx, func() error { return unix.Fdatasync(fd) })
//
// If a hundred clients of a server flush at the same time, two flushes are then enough. Without
// this package, a hundred flushes would run one after the other.
package flush

import (
	"context"
	"sync"
	"sync/atomic"
)

// A Group runs the flushes of one disk, one at a time. If a flush fails, all later calls of Do
// return the error of this flush. The reason is that the kernel and NBD servers report lost data
// only to one flush. A later flush would succeed although data is lost. The zero value is ready for
// use.
type Group struct {
	calls atomic.Uint64

	mu      sync.Mutex // held during a flush
	covered uint64     // number of the last call that a successful flush covers; earlier calls are covered, too
	failed  error      // the first error of a flush
}

// Do flushes all data that was written before the call. It returns nil as soon as a flush that
// began after the call of Do has succeeded. If another flush is running, Do waits for its end,
// because that flush may have begun too early. If ctx ends during the wait, Do starts no flush and
// returns the cause of ctx. Do is safe for concurrent use.
func (g *Group) Do(ctx context.Context, flush func() error) error {
	call := g.calls.Add(1)
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.failed != nil:
		return g.failed
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case g.covered >= call:
		return nil
	}
	covers := g.calls.Load()
	if g.failed = flush(); g.failed == nil {
		g.covered = covers
	}
	return g.failed
}

// Calls returns n, the number of calls of Do that have begun so far. A flush that begins later
// flushes the data of these n calls of Do.
func (g *Group) Calls() uint64 { return g.calls.Load() }
