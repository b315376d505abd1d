package raw

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/eintr"
)

// rwfDontcache is the flag RWF_DONTCACHE of linux/fs.h (since Linux 6.14). With
// this flag, written data go to the device at once and are then removed from the
// page cache.
const rwfDontcache = 0x80

// The type system holds the system calls that this package uses. Tests replace some
// of them to simulate failures.
type system struct {
	pwrite        func(fd int, p []byte, off int64) (int, error)
	pwriteUncache func(fd int, p []byte, off int64) (int, error)
	syncRange     func(fd int, off, n int64, flags int) error
	fsync         func(fd int) error
	fsyncDir      func(fd int) error
	ftruncate     func(fd int, size int64) error
	fallocate     func(fd int, mode uint32, off, n int64) error
	zeroOut       func(fd int, off, n int64) error
	cloneRange    func(fd, from int, pos, n, off int64) error
	rename        func(dir int, from, to string, flags uint) error
	link          func(dir int, from, to string) error
	unlink        func(dir int, name string) error
}

func kernel() system {
	return system{
		pwrite: unix.Pwrite,
		pwriteUncache: func(fd int, p []byte, off int64) (int, error) {
			return unix.Pwritev2(fd, [][]byte{p}, off, rwfDontcache)
		},
		syncRange: unix.SyncFileRange,
		fsync:     unix.Fsync,
		fsyncDir:  unix.Fsync,
		ftruncate: unix.Ftruncate,
		fallocate: unix.Fallocate,
		zeroOut: func(fd int, off, n int64) error {
			r := [2]uint64{uint64(off), uint64(n)}
			if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKZEROOUT, uintptr(unsafe.Pointer(&r))); errno != 0 {
				return errno
			}
			return nil
		},
		cloneRange: func(fd, from int, pos, n, off int64) error {
			return unix.IoctlFileCloneRange(fd, &unix.FileCloneRange{
				Src_fd: int64(from), Src_offset: uint64(pos), Src_length: uint64(n), Dest_offset: uint64(off),
			})
		},
		rename: func(dir int, from, to string, flags uint) error {
			return unix.Renameat2(dir, from, dir, to, flags)
		},
		link:   func(dir int, from, to string) error { return unix.Linkat(dir, from, dir, to, 0) },
		unlink: func(dir int, name string) error { return unix.Unlinkat(dir, name, 0) },
	}
}

// The function lacking reports whether err means that the kernel or the file system
// does not support a system call or its flags.
func lacking(err error) bool {
	return errors.Is(err, errors.ErrUnsupported) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTTY)
}

// The function explain is called with the error of a system call that failed to
// write to an open file or to change its size or its blocks. It adds the reason of
// the failure or an instruction for the user, if it knows one.
func explain(fd int, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC) && isBlockDevice(fd):
		return fmt.Errorf("%w: the device has become smaller, or the storage pool or the file behind it is full", err)
	case errors.Is(err, unix.ENOSPC):
		free := ""
		if n, known := freeSpace(fd); known {
			free = fmt.Sprintf(" (%s free)", bytesize.Format(n))
		}
		return fmt.Errorf("%w%s: free some space, or write the disk to another file system", err, free)
	case errors.Is(err, unix.EDQUOT):
		return fmt.Errorf("%w: raise the quota of this user, group or project, or remove some of its files", err)
	case errors.Is(err, unix.EFBIG):
		return fmt.Errorf("%w: the file exceeds the limit of the file system (%s) or of this process (ulimit -f)", err, fileSystem(fd))
	}
	return err
}

func isBlockDevice(fd int) bool {
	var st unix.Stat_t
	return eintr.Retry(func() error { return unix.Fstat(fd, &st) }) == nil && st.Mode&unix.S_IFMT == unix.S_IFBLK
}

// freeSpace returns how many bytes an unprivileged user can still allocate. The
// result known is false if the file system does not report this number.
func freeSpace(fd int) (n int64, known bool) {
	var s unix.Statfs_t
	if err := eintr.Retry(func() error { return unix.Fstatfs(fd, &s) }); err != nil || s.Blocks == 0 {
		return 0, false
	}
	return int64(s.Bavail) * s.Bsize, true
}

// fileSystem returns the name of the file system that contains the open file
// with the descriptor fd. If the name is not known, it returns the magic number
// of the file system in hexadecimal.
func fileSystem(fd int) string {
	var s unix.Statfs_t
	if err := eintr.Retry(func() error { return unix.Fstatfs(fd, &s) }); err != nil {
		return "unknown"
	}
	switch s.Type {
	case unix.EXT4_SUPER_MAGIC:
		return "ext2, ext3 or ext4"
	case unix.XFS_SUPER_MAGIC:
		return "xfs"
	case unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case unix.TMPFS_MAGIC:
		return "tmpfs"
	case unix.NFS_SUPER_MAGIC:
		return "nfs"
	case unix.MSDOS_SUPER_MAGIC:
		return "vfat"
	case unix.FUSE_SUPER_MAGIC:
		return "fuse"
	case unix.OVERLAYFS_SUPER_MAGIC:
		return "overlayfs"
	case unix.SMB2_SUPER_MAGIC, unix.CIFS_SUPER_MAGIC:
		return "smb"
	}
	return fmt.Sprintf("type %#x", s.Type)
}
