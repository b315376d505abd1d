// Package target is what all writers share: the order of their calls, the
// contexts that they live under, and the first error, which stays.
package target

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"sync"

	"vddkcp/internal/bytesize"
	"vddkcp/sink"
)

// Stage is how far a disk has come.
type Stage uint8

// A disk begins with Writing; Finish makes it Finished, and Publish, Suspend or
// Abort Ended.
const (
	Writing Stage = iota
	Finished
	Ended
)

// Life is that of a sink.Disk. The fields are set before the first call, but
// for Size, which SetSize changes. It is safe for concurrent use.
type Life struct {
	Context context.Context
	Name    string // as messages call the target
	Size    int64  // of the disk in bytes, or sink.UnknownSize
	Limit   int64  // a disk whose size is not known may have; 0: any size
	Unit    int64  // what ranges are multiples of, but for the end of the disk; 0: 1

	calls sync.RWMutex // read-locked by calls, locked by those that change what follows
	stage Stage        // guarded by calls

	mu  sync.Mutex
	err error // guarded by mu
}

// Begin starts a call on a range. Done ends it, unless there is an error.
func (l *Life) Begin(ctx context.Context, off, n int64) error {
	l.calls.RLock()
	err := l.ready(ctx, Writing)
	if err == nil {
		if err = l.inDisk(off, n); err != nil {
			l.Fail(err)
		}
	}
	if err != nil {
		l.calls.RUnlock()
	}
	return err
}

// BeginAt starts a call that belongs to a stage and to no range.
func (l *Life) BeginAt(ctx context.Context, at Stage) error {
	l.calls.RLock()
	err := l.ready(ctx, at)
	if err != nil {
		l.calls.RUnlock()
	}
	return err
}

// Done ends what Begin or BeginAt started.
func (l *Life) Done() { l.calls.RUnlock() }

func (l *Life) inDisk(off, n int64) error {
	end := l.Size
	if l.Size == sink.UnknownSize {
		end = cmp.Or(l.Limit, math.MaxInt64)
	}
	if off < 0 || n < 0 || n > end-off {
		if l.Size == sink.UnknownSize && off >= 0 && n >= 0 && off <= end {
			return fmt.Errorf("%s is too small: it has %d bytes (%s), and more are coming", l.Name, end, bytesize.Format(end))
		}
		return fmt.Errorf("%s: %d bytes at %d are not in a disk of %d bytes", l.Name, n, off, end)
	}
	if unit := cmp.Or(l.Unit, 1); off%unit != 0 && off != end || n%unit != 0 && off+n != end {
		return fmt.Errorf("%s: [%d, %d) is cut elsewhere than at multiples of %d bytes", l.Name, off, off+n, unit)
	}
	return nil
}

// SetSize is sink.Sizer's; do is what the disk has to do for it.
func (l *Life) SetSize(n int64, do func() error) error {
	l.calls.Lock()
	defer l.calls.Unlock()
	err := l.ready(l.Context, Writing)
	if err != nil {
		return err
	}
	if l.Size != sink.UnknownSize {
		return l.Fail(fmt.Errorf("%s: the size is set to %d bytes, and is %d already", l.Name, n, l.Size))
	}
	if err := l.inDisk(n, 0); err != nil {
		return l.Fail(err)
	}
	l.Size = n
	if err := do(); err != nil {
		return l.Fail(err)
	}
	return nil
}

// ready says why a call can't be made. The caller holds l.calls.
func (l *Life) ready(ctx context.Context, at Stage) error {
	if l.stage == Ended {
		return sink.ErrClosed
	}
	if err := l.failed(); err != nil {
		return fmt.Errorf("an earlier call failed: %w", err)
	}
	if l.stage < at {
		return fmt.Errorf("%s is published before it was finished", l.Name)
	}
	if l.stage > at {
		return fmt.Errorf("%s is finished and takes no more", l.Name)
	}
	if err := l.Stopped(ctx); err != nil {
		return l.Fail(err)
	}
	return nil
}

// Stopped returns the cause for which the disk's context or that of a call has
// ended.
func (l *Life) Stopped(ctx context.Context) error {
	if l.Context.Err() != nil {
		return context.Cause(l.Context)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (l *Life) failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// Fail keeps the first error of the disk, and returns err.
func (l *Life) Fail(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err = err
	}
	return err
}

// Advance makes the call that takes the disk from one stage to the next.
func (l *Life) Advance(ctx context.Context, from Stage, do func() error) error {
	l.calls.Lock()
	defer l.calls.Unlock()
	if err := l.ready(ctx, from); err != nil {
		return err
	}
	if l.Size == sink.UnknownSize {
		return l.Fail(fmt.Errorf("%s is finished before its size is known", l.Name))
	}
	if err := do(); err != nil {
		return l.Fail(err)
	}
	l.stage = from + 1
	return nil
}

// End makes the call that ends the disk where it is; the disk has ended whatever
// it returns.
func (l *Life) End(do func() error) error {
	l.calls.Lock()
	defer l.calls.Unlock()
	if l.stage == Ended {
		return sink.ErrClosed
	}
	l.stage = Ended
	return do()
}

// Abort is End for Abort, which does nothing after the end.
func (l *Life) Abort(do func() error) error {
	if err := l.End(do); !errors.Is(err, sink.ErrClosed) {
		return err
	}
	return nil
}

// Beside runs the function that Checkpoint returned, which belongs to no stage.
func (l *Life) Beside(ctx context.Context, do func() error) error {
	l.calls.RLock()
	defer l.calls.RUnlock()
	if err := l.ready(ctx, l.stage); err != nil {
		return err
	}
	if err := do(); err != nil {
		return l.Fail(err)
	}
	return nil
}
