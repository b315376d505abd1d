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

// Image is the file or block device that the bytes of an image format go into: a
// disk of sink.UnknownSize, so that SetSize comes before Finish, which can be
// read back and, unlike others of that size, resumed. Of a file, what is not
// written reads as zeros; a device has anything there. Files are also a
// sink.Cloner.
type Image interface {
	sink.Disk
	sink.Parallel
	sink.Sizer
	sink.Zeroed
	sink.Verifiable
	// ReadAt reads what was written, before Finish.
	io.ReaderAt
}

// CheckImage says why CreateImage would refuse path, as far as that can be known
// without making anything.
func CheckImage(path string, o Options) error {
	o.image = true
	if isDevice(path) {
		return CheckDevice(path, sink.UnknownSize, o)
	}
	return CheckFile(path, sink.UnknownSize, o)
}

// CreateImage is OpenDevice where path is a block device, else CreateFile. With
// Options.State, which an Image's Checkpoint returned, all at or above
// Options.Resume, an offset in the file, is cut off. Preallocation must be off.
func CreateImage(ctx context.Context, path string, o Options) (Image, error) {
	return createImage(ctx, path, o, kernel())
}

func createImage(ctx context.Context, path string, o Options, sys system) (Image, error) {
	if o.Preallocation != "" && o.Preallocation != PreallocateOff {
		return nil, fmt.Errorf("%s: preallocation %s is for raw disks: %w", path, o.Preallocation, errors.ErrUnsupported)
	}
	o.image = true
	create := createFile
	if isDevice(path) {
		create = createDevice
		o.Warn = nil // that the device has more than the image is nothing to say
	}
	d, err := create(ctx, path, sink.UnknownSize, o, sys)
	if err != nil {
		return nil, err
	}
	return d.(Image), nil
}

// isDevice is false also of what can't be looked at: the check of files says why.
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
		return n, l.Fail(fmt.Errorf("read %s at offset %d: %w", l.Name, off, err))
	}
	return n, err
}
