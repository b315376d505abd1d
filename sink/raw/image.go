package raw

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/sink"
)

// Image is the file or block device into which the image of a disk is written, for
// example a qcow2 image. The size of the image is at first sink.UnknownSize, so
// SetSize must be called before Finish. Even before SetSize, an Image can be read
// and can be resumed. If the Image is a file, its unwritten ranges read as zeros,
// and it is also a sink.Cloner. Unwritten ranges of a block device may read as
// anything.
type Image interface {
	sink.Disk
	sink.Parallel
	sink.Sizer
	sink.Zeroed
	sink.Verifiable
	// ReadAt reads data that was written. It may be called only before Finish.
	io.ReaderAt
}

// CheckImage returns the error that CreateImage would return for the same
// arguments, as far as that can be known without making anything.
func CheckImage(path string, o Options) error {
	o.image = true
	if isDevice(path) {
		return CheckDevice(path, sink.UnknownSize, o)
	}
	return CheckFile(path, sink.UnknownSize, o)
}

// CreateImage opens the block device at the given path, under the rules of
// OpenDevice. If the path is not a block device, it makes a file, under the rules
// of CreateFile. To resume, Options.State must be the state of a checkpoint of an
// Image, and Options.Resume an offset in the file or device. A file is truncated at
// this offset. Preallocation must be off.
func CreateImage(ctx context.Context, path string, o Options) (Image, error) {
	return createImage(ctx, path, o, kernel())
}

func createImage(ctx context.Context, path string, o Options, sys system) (Image, error) {
	if o.Preallocation != "" && o.Preallocation != PreallocateOff {
		return nil, fmt.Errorf("%s: preallocation %s is supported only for raw disks, not for disks in an image format such as qcow2: %w", path, o.Preallocation, errors.ErrUnsupported)
	}
	o.image = true
	create := createFile
	if isDevice(path) {
		create = createDevice
		o.Warn = nil // a device that is larger than the image is no reason to warn
	}
	d, err := create(ctx, path, sink.UnknownSize, o, sys)
	if err != nil {
		return nil, err
	}
	return d.(Image), nil
}

// isDevice reports whether there is a block device at the given path. If stat
// fails, isDevice returns false, and the later check for files reports the error.
func isDevice(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().Type() == fs.ModeDevice
}

// ReadAt implements sink.Readback.
func (d *file) ReadAt(p []byte, off int64) (int, error) { return d.readAt(p, off, d.w.f) }

// ReadAt implements sink.Readback.
func (d *device) ReadAt(p []byte, off int64) (int, error) { return d.readAt(p, off, d.w.f) }

func (l *life) readAt(p []byte, off int64, f *os.File) (int, error) {
	if err := l.BeginAt(l.Context, lifecycle.Writing); err != nil {
		return 0, err
	}
	defer l.Done()
	n, err := f.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return n, l.Fail(fmt.Errorf("cannot read %s at offset %d: %w", l.Name, off, err))
	}
	return n, err
}
