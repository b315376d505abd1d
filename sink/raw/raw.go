// Package raw writes plain disks: sparse files, block devices in place,
// streams, and nothing at all.
package raw

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"sync"

	"vddkcp/internal/bytesize"
	"vddkcp/sink"
)

// Preallocation says what becomes of a file's ranges that read as zeros.
type Preallocation string

const (
	PreallocateOff    Preallocation = "off"    // holes; "" means the same
	PreallocateFalloc Preallocation = "falloc" // the whole file is reserved before the first write
	PreallocateFull   Preallocation = "full"   // zeros are written
)

// Options are those of CreateFile and OpenDevice. The zero value makes a new
// sparse file, and writes every zero of a device.
type Options struct {
	sink.Options
	// Force replaces an existing file, at the moment of Publish, and drops a
	// .partial that an earlier run left.
	Force         bool
	Preallocation Preallocation // of files
	TargetIsZero  bool          // of devices: all of it reads as zeros before, so that zeros need no writing
	DropCache     bool          // what is written does not stay in the page cache
	// Need is how many bytes the copy will allocate. Less free space in the
	// file's file system is an error before anything is made. With
	// Preallocation it is the size at least.
	Need int64
	// Source returns the name of the file of the source's that a file is, if
	// it is one: such a target is refused. It may be nil.
	Source func(os.FileInfo) (path string, ok bool)
	// Warn takes what the user should know and what is no error. It may be nil.
	Warn func(message string)
}

func (o Options) isSource(name string, info os.FileInfo) error {
	if o.Source == nil {
		return nil
	}
	path, ok := o.Source(info)
	if !ok {
		return nil
	}
	if path == name {
		return fmt.Errorf("%s is the source", name)
	}
	return fmt.Errorf("%s is a file of the source: the same as %s", name, path)
}

func (o Options) checkRange(size int64) error {
	if size == sink.UnknownSize {
		if o.State != nil || o.Resume != 0 {
			return errors.New("a disk whose size is not known can't be resumed")
		}
		if o.Preallocation == PreallocateFalloc {
			return fmt.Errorf("space for a disk whose size is not known can't be reserved (%w); say its size, or use --preallocation off or full", errors.ErrUnsupported)
		}
		return nil
	}
	if size < 0 || o.Resume < 0 || o.Resume > size {
		return fmt.Errorf("a disk of %d bytes, to be resumed at %d", size, o.Resume)
	}
	if o.State == nil && o.Resume > 0 {
		return fmt.Errorf("resume at %d without the state of a checkpoint", o.Resume)
	}
	if o.State != nil && string(o.State) != string(state(size)) {
		return fmt.Errorf("resume: the checkpoint is %q, want %q", o.State, state(size))
	}
	return nil
}

// state is what a checkpoint keeps: a raw disk has no metadata, so that it
// only has to tell this from other formats and sizes.
func state(size int64) []byte { return fmt.Appendf(nil, "raw %d", size) }

// zeros is never written to.
var zeros [1 << 20]byte

// stage is how far a disk has come.
type stage uint8

const (
	writing stage = iota
	finished
	ended
)

// life is what all disks of this package share: the order of their calls, the
// contexts they live under, and the first error, which stays.
type life struct {
	ctx   context.Context
	name  string // as messages call the target
	limit int64  // a disk whose size is not known may have; 0: any size

	calls sync.RWMutex // read-locked by calls, locked by those that change what follows
	size  int64        // or sink.UnknownSize
	stage stage

	mu  sync.Mutex
	err error // guarded by mu
}

func (l *life) Unit() int64 { return 1 }

func (l *life) SameAt(ctx context.Context, off, n int64) error {
	if err := l.begin(ctx, off, n); err != nil {
		return err
	}
	defer l.calls.RUnlock()
	return l.fail(fmt.Errorf("%s: [%d, %d) is to stay as in the backing, and a raw disk has none", l.name, off, off+n))
}

// begin starts a call on a range. The caller read-unlocks l.calls at the end of
// it unless there is an error.
func (l *life) begin(ctx context.Context, off, n int64) error {
	l.calls.RLock()
	err := l.ready(ctx, writing)
	if err == nil {
		if err = l.inDisk(off, n); err != nil {
			l.fail(err)
		}
	}
	if err != nil {
		l.calls.RUnlock()
	}
	return err
}

