// Package fileid tells a file apart from every other one that has, or had, the
// same name.
package fileid

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Of returns the identity of an open file. It stays the same when the file is
// renamed or written to, and no file that is made later has it, not even one
// that gets the same inode number. Device numbers are not part of it, since
// some change when a file system is mounted again.
//
// Where the file system records no time of birth, the identity has the file's
// size and the time of its last change of content instead, and changes when
// the file is written to.
func Of(fd int) (string, error) { return identity(fd, "", unix.AT_EMPTY_PATH) }

// OfPath returns the identity of the regular file at path, following symbolic
// links, and "" where there is none.
func OfPath(path string) string {
	id, err := identity(unix.AT_FDCWD, path, 0)
	if err != nil {
		return ""
	}
	return id
}

func identity(dir int, path string, flags int) (string, error) {
	var st unix.Statx_t
	if err := unix.Statx(dir, path, flags, unix.STATX_BASIC_STATS|unix.STATX_BTIME, &st); err != nil {
		return "", err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return "", fmt.Errorf("mode %#o is not that of a regular file", st.Mode)
	}
	return format(&st), nil
}

func format(st *unix.Statx_t) string {
	if st.Mask&unix.STATX_BTIME != 0 && st.Btime != (unix.StatxTimestamp{}) {
		return fmt.Sprintf("inode %d born %d.%09d", st.Ino, st.Btime.Sec, st.Btime.Nsec)
	}
	return fmt.Sprintf("inode %d of %d bytes, changed %d.%09d", st.Ino, st.Size, st.Mtime.Sec, st.Mtime.Nsec)
}
