// Package fileid identifies files, so that a program notices when a file was replaced by another
// file of the same name.
package fileid

import (
	"fmt"

	"golang.org/x/sys/unix"

	_ "github.com/vddkcp/vddkcp/internal/linuxonly"
)

// Of returns the identity of an open file. The identity does not change when the file is renamed
// or written. If the file system records birth times, no later file gets the same identity, even
// if it gets the same inode number. The identity does not include the device number, which may
// change when a file system is mounted again.
func Of(fd int) (string, error) {
	st, err := stat(fd, "", unix.AT_EMPTY_PATH)
	if err != nil {
		return "", err
	}
	return identity(&st), nil
}

// MarkOf returns the identity of the regular file at the given path. It follows symbolic links. The
// result is "" if there is no such file. If the file system records no birth times, the identity
// includes the size and the time of the last change. MarkOf is therefore only for files that are no
// longer written.
func MarkOf(path string) string {
	st, err := stat(unix.AT_FDCWD, path, 0)
	if err != nil {
		return ""
	}
	return mark(&st)
}

// MarkAt returns the same identity as MarkOf. The file is the one with the given name in the folder
// that is open as the file descriptor dir. MarkAt does not follow symbolic links.
func MarkAt(dir int, name string) string {
	st, err := stat(dir, name, unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return ""
	}
	return mark(&st)
}

func stat(dir int, path string, flags int) (st unix.Statx_t, err error) {
	if err := unix.Statx(dir, path, flags, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return st, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return st, fmt.Errorf("not a regular file: the mode is %#o", st.Mode)
	}
	return st, nil
}

func hasBirth(st *unix.Statx_t) bool {
	return st.Mask&unix.STATX_BTIME != 0 && st.Btime != (unix.StatxTimestamp{})
}

func identity(st *unix.Statx_t) string {
	if hasBirth(st) {
		return fmt.Sprintf("inode %d born %d.%09d", st.Ino, st.Btime.Sec, st.Btime.Nsec)
	}
	return fmt.Sprintf("inode %d", st.Ino)
}

func mark(st *unix.Statx_t) string {
	if hasBirth(st) {
		return identity(st)
	}
	return fmt.Sprintf("%s, %d bytes, changed %d.%09d", identity(st), st.Size, st.Mtime.Sec, st.Mtime.Nsec)
}
