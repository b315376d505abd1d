package raw

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/eintr"
	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// zeroPiece is the maximum number of bytes that one system call zeroes. It is
// small, because the end of the context is noticed only between two system calls.
const zeroPiece = 64 << 20

// CheckDevice returns the error that OpenDevice would return for the same
// arguments. It does not write to the device or open it for writing. It calls
// Options.Warn with the same warnings as OpenDevice.
func CheckDevice(path string, size int64, o Options) error {
	f, _, err := openDevice(path, os.O_RDONLY, size, o)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS); err != nil {
		return fmt.Errorf("cannot write to %s: %w", path, err)
	}
	return nil
}

// OpenDevice opens a block device, to write a disk of the given size (in bytes)
// to it. The device must not be in use, and must not be smaller than the disk.
// If the device is larger, its part after the disk is not changed, and
// Options.Warn is called. Publish, Suspend and Abort leave the content of the
// device as it is.
//
// The returned disk has the ability sink.Parallel, but its MaxParallel is 1: it takes
// calls in any order, one at a time. It also has the abilities sink.Sizer and
// sink.Verifiable. If Options.TargetIsZero is set, it has the ability sink.Zeroed as
// well. The fields Preallocation, Need and Force of Options have no effect.
func OpenDevice(ctx context.Context, path string, size int64, o Options) (sink.Disk, error) {
	return createDevice(ctx, path, size, o, kernel())
}

func createDevice(ctx context.Context, path string, size int64, o Options, sys system) (sink.Disk, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	f, has, err := openDevice(path, os.O_RDWR, size, o)
	if err != nil {
		return nil, err
	}
	sector, err := unix.IoctlGetUint32(int(f.Fd()), unix.BLKSSZGET)
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("cannot get the sector size of %s: %w", path, err)
	}
	d := &device{
		life:   newLife(ctx, path, size),
		w:      writer{f: f, sys: sys, name: path, drop: o.DropCache},
		sector: int64(sector),
		zeroed: o.TargetIsZero && o.State == nil,
		warn:   o.Warn,
	}
	d.has, d.Limit, d.resumable = has, has, o.image
	return d, nil
}

// openDevice opens a device and returns an error if it must not be written. It also
// returns the size of the device in bytes.
func openDevice(path string, flags int, size int64, o Options) (f *os.File, has int64, err error) {
	if err := o.checkRange(size); err != nil {
		return nil, 0, fmt.Errorf("%s: %w", path, err)
	}
	// Opening a device with O_EXCL fails while the device is mounted, is a
	// part of an array, or is open with O_EXCL in another process.
	f, err = os.OpenFile(path, flags|unix.O_EXCL, 0)
	if errors.Is(err, unix.EBUSY) {
		return nil, 0, fmt.Errorf("%w: the device is mounted, or in use by another process or device", err)
	}
	if err != nil {
		return nil, 0, err
	}
	defer func(f *os.File) {
		if err != nil {
			f.Close()
		}
	}(f)
	info, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	if info.Mode().Type() != os.ModeDevice {
		return nil, 0, fmt.Errorf("%s is not a block device (%s)", path, info.Mode())
	}
	if err := o.isSource(path, info); err != nil {
		return nil, 0, err
	}
	if err := o.isPartOfSource(path, info); err != nil {
		return nil, 0, err
	}
	if readOnly, err := unix.IoctlGetUint32(int(f.Fd()), unix.BLKROGET); err == nil && readOnly != 0 {
		return nil, 0, fmt.Errorf("%s is read-only: %w", path, unix.EROFS)
	}
	has, err = f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil, 0, fmt.Errorf("cannot get the size of %s: %w", path, err)
	}
	if has < size {
		return nil, 0, fmt.Errorf("%s is too small: it has %d bytes (%s), and the disk has %d bytes (%s)", path, has, bytesize.Format(has), size, bytesize.Format(size))
	}
	if o.Identity != "" {
		id, err := deviceIdentity(f, has)
		if err == nil {
			err = o.CheckIdentity(path, id)
		}
		if err != nil {
			return nil, 0, err
		}
	}
	if size != sink.UnknownSize {
		warnLarger(o.Warn, path, has, size)
	}
	return f, has, nil
}

