package vddk

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"
)

// lifetime is the time from the opening of a disk until its context ends or Close is
// called. Its methods are safe for concurrent use.
type lifetime struct {
	disk string          // Params.File, for errors
	ctx  context.Context // the context of Open: when it ends, calls fail and workers are killed

	// ending ends with ctx, and during Close when no call is in progress any more.
	// Workers that are still alive then are closed.
	ending context.Context
	end    context.CancelFunc

	background sync.WaitGroup // goroutines that return soon after ending has ended

	mu     sync.Mutex     // held while closed is closed and while calls is added to
	closed chan struct{}  // closed at the beginning of Close
	calls  sync.WaitGroup // calls in progress, which Close waits for
}

func newLifetime(ctx context.Context, disk string) *lifetime {
	l := &lifetime{disk: disk, ctx: ctx, closed: make(chan struct{})}
	l.ending, l.end = context.WithCancel(ctx)
	return l
}

// begin starts a call: Close waits until calls.Done is called. It returns an error
// when the context has ended or the disk was closed.
func (l *lifetime) begin() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.ended(); err != nil {
		return err
	}
	l.calls.Add(1)
	return nil
}

// ended returns nil while calls may begin: then the cause of the context's end, or
// an error that wraps os.ErrClosed.
func (l *lifetime) ended() error {
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	select {
	case <-l.closed:
		return fmt.Errorf("%s: %w", l.disk, os.ErrClosed)
	default:
		return nil
	}
}

// close makes all later calls fail. It returns os.ErrClosed if the disk was closed
// before.
func (l *lifetime) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	select {
	case <-l.closed:
		return os.ErrClosed
	default:
	}
	close(l.closed)
	return nil
}

// pause waits for d. It returns false if the context ended or the disk was closed before
// that.
func (l *lifetime) pause(d time.Duration) bool { return sleep(l.ctx, l.closed, d) }
