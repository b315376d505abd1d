package raw

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/eintr"
	"github.com/vddkcp/vddkcp/internal/flush"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// The array zeros has the zeros that writeZeros writes. Nothing writes to this array.
var zeros [256 << 10]byte

// devicePiece limits the number of bytes of a block device that one ioctl zeroes or
// discards. An ioctl cannot be interrupted, and a device that has to write the zeros
// may need minutes for a long range.
const devicePiece = 128 << 20

// WritableDisk is a raw disk that can be written. It has the ability source.Writable
// and the abilities of Disk. Its size never changes, and a write past the end is an
// error.
//
// The kernel reports only once that it could not write data to the disk. Therefore,
// after a failed Flush, every later Flush returns the same error.
type WritableDisk struct {
	*Disk
	sector      int64       // unit in which a block device zeroes and discards, in bytes; 1 for a file
	noPunch     atomic.Bool // the file system or device cannot punch holes
	noZeroRange atomic.Bool

	fdatasync func(fd int) error
	ioctl     func(fd int, request uintptr, off, n int64) error // zeroes or discards a range; tests replace it

	flushes flush.Group
}

// OpenWritable opens path for reading and writing. Like Open, it opens a regular file or
// a block device. A regular file is locked with flock, so that other processes cannot
// open it for writing with this package or package sink/raw. A block device is opened
// exclusively (O_EXCL). This fails if the device is mounted or part of an array. As long
// as the device is open, it cannot be mounted or become part of an array.
func OpenWritable(ctx context.Context, path string) (*WritableDisk, error) {
	d, err := open(ctx, path, unix.O_RDWR)
	if errors.Is(err, unix.EBUSY) {
		err = fmt.Errorf("%w: the device is mounted, or in use by another process or device", err)
	}
	if err != nil {
		return nil, err
	}
	w := &WritableDisk{Disk: d, sector: 1, fdatasync: unix.Fdatasync, ioctl: ioctlRange}
	if d.block {
		w.sector = d.info.LogicalSector
		if readOnly, err := unix.IoctlGetUint32(d.fd, unix.BLKROGET); err == nil && readOnly != 0 {
			d.Close()
			return nil, fmt.Errorf("%s is read-only: %w", path, unix.EROFS)
		}
	} else if err := lock(d.fd, path); err != nil {
		d.Close()
		return nil, err
	}
	return w, nil
}

// The function lock locks the file for as long as fd, its descriptor, is open. On a file
// system that does not support locks, the function does nothing.
func lock(fd int, path string) error {
	err := eintr.Retry(func() error { return unix.Flock(fd, unix.LOCK_EX|unix.LOCK_NB) })
	if err == unix.EWOULDBLOCK {
		return fmt.Errorf("%s is being written by another process", path)
	}
	if err != nil && !unsupported(err) && err != unix.ENOLCK {
		return fmt.Errorf("lock %s: %w", path, err)
	}
	return nil
}

// The method begin starts a call that changes the range [off, off+n) of the disk. If
// begin succeeds, the caller must call d.life.End when the call is done.
func (d *WritableDisk) begin(ctx context.Context, off, n int64) error {
	if err := d.life.Begin(ctx); err != nil {
		return err
	}
	if !life.InDisk(off, n, d.size) {
		d.life.End()
		return fmt.Errorf("the range is outside the disk of %d bytes", d.size)
	}
	return nil
}

// The method explain returns err with a text that begins with the given operation, the
// path of the disk and the range.
func (d *WritableDisk) explain(what string, off, n int64, err error) error {
	return fmt.Errorf("%s %s [%d, %d): %w", what, d.path, off, off+n, err)
}

// WriteAt implements source.Writable.
func (d *WritableDisk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.begin(d.life.Context, off, int64(len(p))); err != nil {
		return 0, d.explain("write", off, int64(len(p)), err)
	}
	defer d.life.End()
	n, err := d.write(p, off)
	if err != nil {
		return n, d.explain("write", off+int64(n), int64(len(p)-n), err)
	}
	return n, nil
}

// The method write writes p at the given offset. The written range must lie in the disk.
// The caller has called begin.
func (d *WritableDisk) write(p []byte, off int64) (n int, err error) {
	for n < len(p) {
		if err := context.Cause(d.life.Context); err != nil {
			return n, err
		}
		var k int
		err := eintr.Retry(func() (err error) {
			k, err = unix.Pwrite(d.fd, p[n:min(len(p), n+maxRead)], off+int64(n))
			return err
		})
		if err == nil && k == 0 {
			err = unix.ENOSPC
		}
		if err != nil {
			return n, err
		}
		n += k
	}
	return n, nil
}

