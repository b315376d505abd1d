package vddk

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/internal/retry"
)

// lifetime is a life.Life with the phases in which a disk with workers is closed: first
// calls in progress go on without new workers, then the workers are closed. Its methods
// are safe for concurrent use.
type lifetime struct {
	life.Life

	closing      context.Context // ends with Context, and at the beginning of Disk.Close
	startClosing context.CancelFunc

	ending context.Context // ends with Context, and during Disk.Close when no call is in progress
	end    context.CancelFunc

	background sync.WaitGroup // goroutines that return soon after ending has ended
}

func newLifetime(ctx context.Context, disk string) *lifetime {
	l := &lifetime{Life: life.Life{Context: ctx, Name: disk}}
	l.closing, l.startClosing = context.WithCancel(ctx)
	l.ending, l.end = context.WithCancel(ctx)
	return l
}

// ended returns nil while calls may begin. Otherwise it returns the cause of the
// context's end, or an error that wraps os.ErrClosed.
func (l *lifetime) ended() error {
	if err := context.Cause(l.Context); err != nil {
		return err
	}
	if l.closing.Err() != nil {
		return fmt.Errorf("%s: %w", l.Name, os.ErrClosed)
	}
	return nil
}

// pause waits for d. It returns false if the context ended or the disk was closed before
// that.
func (l *lifetime) pause(d time.Duration) bool { return retry.Sleep(l.closing, d, nil) }
