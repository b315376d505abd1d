// Package lifecycle has what all writers of disks share: a [Target] enforces the order
// of the calls of a sink.Disk, ends calls with their contexts, and keeps the first
// error.
//
// A writer has a Target as a field. It brackets each write with Begin and Done, and
// passes the work of Finish, Publish, Suspend and Abort to Advance, End and Abort.
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

// Stage is the part of its life that a disk is in.
type Stage uint8

// The stages of a disk, in their order. Finish ends Writing, and Publish, Suspend or
// Abort lead to Ended.
const (
	Writing Stage = iota
	Finished
	Ended
)

// Target is the state of a sink.Disk. The fields are set before the first call and not
// changed afterwards, except that SetSize changes Size. It is safe for concurrent use.
type Target struct {
	Context context.Context
	Name    string // what messages call the target
	Size    int64  // size of the disk in bytes, or sink.UnknownSize
	Limit   int64  // largest size in bytes if Size is unknown; 0: no limit
	Unit    int64  // alignment in bytes of ranges, except at the end of the disk; 0: none
	Resume  int64  // offset where an earlier run stopped, at which a range may begin, too

	calls sync.RWMutex // read-locked by each call, locked by calls that change stage or Size
	stage Stage        // guarded by calls

	mu  sync.Mutex
	err error // guarded by mu
}

// Begin starts a call that writes n bytes at off. Unless it returns an error, the
// caller must call Done.
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

// BeginAt starts a call that is allowed in the given stage and writes nothing. Unless
// it returns an error, the caller must call Done.
func (t *Target) BeginAt(ctx context.Context, at Stage) error {
	t.calls.RLock()
	err := t.ready(ctx, at)
	if err != nil {
		t.calls.RUnlock()
	}
	return err
}

// Done ends a call that Begin or BeginAt started.
func (t *Target) Done() { t.calls.RUnlock() }

// inDisk returns an error unless [off, off+n) lies in the disk and is aligned.
func (t *Target) inDisk(off, n int64) error {
	end := t.Size
	if t.Size == sink.UnknownSize {
		end = cmp.Or(t.Limit, math.MaxInt64)
	}
	if off < 0 || n < 0 || n > end-off {
		if t.Size == sink.UnknownSize && off >= 0 && n >= 0 && off <= end {
			return fmt.Errorf("%s is too small: it has %d bytes (%s), and the source has more", t.Name, end, bytesize.Format(end))
		}
		return fmt.Errorf("%s: the range [%d, %d) is outside the disk of %d bytes", t.Name, off, off+n, end)
	}
	unit := cmp.Or(t.Unit, 1)
	if off%unit != 0 && off != end && off != t.Resume || (off+n)%unit != 0 && off+n != end {
		return fmt.Errorf("%s: the range [%d, %d) is not aligned to %d bytes", t.Name, off, off+n, unit)
	}
	return nil
}

// SetSize implements sink.Sizer for a disk whose size was unknown. It sets Size and
// calls do, which does what the format of the disk needs for its size.
func (t *Target) SetSize(n int64, do func() error) error {
	t.calls.Lock()
	defer t.calls.Unlock()
	err := t.ready(t.Context, Writing)
	if err != nil {
		return err
	}
	if t.Size != sink.UnknownSize {
		return t.Fail(fmt.Errorf("%s: cannot set the size to %d bytes: the size is already %d bytes", t.Name, n, t.Size))
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

// ready returns an error unless the disk is in the stage at, no earlier call failed, and
// the contexts of the call and of the disk have not ended. The caller holds the lock
// calls.
func (t *Target) ready(ctx context.Context, at Stage) error {
	if t.stage == Ended {
		return sink.ErrClosed
	}
	if err := t.failed(); err != nil {
		return fmt.Errorf("an earlier operation on the target failed: %w", err)
	}
	if t.stage < at {
		return fmt.Errorf("%s: Publish was called before Finish", t.Name)
	}
	if t.stage > at {
		return fmt.Errorf("%s: cannot be written after Finish", t.Name)
	}
	if err := t.Stopped(ctx); err != nil {
		return t.Fail(err)
	}
	return nil
}

// Stopped returns the cause for which the context of the disk or ctx has ended, or nil.
func (t *Target) Stopped(ctx context.Context) error {
	if t.Context.Err() != nil {
		return context.Cause(t.Context)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// failed returns the first error of the disk, or nil.
func (t *Target) failed() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// Fail records err unless there was an error before, and returns err.
func (t *Target) Fail(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
	return err
}

// Advance calls do, which must be the work of Finish or Publish. If do succeeds, the
// disk moves from the given stage to the next one.
func (t *Target) Advance(ctx context.Context, from Stage, do func() error) error {
	t.calls.Lock()
	defer t.calls.Unlock()
	if err := t.ready(ctx, from); err != nil {
		return err
	}
	if t.Size == sink.UnknownSize {
		return t.Fail(fmt.Errorf("%s: Finish was called before the size was set", t.Name))
	}
	if err := do(); err != nil {
		return t.Fail(err)
	}
	t.stage = from + 1
	return nil
}

// End calls do, which ends the disk in whatever stage it is. The disk has ended even if
// do fails.
func (t *Target) End(do func() error) error {
	t.calls.Lock()
	defer t.calls.Unlock()
	if t.stage == Ended {
		return sink.ErrClosed
	}
	t.stage = Ended
	return do()
}

// Abort implements the Abort of a disk with End, and does nothing if the disk has
// already ended.
func (t *Target) Abort(do func() error) error {
	if err := t.End(do); !errors.Is(err, sink.ErrClosed) {
		return err
	}
	return nil
}

// InAnyStage calls do, which must be the function that Checkpoint returned. Unlike other
// calls, that function is allowed in every stage before Ended.
func (t *Target) InAnyStage(ctx context.Context, do func() error) error {
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
