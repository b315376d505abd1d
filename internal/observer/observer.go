// Package observer lets the disks that a copy reads report what happens at their servers.
// The copy puts an [Observer] into the context with which it opens a disk, as net/http/httptrace
// does with the events of an HTTP request:
//
//	ctx = observer.With(ctx, observer.Observer{Connections: func(n int) { open.Add(n) }})
//	disk, err := open(ctx)
//
// The disk calls [Wait] and [Connections] with that context.
package observer

import "context"

// Observer has the functions that a disk calls. They are called concurrently, must not block, and
// must not call methods of the disk. A function that is nil is not called.
type Observer struct {
	// Waiting is called with 1 when a call begins to wait until a host has memory or connections
	// for it, and with -1 when the call goes on.
	Waiting func(n int)
	// Connections is called with the number of connections that were opened, or, as a negative
	// number, closed.
	Connections func(n int)
}

type key struct{}

// With returns a context that holds an Observer.
func With(ctx context.Context, o Observer) context.Context { return context.WithValue(ctx, key{}, &o) }

func of(ctx context.Context) Observer {
	if o, ok := ctx.Value(key{}).(*Observer); ok {
		return *o
	}
	return Observer{}
}

// Wait calls Observer.Waiting with 1. The caller calls the result when it has waited.
func Wait(ctx context.Context) (end func()) {
	waiting := of(ctx).Waiting
	if waiting == nil {
		return func() {}
	}
	waiting(1)
	return func() { waiting(-1) }
}

// Connections calls Observer.Connections with n.
func Connections(ctx context.Context, n int) {
	if connections := of(ctx).Connections; connections != nil && n != 0 {
		connections(n)
	}
}
