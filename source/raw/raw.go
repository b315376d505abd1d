// Package raw reads and writes a local file or block device as a raw disk: byte n of
// the file is byte n of the disk. [Open] opens a disk for reading, [OpenWritable] also
// for writing, and [Stream] reads a pipe from its start to its end.
package raw

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/eintr"
	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// maxRead limits the number of bytes that one system call reads or writes. Between two
// system calls the context is checked, so that a large request to a slow disk can be
// interrupted.
const maxRead = 8 << 20

// Disk is a raw disk in a local file or block device. It has the abilities
// source.Identified, Described, InFile and Uncached. All methods are safe for
// concurrent use.
type Disk struct {
	path  string
	block bool // path is a block device
	size  int64
	info  source.Info

	uncached    atomic.Bool // ReadUncached was called
	noDontcache atomic.Bool // the kernel or the file system lacks RWF_DONTCACHE

	// The field life counts the calls in progress that use fd, the descriptor of the
	// file. Close waits for these calls. A call of Extents is not counted while it yields
	// an extent: the body of the loop over the extents may call Close, which would
	// otherwise wait forever.
	life life.Life
	file *os.File
	fd   int // of file
}

// Open opens the regular file or block device at path for reading. It follows symbolic
// links. If the path leads to anything else, such as a directory, a FIFO or a terminal,
// Open returns an error, and neither reads it nor waits for it.
func Open(ctx context.Context, path string) (*Disk, error) { return open(ctx, path, unix.O_RDONLY) }

// The function open opens path with the given access: O_RDONLY for reading, or O_RDWR for
// reading and writing.
func open(ctx context.Context, path string, access int) (*Disk, error) {
	if err := context.Cause(ctx); err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	// Opening a device can have effects (a tape rewinds, a watchdog starts). Therefore
	// the kind of the file is checked before the file is opened. It is checked again on
	// the open file.
	var st unix.Stat_t
	if err := eintr.Retry(func() error { return unix.Stat(path, &st) }); err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	if err := readable(path, &st); err != nil {
		return nil, err
	}
	flags := access | unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	if access == unix.O_RDWR && st.Mode&unix.S_IFMT == unix.S_IFBLK {
		flags |= unix.O_EXCL
	}
	var fd int
	err := eintr.Retry(func() (err error) {
		fd, err = unix.Open(path, flags, 0)
		return err
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: path, Err: err}
	}
	d, err := newDisk(ctx, fd, path)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return d, nil
}

func newDisk(ctx context.Context, fd int, path string) (*Disk, error) {
	d := &Disk{path: path, fd: fd, life: life.Life{Context: ctx, Name: path}}
	st, size, err := d.stat()
	if err != nil {
		return nil, &fs.PathError{Op: "stat", Path: path, Err: err}
	}
	if err := readable(path, &st); err != nil {
		return nil, err
	}
	if err := unix.SetNonblock(fd, false); err != nil {
		return nil, &fs.PathError{Op: "fcntl", Path: path, Err: err}
	}
	d.block = st.Mode&unix.S_IFMT == unix.S_IFBLK
	d.size = size
	d.info = source.Info{
		Format:        "raw",
		LogicalSector: 512,
		Allocated:     min(st.Blocks*512, d.size),
		Chain:         []string{path},
	}
	if d.block {
		d.info.Allocated = d.size
		if n, err := unix.IoctlGetUint32(fd, unix.BLKSSZGET); err == nil {
			d.info.LogicalSector = int64(n)
		}
	}
	d.file = os.NewFile(uintptr(fd), path)
	return d, nil
}

// The function readable returns an error unless st describes a regular file or a block
// device.
func readable(path string, st *unix.Stat_t) error {
	kind := "an unknown kind of file"
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
		return nil
	case unix.S_IFDIR:
		kind = "a directory"
	case unix.S_IFIFO:
		kind = "a FIFO"
	case unix.S_IFCHR:
		kind = "a character device"
	case unix.S_IFSOCK:
		kind = "a socket"
	}
	return fmt.Errorf("%s is %s, not a regular file or a block device", path, kind)
}

// Size returns the size in bytes that the file had when it was opened.
func (d *Disk) Size() int64 { return d.size }

