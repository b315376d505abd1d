// Package lifecycle is what all writers share: the order of their calls, the
// contexts that they live under, and the first error, which stays.
package lifecycle

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"sync"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/sink"
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

// Target is the life of a sink.Disk. The fields are set before the first call, but
// for Size, which SetSize changes. It is safe for concurrent use.
type Target struct {
	Context context.Context
	Name    string // as messages call the target
	Size    int64  // of the disk in bytes, or sink.UnknownSize
	Limit   int64  // a disk whose size is not known may have; 0: any size
	Unit    int64  // what ranges begin and end at multiples of, but for the end of the disk; 0: 1
	Resume  int64  // where an earlier run stopped: a range may begin there, too

	calls sync.RWMutex // read-locked by calls, locked by those that change what follows
	stage Stage        // guarded by calls

	mu  sync.Mutex
	err error // guarded by mu
}

// Begin starts a call on a range. Done ends it, unless there is an error.
func (t *Target) Begin(ctx context.Context, off, n int64) error {
	t.calls.RLock()
	err := t.ready(ctx, Writing)
	if err == nil {
		if err = t.inDisk(off, n); err != nil {
			t.Fail(err)
		}
	}
	if err != nil {
		t.calls.RUnlock()
	}
	return err
}

// BeginAt starts a call that belongs to a stage and to no range.
func (t *Target) BeginAt(ctx context.Context, at Stage) error {
	t.calls.RLock()
	err := t.ready(ctx, at)
	if err != nil {
		t.calls.RUnlock()
	}
	return err
}

// Done ends what Begin or BeginAt started.
func (t *Target) Done() { t.calls.RUnlock() }

func (t *Target) inDisk(off, n int64) error {
	end := t.Size
	if t.Size == sink.UnknownSize {
		end = cmp.Or(t.Limit, math.MaxInt64)
	}
	if off < 0 || n < 0 || n > end-off {
		if t.Size == sink.UnknownSize && off >= 0 && n >= 0 && off <= end {
			return fmt.Errorf("%s is too small: it has %d bytes (%s), and more are coming", t.Name, end, bytesize.Format(end))
		}
		return fmt.Errorf("%s: %d bytes at %d are not in a disk of %d bytes", t.Name, n, off, end)
	}
	unit := cmp.Or(t.Unit, 1)
	if off%unit != 0 && off != end && off != t.Resume || (off+n)%unit != 0 && off+n != end {
		return fmt.Errorf("%s: [%d, %d) is cut elsewhere than at multiples of %d bytes", t.Name, off, off+n, unit)
	}
	return nil
}

// SetSize is sink.Sizer's; do is what the disk has to do for it.
func (t *Target) SetSize(n int64, do func() error) error {
	t.calls.Lock()
	defer t.calls.Unlock()
	err := t.ready(t.Context, Writing)
	if err != nil {
		return err
	}
	if t.Size != sink.UnknownSize {
		return t.Fail(fmt.Errorf("%s: the size is set to %d bytes, and is %d already", t.Name, n, t.Size))
	}
	if err := t.inDisk(n, 0); err != nil {
		return t.Fail(err)
	}
	t.Size = n
	if err := do(); err != nil {
		return t.Fail(err)
	}
	return nil
}

// ready says why a call can't be made. The caller holds t.calls.
func (t *Target) ready(ctx context.Context, at Stage) error {
	if t.stage == Ended {
		return sink.ErrClosed
	}
	if err := t.failed(); err != nil {
		return fmt.Errorf("an earlier call failed: %w", err)
	}
	if t.stage < at {
		return fmt.Errorf("%s is published before it was finished", t.Name)
	}
	if t.stage > at {
		return fmt.Errorf("%s is finished and takes no more", t.Name)
	}
	if err := t.Stopped(ctx); err != nil {
		return t.Fail(err)
	}
	return nil
}

// Stopped returns the cause for which the disk's context or that of a call has
// ended.
func (t *Target) Stopped(ctx context.Context) error {
	if t.Context.Err() != nil {
		return context.Cause(t.Context)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (t *Target) failed() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// Fail keeps the first error of the disk, and returns err.
func (t *Target) Fail(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
	return err
}

// Advance makes the call that takes the disk from one stage to the next.
func (t *Target) Advance(ctx context.Context, from Stage, do func() error) error {
	t.calls.Lock()
	defer t.calls.Unlock()
	if err := t.ready(ctx, from); err != nil {
		return err
	}
	if t.Size == sink.UnknownSize {
		return t.Fail(fmt.Errorf("%s is finished before its size is known", t.Name))
	}
	if err := do(); err != nil {
		return t.Fail(err)
	}
	t.stage = from + 1
	return nil
}

// End makes the call that ends the disk where it is; the disk has ended whatever
// it returns.
func (t *Target) End(do func() error) error {
	t.calls.Lock()
	defer t.calls.Unlock()
	if t.stage == Ended {
		return sink.ErrClosed
	}
	t.stage = Ended
	return do()
}

// Abort is End for Abort, which does nothing after the end.
func (t *Target) Abort(do func() error) error {
	if err := t.End(do); !errors.Is(err, sink.ErrClosed) {
		return err
	}
	return nil
}

// Beside runs the function that Checkpoint returned, which belongs to no stage.
func (t *Target) Beside(ctx context.Context, do func() error) error {
	t.calls.RLock()
	defer t.calls.RUnlock()
	if err := t.ready(ctx, t.stage); err != nil {
		return err
	}
	if err := do(); err != nil {
		return t.Fail(err)
	}
	return nil
}