// isPartOfSource returns an error if writing to the device would change the source.
// This is so, for example, if the device is a loop device over a file of the
// source, a partition of the source, or a disk of which the source is a partition.
func (o Options) isPartOfSource(name string, info os.FileInfo) error {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || o.Source == nil {
		return nil
	}
	number := fmt.Sprintf("%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev))
	for _, related := range relatedFiles("/sys/dev/block", number) {
		info, err := os.Stat(related)
		if err != nil {
			continue
		}
		if path, ok := o.Source(info); ok {
			return fmt.Errorf("%s shares blocks with the source %s: writing to it would overwrite the source", name, path)
		}
	}
	return nil
}

func warnLarger(warn func(string), path string, has, size int64) {
	if has > size && warn != nil {
		warn(fmt.Sprintf("%s is larger than the disk: its last %d bytes, from offset %d on, are left unchanged", path, has-size, size))
	}
}

type device struct {
	life
	w      writer
	sector int64
	has    int64 // size of the device in bytes
	zeroed bool
	warn   func(string)
	method atomic.Int32 // the first method of zeroSectors that has not failed
}

func (d *device) MaxParallel() int { return 1 }

// Identity implements sink.Identified. The result describes the device and its
// size.
func (d *device) Identity() (string, error) { return deviceIdentity(d.w.f, d.has) }

func (d *device) ZeroedFrom(int64) bool { return d.zeroed }

func (d *device) WriteAt(p []byte, off int64) (int, error) { return d.writeAt(p, off, d.w.write) }

func (d *device) ZeroAt(ctx context.Context, off, n int64) error {
	if err := d.Begin(ctx, off, n); err != nil {
		return err
	}
	defer d.Done()
	if d.zeroed {
		return nil
	}
	if err := d.zero(func() error { return d.Stopped(ctx) }, off, off+n); err != nil {
		return d.Fail(err)
	}
	return nil
}

// The method zero makes [off, end) read as zeros. If possible, a system call zeroes
// the whole sectors of the range without writing data. If the range begins or ends
// within a sector, zeros are written there.
func (d *device) zero(stopped func() error, off, end int64) error {
	from := min((off+d.sector-1)/d.sector*d.sector, end)
	to := max(end/d.sector*d.sector, from)
	if err := d.w.writeZeros(stopped, off, from-off); err != nil {
		return err
	}
	for from < to {
		if err := stopped(); err != nil {
			return err
		}
		n := min(to-from, zeroPiece)
		if err := d.zeroSectors(stopped, from, n); err != nil {
			return err
		}
		from += n
	}
	return d.w.writeZeros(stopped, to, end-to)
}

// zeroSectors zeroes whole sectors by the first method that works. A method that
// has failed is not tried again, whatever the error was, because devices return
// different errors for methods that they do not support.
func (d *device) zeroSectors(stopped func() error, off, n int64) error {
	fd, sys := int(d.w.f.Fd()), d.w.sys
	for {
		method := d.method.Load()
		var err error
		switch method {
		case 0:
			err = eintr.Retry(func() error { return sys.zeroOut(fd, off, n) })
		case 1:
			err = eintr.Retry(func() error {
				return sys.fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
			})
		case 2:
			err = eintr.Retry(func() error { return sys.fallocate(fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n) })
		default:
			return d.w.writeZeros(stopped, off, n)
		}
		if err == nil {
			return nil
		}
		d.method.CompareAndSwap(method, method+1)
	}
}

func (d *device) Checkpoint(off int64) ([]byte, func(context.Context) error, error) {
	return d.checkpoint(off, d.w.sync)
}

func (d *device) SetSize(n int64) error {
	return d.life.SetSize(n, func() error {
		warnLarger(d.warn, d.Name, d.Limit, n)
		return nil
	})
}

func (d *device) Finish(ctx context.Context) error {
	return d.Advance(ctx, lifecycle.Writing, d.w.sync)
}

func (d *device) Reopen(ctx context.Context) (source.Disk, error) {
	if err := d.BeginAt(ctx, lifecycle.Finished); err != nil {
		return nil, err
	}
	defer d.Done()
	d.w.forget()
	return reopen(ctx, d.w.f.Name(), d.Size)
}

func (d *device) Publish(ctx context.Context) error {
	if err := d.Advance(ctx, lifecycle.Finished, nothing); err != nil {
		return err
	}
	d.w.close() // the data is durable, so an error of closing changes nothing
	return nil
}

func (d *device) Suspend() error { return d.End(d.w.close) }
func (d *device) Abort() error   { return d.life.Abort(d.w.close) }