// File returns the open file, for calls such as fstat. It belongs to the disk: the
// caller must not close it or move its offset.
func (d *Disk) File() *os.File { return d.file }

// Info describes the file as it was when it was opened.
func (d *Disk) Info() source.Info { return d.info }

// InFile returns the open file of the disk. The returned position in the file equals the
// given offset in the disk.
func (d *Disk) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	if off < 0 || off >= d.size {
		return nil, 0, 0, false
	}
	return d.file, off, d.size - off, true
}

// Identity returns an identity that consists of three parts: the identity that package
// fileid returns for the file, the present size of the file, and its modification time.
// The identity changes when the file is changed, and stays the same when the file system
// is mounted again, for example after a reboot.
//
// For a block device the identity consists of the device number and the size. Both stay
// the same when the content changes. The result proof says whether the identity changes
// with the content, and is therefore "none".
func (d *Disk) Identity(ctx context.Context) (id, proof string, err error) {
	if err := d.life.Begin(ctx); err != nil {
		return "", "", fmt.Errorf("identity of %s: %w", d.path, err)
	}
	defer d.life.End()
	st, size, err := d.stat()
	if err != nil {
		return "", "", fmt.Errorf("identity of %s: %w", d.path, err)
	}
	if d.block {
		return fmt.Sprintf("block:%d:%d:%d", unix.Major(st.Rdev), unix.Minor(st.Rdev), size), "none", nil
	}
	file, err := fileid.Of(d.fd)
	if err != nil {
		return "", "", fmt.Errorf("identity of %s: %w", d.path, err)
	}
	return fmt.Sprintf("file:%s:%d:%d", file, size, st.Mtim.Nano()), "mtime", nil
}

// ReadUncached makes later reads leave nothing in the page cache. The flag
// RWF_DONTCACHE does this, but Linux before 6.14, tmpfs and block devices do not
// support it. In these cases each range is dropped from the cache after it was read,
// even if it was in the cache before.
func (d *Disk) ReadUncached() { d.uncached.Store(true) }

// ReadAt implements source.Disk. If the file is now shorter than when it was opened,
// reading the missing part is an error that wraps io.ErrUnexpectedEOF.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	return d.life.ReadAt(p, off, d.size, func(p []byte) (int, error) { return d.readAll(p, off) })
}

// readAll fills p with the bytes of the file that begin at the given offset. The range of
// these bytes must lie in the disk. The caller has called d.life.Begin.
func (d *Disk) readAll(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		if err := context.Cause(d.life.Context); err != nil {
			return n, d.readError(off+int64(n), int64(len(p)-n), err)
		}
		got, err := d.read(p[n:min(len(p), n+maxRead)], off+int64(n))
		n += got
		if err == nil && got == 0 {
			if err = d.shrunk(); err == nil {
				err = io.ErrUnexpectedEOF
			}
		}
		if err != nil {
			return n, d.readError(off+int64(n), int64(len(p)-n), err)
		}
	}
	return len(p), nil
}

// The method read reads some bytes into p with one system call. If reads should leave
// nothing in the page cache, and RWF_DONTCACHE is supported, read calls preadv2 with this
// flag. Otherwise it calls pread. At the end of the file it returns 0 bytes and no error.
func (d *Disk) read(p []byte, off int64) (n int, err error) {
	uncached := d.uncached.Load()
	if uncached && !d.noDontcache.Load() {
		err = eintr.Retry(func() (err error) {
			n, err = unix.Preadv2(d.fd, [][]byte{p}, off, unix.RWF_DONTCACHE)
			return err
		})
		if !unsupported(err) {
			return max(n, 0), err
		}
		d.noDontcache.Store(true)
	}
	err = eintr.Retry(func() (err error) {
		n, err = unix.Pread(d.fd, p, off)
		return err
	})
	if uncached && n > 0 {
		// Drop the bytes from the page cache. Fadvise only gives the kernel a hint, and
		// has an effect on clean pages only. Its error does not matter.
		_ = unix.Fadvise(d.fd, off, int64(n), unix.FADV_DONTNEED)
	}
	return max(n, 0), err
}

func (d *Disk) readError(off, n int64, err error) error {
	return fmt.Errorf("read %s [%d, %d): %w", d.path, off, off+n, err)
}