// ZeroAt implements source.Writable. If the flag MayTrim is set, ZeroAt first tries to
// punch a hole. If the flag is not set, or a hole cannot be punched, ZeroAt lets the file
// system or the device zero the range. If they do not support that, ZeroAt writes zeros.
// If the flag FastOnly is set, it returns an error instead of writing zeros to the whole
// range.
func (d *WritableDisk) ZeroAt(ctx context.Context, off, n int64, flags source.ZeroFlags) error {
	if err := d.begin(ctx, off, n); err != nil {
		return d.explain("zero", off, n, err)
	}
	defer d.life.End()
	head, whole := d.inner(off, n)
	err := errors.ErrUnsupported
	if whole > 0 {
		err = d.zeroRange(ctx, off+head, whole, flags)
	}
	switch {
	case err == nil:
		if err = d.writeZeros(ctx, off, head); err == nil {
			err = d.writeZeros(ctx, off+head+whole, n-head-whole)
		}
	case unsupported(err) && flags.Has(source.FastOnly):
		return errors.ErrUnsupported
	case unsupported(err):
		err = d.writeZeros(ctx, off, n)
	}
	if err != nil {
		return d.explain("zero", off, n, err)
	}
	return nil
}

// The method inner looks at the n bytes that begin at the given offset. It returns how
// many of them come before the first whole sector, and how many bytes the whole sectors
// have together.
func (d *WritableDisk) inner(off, n int64) (head, whole int64) {
	head = min((d.sector-off%d.sector)%d.sector, n)
	return head, (n - head) / d.sector * d.sector
}

// zeroRange lets the file system or the device zero a range of whole sectors. If that
// is not supported, it returns an error for which the function unsupported returns
// true.
func (d *WritableDisk) zeroRange(ctx context.Context, off, n int64, flags source.ZeroFlags) error {
	if flags.Has(source.MayTrim) && !d.noPunch.Load() {
		// On a block device, the kernel punches a hole only if the range reads as
		// zeros afterwards.
		err := eintr.Retry(func() error {
			return unix.Fallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
		})
		if !unsupported(err) {
			return err
		}
		d.noPunch.Store(true)
	}
	if d.block {
		if flags.Has(source.FastOnly) {
			return errors.ErrUnsupported // the kernel may have to write zeros
		}
		return d.inPieces(ctx, unix.BLKZEROOUT, off, n)
	}
	if d.noZeroRange.Load() {
		return errors.ErrUnsupported
	}
	err := eintr.Retry(func() error {
		return unix.Fallocate(d.fd, unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
	})
	if unsupported(err) {
		d.noZeroRange.Store(true)
	}
	return err
}

func (d *WritableDisk) writeZeros(ctx context.Context, off, n int64) error {
	for n > 0 {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		k, err := d.write(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(k), n-int64(k)
	}
	return nil
}

// inPieces calls the given ioctl for the range [off, off+n) of a block device, piece by
// piece. It stops when ctx or the context of the disk ends. Pieces end at multiples of
// devicePiece. A device discards only whole units. If two pieces met within such a unit,
// the unit would not be discarded.
func (d *WritableDisk) inPieces(ctx context.Context, request uintptr, off, n int64) error {
	for end := off + n; off < end; {
		if err := d.life.Cause(ctx); err != nil {
			return err
		}
		k := min(end-off, devicePiece-off%devicePiece)
		if err := eintr.Retry(func() error { return d.ioctl(d.fd, request, off, k) }); err != nil {
			return err
		}
		off += k
	}
	return nil
}

func ioctlRange(fd int, request uintptr, off, n int64) error {
	r := [2]uint64{uint64(off), uint64(n)}
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return errno
	}
	return nil
}

// Trim implements source.Writable. If the file system or the device cannot deallocate
// the range, Trim does nothing.
func (d *WritableDisk) Trim(ctx context.Context, off, n int64) error {
	if err := d.begin(ctx, off, n); err != nil {
		return d.explain("trim", off, n, err)
	}
	defer d.life.End()
	head, whole := d.inner(off, n)
	if whole == 0 {
		return nil
	}
	var err error
	if d.block {
		err = d.inPieces(ctx, unix.BLKDISCARD, off+head, whole)
	} else {
		err = eintr.Retry(func() error {
			return unix.Fallocate(d.fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off+head, whole)
		})
	}
	if err != nil && !unsupported(err) {
		return d.explain("trim", off, n, err)
	}
	return nil
}

// Flush implements source.Writable.
func (d *WritableDisk) Flush(ctx context.Context) error {
	if err := d.begin(ctx, 0, 0); err != nil {
		return fmt.Errorf("flush %s: %w", d.path, err)
	}
	defer d.life.End()
	err := d.flushes.Do(ctx, func() error {
		if err := context.Cause(d.life.Context); err != nil { // later flushes fail with the same error
			return err
		}
		return eintr.Retry(func() error { return d.fdatasync(d.fd) })
	})
	if err != nil {
		return fmt.Errorf("flush %s: %w", d.path, err)
	}
	return nil
}

var (
	_ source.Writable = (*WritableDisk)(nil)
	_ interface {
		source.Disk
		File() *os.File
	} = (*WritableDisk)(nil)
)
