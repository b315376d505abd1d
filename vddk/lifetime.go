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

// lifetime is the life of a disk: it counts the calls in progress, like life.Life, and has two
// further phases for Disk.Close. In the first phase, closing, calls in progress continue, but lost
// worker processes are not replaced. In the second phase, ending, no call is in progress and the
// workers are closed. The methods of lifetime are safe for concurrent use.
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
	l.ending, l.end = context.WithCancel(ctx)
	l.closing, l.startClosing = context.WithCancel(l.ending) // end also ends closing, if the disk was not opened
	return l
}

// The method ended returns nil while new calls may begin. After that it returns the reason why they
// may not: the cause of the context's end, or an error that wraps os.ErrClosed.
func (l *lifetime) ended() error {
	if err := context.Cause(l.Context); err != nil {
		return err
	}
	if l.closing.Err() != nil {
		return fmt.Errorf("%s: %w", l.Name, os.ErrClosed)
	}
	return nil
}

// The method pause waits for the duration d. It returns false if the context ended or Disk.Close
// was called before d was over.
func (l *lifetime) pause(d time.Duration) bool { return retry.Sleep(l.closing, d, nil) }