func (l *life) inDisk(off, n int64) error {
	end := l.size
	if l.size == sink.UnknownSize {
		end = cmp.Or(l.limit, math.MaxInt64)
	}
	if off >= 0 && n >= 0 && n <= end-off {
		return nil
	}
	if l.size == sink.UnknownSize && off >= 0 && n >= 0 && off <= end {
		return fmt.Errorf("%s is too small: it has %d bytes (%s), and more are coming", l.name, end, bytesize.Format(end))
	}
	return fmt.Errorf("%s: %d bytes at %d are not in a disk of %d bytes", l.name, n, off, end)
}

// setSize is SetSize; do is what the disk has to do for it.
func (l *life) setSize(n int64, do func() error) error {
	l.calls.Lock()
	defer l.calls.Unlock()
	err := l.ready(l.ctx, writing)
	if err != nil {
		return err
	}
	if l.size != sink.UnknownSize {
		return l.fail(fmt.Errorf("%s: the size is set to %d bytes, and is %d already", l.name, n, l.size))
	}
	if err := l.inDisk(n, 0); err != nil {
		return l.fail(err)
	}
	l.size = n
	if err := do(); err != nil {
		return l.fail(err)
	}
	return nil
}

// writeAt is WriteAt of a disk whose bytes go out by write.
func (l *life) writeAt(p []byte, off int64, write func(p []byte, off int64) error) (int, error) {
	if err := l.begin(l.ctx, off, int64(len(p))); err != nil {
		return 0, err
	}
	defer l.calls.RUnlock()
	if err := write(p, off); err != nil {
		return 0, l.fail(err)
	}
	return len(p), nil
}

// ready says why a call can't be made. The caller holds l.calls.
func (l *life) ready(ctx context.Context, at stage) error {
	if l.stage == ended {
		return sink.ErrClosed
	}
	if err := l.failed(); err != nil {
		return fmt.Errorf("an earlier call failed: %w", err)
	}
	if l.stage < at {
		return fmt.Errorf("%s is published before it was finished", l.name)
	}
	if l.stage > at {
		return fmt.Errorf("%s is finished and takes no more", l.name)
	}
	if err := l.stopped(ctx); err != nil {
		return l.fail(err)
	}
	return nil
}

// stopped returns the cause for which the disk's context or that of a call has
// ended.
func (l *life) stopped(ctx context.Context) error {
	if l.ctx.Err() != nil {
		return context.Cause(l.ctx)
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return nil
}

func (l *life) failed() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// fail keeps the first error of the disk, and returns err.
func (l *life) fail(err error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.err == nil {
		l.err = err
	}
	return err
}

// advance makes the call that takes the disk from one stage to the next.
func (l *life) advance(ctx context.Context, from stage, do func() error) error {
	l.calls.Lock()
	defer l.calls.Unlock()
	if err := l.ready(ctx, from); err != nil {
		return err
	}
	if l.size == sink.UnknownSize {
		return l.fail(fmt.Errorf("%s is finished before its size is known", l.name))
	}
	if err := do(); err != nil {
		return l.fail(err)
	}
	l.stage = from + 1
	return nil
}

// end makes the call that ends the disk where it is; the disk has ended whatever
// it returns.
func (l *life) end(do func() error) error {
	l.calls.Lock()
	defer l.calls.Unlock()
	if l.stage == ended {
		return sink.ErrClosed
	}
	l.stage = ended
	return do()
}

// abort is end for Abort, which does nothing after the end.
func (l *life) abort(do func() error) error {
	if err := l.end(do); !errors.Is(err, sink.ErrClosed) {
		return err
	}
	return nil
}

// checkpoint is Checkpoint of a disk whose data only needs sync to be durable.
func (l *life) checkpoint(off int64, sync func() error) ([]byte, func(context.Context) error, error) {
	if err := l.begin(l.ctx, off, 0); err != nil {
		return nil, nil, err
	}
	defer l.calls.RUnlock()
	if l.size == sink.UnknownSize {
		return nil, nil, l.fail(fmt.Errorf("%s: a disk whose size is not known can't be resumed: %w", l.name, errors.ErrUnsupported))
	}
	return state(l.size), func(ctx context.Context) error {
		l.calls.RLock()
		defer l.calls.RUnlock()
		if err := l.ready(ctx, l.stage); err != nil {
			return err
		}
		if err := sync(); err != nil {
			return l.fail(err)
		}
		return nil
	}, nil
}
