// Package raw writes plain disks: sparse files, block devices in place,
// streams, and nothing at all.
package raw

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/sink"
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
	Force bool
	// DropPartial drops such a .partial, and does no more.
	DropPartial   bool
	Preallocation Preallocation // of files
	TargetIsZero  bool          // of devices: all of it reads as zeros before, so that zeros need no writing
	DropCache     bool          // what is written does not stay in the page cache
	// Need is how many bytes the file will allocate, with what an earlier run
	// has written of it. Less free space in its file system is an error before
	// anything is made. With Preallocation it is the size at least.
	Need int64
	// Source returns the name of the file of the source's that a file is, if
	// it is one: such a target is refused. It may be nil.
	Source func(os.FileInfo) (path string, ok bool)
	// Warn takes what the user should know and what is no error. It may be nil.
	Warn func(message string)

	image bool // see Image
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
	if size == sink.UnknownSize && !o.image {
		if o.State != nil || o.Resume != 0 {
			return errors.New("a disk whose size is not known can't be resumed")
		}
		if o.Preallocation == PreallocateFalloc {
			return fmt.Errorf("space for a disk whose size is not known can't be reserved (%w); say its size, or use --preallocation off or full", errors.ErrUnsupported)
		}
		return nil
	}
	if o.Resume < 0 || size != sink.UnknownSize && (size < 0 || o.Resume > size) {
		return fmt.Errorf("a disk of %d bytes, to be resumed at %d", size, o.Resume)
	}
	if o.State == nil && o.Resume > 0 {
		return fmt.Errorf("resume at %d without the state of a checkpoint", o.Resume)
	}
	if o.State != nil && string(o.State) != string(state(size)) {
		return sink.Unfit(fmt.Errorf("resume: the checkpoint is %q, want %q", o.State, state(size)))
	}
	return nil
}

// state is what a checkpoint keeps: a raw disk has no metadata, so that it
// only has to tell this from other formats and sizes.
func state(size int64) []byte { return fmt.Appendf(nil, "raw %d", size) }

// zeros is never written to.
var zeros [1 << 20]byte

// life is what all disks of this package share.
type life struct {
	lifecycle.Target
	resumable bool // also while the size is not known
}

func newLife(ctx context.Context, name string, size int64) life {
	return life{Target: lifecycle.Target{Context: ctx, Name: name, Size: size}}
}

func (l *life) Unit() int64 { return 1 }

func (l *life) SameAt(ctx context.Context, off, n int64) error {
	if err := l.Begin(ctx, off, n); err != nil {
		return err
	}
	defer l.Done()
	return l.Fail(fmt.Errorf("%s: [%d, %d) is to stay as in the backing, and a raw disk has none", l.Name, off, off+n))
}

// writeAt is WriteAt of a disk whose bytes go out by write.
func (l *life) writeAt(p []byte, off int64, write func(p []byte, off int64) error) (int, error) {
	if err := l.Begin(l.Context, off, int64(len(p))); err != nil {
		return 0, err
	}
	defer l.Done()
	if err := write(p, off); err != nil {
		return 0, l.Fail(err)
	}
	return len(p), nil
}

// checkpoint is Checkpoint of a disk whose data only needs sync to be durable.
func (l *life) checkpoint(off int64, sync func() error) ([]byte, func(context.Context) error, error) {
	if err := l.Begin(l.Context, off, 0); err != nil {
		return nil, nil, err
	}
	defer l.Done()
	if l.Size == sink.UnknownSize && !l.resumable {
		return nil, nil, l.Fail(fmt.Errorf("%s: a disk whose size is not known can't be resumed: %w", l.Name, errors.ErrUnsupported))
	}
	return state(l.Size), func(ctx context.Context) error { return l.Beside(ctx, sync) }, nil
}
