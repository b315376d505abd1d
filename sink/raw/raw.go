// Package raw writes raw disks, which have no metadata. [CreateFile] writes a
// sparse file, [OpenDevice] writes to a block device, and [Stream] to a pipe or
// another stream. [Null] drops all data. The packages that write image formats
// write their files through [CreateImage].
package raw

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/sink"
)

// Preallocation says how ranges of a file that read as zeros are stored.
type Preallocation string

const (
	PreallocateOff    Preallocation = "off"    // as holes; "" means the same
	PreallocateFalloc Preallocation = "falloc" // the space of the whole file is reserved before the first write
	PreallocateFull   Preallocation = "full"   // as written zeros
)

// Options are for CreateFile and OpenDevice. With the zero value, CreateFile makes
// a new sparse file, and OpenDevice returns a disk that writes all zeros to the
// device.
type Options struct {
	sink.Options
	// If Force is set, Publish may replace an existing file, and CreateFile
	// may remove the .partial file of an earlier run.
	Force bool
	// If DropPartial is set, CreateFile may remove the .partial file of an
	// earlier run, but Publish must not replace an existing file.
	DropPartial   bool
	Preallocation Preallocation // for files only
	TargetIsZero  bool          // for devices only: the device already reads as zeros, and zeros are not written
	DropCache     bool          // remove written data from the page cache
	// Need is the number of bytes that the whole file will need, including
	// the part that an earlier run wrote. CreateFile fails before it makes
	// anything if the file system has less room. The space of an existing
	// .partial file counts as room, because the copy resumes or replaces this
	// file. If Preallocation is falloc or full, the file needs at least the
	// size of the disk.
	Need int64
	// Source reports whether a given file is one of the files of the source,
	// and returns the path by which the source names this file. A target that
	// is a file of the source is refused. Source may be nil, which means that
	// no file belongs to the source.
	Source func(os.FileInfo) (path string, ok bool)
	// Warn is called with warnings for the user. It may be nil.
	Warn func(message string)

	image bool // the file of an Image: see there
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
		return fmt.Errorf("%s is the source and must not be overwritten: choose another target", name)
	}
	return fmt.Errorf("%s is a file of the source (the same as %s) and must not be overwritten: choose another target", name, path)
}

func (o Options) checkRange(size int64) error {
	if size == sink.UnknownSize && !o.image {
		if o.State != nil || o.Resume != 0 {
			return errors.New("a disk of unknown size cannot be resumed")
		}
		if o.Preallocation == PreallocateFalloc {
			return fmt.Errorf("space for a disk of unknown size cannot be reserved (%w): give the size with --size, or use --preallocation off or full", errors.ErrUnsupported)
		}
		return nil
	}
	return o.CheckResume(size, state(size))
}

// The function state returns what a checkpoint of a raw disk records. A raw disk
// has no metadata, so this is only the format and the size of the disk. A run can
// resume only a target of the same format and size.
func state(size int64) []byte { return fmt.Appendf(nil, "raw %d", size) }

// The slice zeros is a buffer of zero bytes, for writing ranges that read as zeros.
// It must not be changed.
var zeros [1 << 20]byte

// The type life holds the state and the methods that all types of disks in this
// package share.
type life struct {
	lifecycle.Target
	resumable bool // takes checkpoints even while the size is unknown
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
	return l.Fail(fmt.Errorf("%s: cannot take bytes [%d, %d) from a backing disk: a raw disk has no backing disk", l.Name, off, off+n))
}

// writeAt implements the method WriteAt for the types of disks in this package.
// It checks the call, and then calls its parameter write to write the bytes.
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

// The method checkpoint implements the method Checkpoint for the types of disks
// in this package. The function that it returns calls the parameter sync, which
// makes the written data durable.
func (l *life) checkpoint(off int64, sync func() error) ([]byte, func(context.Context) error, error) {
	if err := l.Begin(l.Context, off, 0); err != nil {
		return nil, nil, err
	}
	defer l.Done()
	if l.Size == sink.UnknownSize && !l.resumable {
		return nil, nil, l.Fail(fmt.Errorf("%s: a disk of unknown size cannot be resumed: %w", l.Name, errors.ErrUnsupported))
	}
	return state(l.Size), func(ctx context.Context) error { return l.InAnyStage(ctx, sync) }, nil
}
