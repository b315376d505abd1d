// Package lifecycle contains code that all writers of disks share. A [Target] checks the order
// of the calls of a sink.Disk, refuses calls whose context has ended, and keeps the first error.
//
// A writer has a Target as a field. Each write of the writer calls Target.Begin and Target.Done.
// The writer's methods Finish, Publish, Suspend and Abort do their work in a function that they
// pass to a method of Target. Finish and Publish pass it to Target.Advance, Suspend passes it to
// Target.End, and Abort passes it to Target.Abort.
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

// Stage says which calls of a disk were made already. This decides which calls are allowed.
type Stage uint8

// These are the stages of a disk in their order. A new disk is in the stage Writing. After
// Finish it is in the stage Finished. After Publish, Suspend or Abort it is in the stage Ended.
const (
	Writing Stage = iota
	Finished
	Ended
)

// Target is the state of a sink.Disk. Its exported fields are set before the first call. After that
// only the field Size changes, in the method SetSize. A Target is safe for concurrent use.
type Target struct {
	Context context.Context
	Name    string // what messages call the target
	Size    int64  // size of the disk in bytes, or sink.UnknownSize
	Limit   int64  // largest size in bytes if Size is unknown; 0: no limit
	Unit    int64  // alignment in bytes of ranges, except at the end of the disk; 0: none
	Resume  int64  // offset where an earlier run stopped; a range may begin there without being aligned

	calls sync.RWMutex // read-locked by each call, locked by calls that change stage or Size
	stage Stage        // guarded by calls

	mu  sync.Mutex
	err error // guarded by mu
}

// Begin starts a call that writes n bytes at the given offset of the disk. If Begin returns nil, the
// caller must call Done at the end of the call.
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

// BeginAt starts a call that writes nothing and is allowed only in the given stage. If BeginAt
// returns nil, the caller must call Done at the end of the call.
func (t *Target) BeginAt(ctx context.Context, stage Stage) error {
	t.calls.RLock()
	err := t.ready(ctx, stage)
	if err != nil {
		t.calls.RUnlock()
	}
	return err
}

// Done ends a call for which Begin or BeginAt returned nil.
func (t *Target) Done() { t.calls.RUnlock() }

// inDisk returns an error if the range [off, off+n) does not lie in the disk or is not aligned to
// the unit of the disk.
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

// SetSize implements sink.Sizer for a disk whose size was unknown: it sets the size to n bytes.
// Then it calls the function work, which makes the changes that the format of the disk needs for
// this size.
func (t *Target) SetSize(n int64, work func() error) error {
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
	if err := work(); err != nil {
		return t.Fail(err)
	}
	return nil
}

// The method ready returns nil if a call may begin: the disk is in the given stage, no earlier call
// has failed, and neither the context of the call nor that of the disk has ended. The caller has
// locked the mutex t.calls, for reading or writing.
func (t *Target) ready(ctx context.Context, stage Stage) error {
	if t.stage == Ended {
		return sink.ErrClosed
	}
	if err := t.failed(); err != nil {
		return fmt.Errorf("an earlier operation on the target failed: %w", err)
	}
	if t.stage < stage {
		return fmt.Errorf("%s: Publish was called before Finish", t.Name)
	}
	if t.stage > stage {
		return fmt.Errorf("%s: the target cannot be written after Finish", t.Name)
	}
	if err := t.Stopped(ctx); err != nil {
		return t.Fail(err)
	}
	return nil
}

// Stopped returns the cause for which a call must stop: the cause of the context of the disk or
// of ctx, the context of the call. It returns nil if neither context has ended.
func (t *Target) Stopped(ctx context.Context) error {
	if t.Context.Err() != nil {
		return context.Cause(t.Context)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

// The method failed returns the first error of the disk. It is nil if no call has failed.
func (t *Target) failed() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.err
}

// Fail makes err the first error of the disk, if there was none before. It returns err.
func (t *Target) Fail(err error) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.err == nil {
		t.err = err
	}
	return err
}

// Advance implements Finish and Publish. It checks that the disk is in the given stage and calls
// the function work. If work succeeds, the disk enters the next stage.
func (t *Target) Advance(ctx context.Context, stage Stage, work func() error) error {
	t.calls.Lock()
	defer t.calls.Unlock()
	if err := t.ready(ctx, stage); err != nil {
		return err
	}
	if t.Size == sink.UnknownSize {
		return t.Fail(fmt.Errorf("%s: Finish was called before the size was set", t.Name))
	}
	if err := work(); err != nil {
		return t.Fail(err)
	}
	t.stage = stage + 1
	return nil
}

// End puts the disk into the stage Ended, unless it is in this stage already. Then it calls the
// function work, which does what is left to do for the disk. The disk stays in the stage Ended even
// if work fails.
func (t *Target) End(work func() error) error {
	t.calls.Lock()
	defer t.calls.Unlock()
	if t.stage == Ended {
		return sink.ErrClosed
	}
	t.stage = Ended
	return work()
}

// Abort implements the method Abort of a disk. It calls End. If the disk has already ended, Abort
// does nothing.
func (t *Target) Abort(work func() error) error {
	if err := t.End(work); !errors.Is(err, sink.ErrClosed) {
		return err
	}
	return nil
}

// InAnyStage implements the function that the method Checkpoint of a disk returns. That function
// may be called in every stage before Ended. InAnyStage checks this, and then calls the function
// work, which makes the completed writes durable.
func (t *Target) InAnyStage(ctx context.Context, work func() error) error {
	t.calls.RLock()
	defer t.calls.RUnlock()
	if err := t.ready(ctx, t.stage); err != nil {
		return err
	}
	if err := work(); err != nil {
		return t.Fail(err)
	}
	return nil
}
