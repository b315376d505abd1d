// Package flush lets the calls that flush one disk share their flushes:
//
//	err := d.flushes.Do(ctx, func() error { return unix.Fdatasync(fd) })
//
// A server whose hundred clients flush at the same time then needs two flushes
// instead of a hundred that run one after the other.
package flush

import (
	"context"
	"sync"
	"sync/atomic"
)

// A Group runs the flushes of one disk, one at a time. The kernel and NBD servers
// report lost data to one flush only, so the first error of a flush is the result
// of all later calls. The zero value is ready for use.
type Group struct {
	calls atomic.Uint64

	mu      sync.Mutex // held during a flush
	covered uint64     // the first calls, by their number, for which a flush has succeeded
	failed  error      // the first error of a flush
}

// Do returns nil when a flush that began after the call of Do has succeeded. While
// another flush runs, Do waits for its end, since that flush may have begun too
// early. If ctx ends meanwhile, Do starts no flush and returns the cause. Do is safe
// for concurrent use.
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

// Calls returns the number of calls of Do that have begun. A flush that begins after
// that covers all of these calls.
func (g *Group) Calls() uint64 { return g.calls.Load() }