// shrunk returns an error if the file is shorter than when it was opened.
func (d *Disk) shrunk() error {
	_, size, err := d.stat()
	if err != nil {
		return err
	}
	if size < d.size {
		return fmt.Errorf("the file had %d bytes when it was opened and has %d now: %w", d.size, size, io.ErrUnexpectedEOF)
	}
	return nil
}

// The method stat returns what fstat returns for the open file, and the current size of
// the file in bytes.
func (d *Disk) stat() (st unix.Stat_t, size int64, err error) {
	if err := eintr.Retry(func() error { return unix.Fstat(d.fd, &st) }); err != nil {
		return st, 0, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFBLK {
		return st, st.Size, nil
	}
	// For a block device, lseek to the end returns the size. The ioctl BLKGETSIZE64
	// returns the same number, but its argument has another type on some architectures.
	size, err = unix.Seek(d.fd, 0, io.SeekEnd)
	return st, size, err
}

// Extents finds holes with SEEK_DATA and SEEK_HOLE. Holes are extents of the kind Zero
// with the field Absent set to false, as in the output of qemu-img map for a raw file.
// A block device is one Data extent. So is a file on a file system that does not report
// holes.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		end := off + length
		if !life.InDisk(off, length, d.size) {
			yield(source.Extent{}, fmt.Errorf("extents of %s: the range [%d, %d) is outside the disk of %d bytes", d.path, off, end, d.size))
			return
		}
		for pos := off; pos < end; {
			hole, data, err := d.next(ctx, pos)
			if err != nil {
				yield(source.Extent{}, fmt.Errorf("extents of %s at offset %d: %w", d.path, pos, err))
				return
			}
			for _, e := range [2]source.Extent{
				{Off: pos, Len: min(hole, end-pos), Kind: source.Zero},
				{Off: pos + hole, Len: min(data, end-pos-hole), Kind: source.Data},
			} {
				if e.Len > 0 && !yield(e, nil) {
					return
				}
			}
			pos += hole + data
		}
	}
}

// The method next returns the length in bytes of the hole at the offset pos, and the
// length of the data after the hole. One of the two lengths may be 0, but not both.
func (d *Disk) next(ctx context.Context, pos int64) (hole, data int64, err error) {
	if err := d.life.Begin(ctx); err != nil {
		return 0, 0, err
	}
	defer d.life.End()
	if d.block {
		return 0, d.size - pos, nil
	}
	hole, data = holeAndData(pos, d.size, d.seek)
	if data == 0 {
		// If the file was truncated after it was opened, the missing part is reported as
		// an error and not as a hole.
		return hole, 0, d.shrunk()
	}
	return hole, data, nil
}

// holeAndData returns the length of the hole at the offset pos of a file, and the length
// of the data after the hole. The parameter size is the size of the file. These lengths,
// the offset and the size are in bytes. The parameter seek is a function that calls
// lseek.
func holeAndData(pos, size int64, seek func(off int64, whence int) (int64, error)) (hole, data int64) {
	start, err := seek(pos, unix.SEEK_DATA)
	switch {
	case err == unix.ENXIO: // there is no data at or after pos
		return size - pos, 0
	case err != nil || start < pos: // the file system does not report holes
		return 0, size - pos
	case start >= size: // the file has grown
		return size - pos, 0
	}
	stop, err := seek(start, unix.SEEK_HOLE)
	if err != nil || stop <= start || stop > size {
		stop = size
	}
	return start - pos, stop - start
}

// The method seek calls lseek, which changes the offset of the open file. This is
// harmless, because no other call depends on that offset.
func (d *Disk) seek(off int64, whence int) (pos int64, err error) {
	err = eintr.Retry(func() (err error) {
		pos, err = unix.Seek(d.fd, off, whence)
		return err
	})
	return pos, err
}

// Close waits for calls in progress. Later calls fail with an error that wraps
// os.ErrClosed.
func (d *Disk) Close() error {
	return d.life.Close(d.file.Close)
}

// unsupported reports whether err says that the kernel or the file system does not
// support the call or its flags.
func unsupported(err error) bool {
	return err == unix.EOPNOTSUPP || err == unix.EINVAL || err == unix.ENOSYS || err == unix.ENOTTY || err == errors.ErrUnsupported
}
