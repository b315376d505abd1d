// Package durable writes the small files that vddkcp keeps or reports with:
// journals, state files, reports, statistics. A replaced file is always the old
// one or the new one as a whole, also after a loss of power, and no file that
// belongs to somebody else is changed through a link.
package durable

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Replace puts text into the file at path, which it creates or replaces, with
// the permissions perm. It writes a temporary file in the same folder, makes it
// durable, renames it, and makes the folder durable. A symbolic link at path is
// replaced, not followed.
func Replace(path string, text []byte, perm fs.FileMode) error {
	base := filepath.Base(path)
	f, err := os.CreateTemp(filepath.Dir(path), "."+base[:min(len(base), 200)]+".*")
	if err != nil {
		return err
	}
	return replace(f, path, text, perm)
}

// ReplaceBy is Replace with the temporary file temp, which must be in the same
// folder as path and belong to the caller alone: what an earlier run left there
// is removed first.
func ReplaceBy(temp, path string, text []byte, perm fs.FileMode) error {
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	f, err := os.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	return replace(f, path, text, perm)
}

// replace makes f the file at path, and closes it.
func replace(f *os.File, path string, text []byte, perm fs.FileMode) error {
	_, err := f.Write(text)
	if err == nil {
		err = f.Chmod(perm)
	}
	if err == nil {
		err = f.Sync()
	}
	if closed := f.Close(); err == nil {
		err = closed
	}
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return SyncFolder(filepath.Dir(path))
}

// SyncFolder makes the names in the folder at path durable. File systems that
// cannot do that are not an error.
func SyncFolder(path string) error {
	dir, err := os.Open(path)
	if err != nil {
		return err
	}
	err = dir.Sync()
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOTSUP) {
		err = nil
	}
	return errors.Join(err, dir.Close())
}

// Write is Replace for a path that a user named as an output. A terminal, a
// FIFO, another device and an open descriptor of this process (/dev/stdout,
// /dev/fd/N) are written to in place, and so is standard output for "-". A FIFO
// that no process reads is an error; Write does not wait for a reader.
func Write(path string, text []byte, perm fs.FileMode) error {
	f, err := openInPlace(path)
	if err != nil {
		return err
	}
	if f == nil {
		return Replace(path, text, perm)
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Close())
}

// openInPlace returns nil for a path that Replace should handle.
func openInPlace(path string) (*os.File, error) {
	if fd, ok := Descriptor(path); ok {
		copied, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return nil, &fs.PathError{Op: "open", Path: path, Err: err}
		}
		return os.NewFile(uintptr(copied), path), nil
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().IsRegular() {
		return nil, nil // Replace reports what is wrong with it
	}
	if info.Mode().Type() == fs.ModeDevice {
		return nil, &fs.PathError{Op: "write", Path: path, Err: errors.New("it is a block device, which holds a disk")}
	}
	return OpenOutput(path, os.O_WRONLY)
}

// OpenOutput opens a path that a user named as an output, with the flags of
// os.OpenFile. It does not wait for a reader of a FIFO: a FIFO without one is an
// error.
func OpenOutput(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|unix.O_NONBLOCK|unix.O_NOCTTY, 0o666)
	if errors.Is(err, unix.ENXIO) {
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("no process reads this FIFO")}
	}
	return f, err
}

// Descriptor returns the number of the open descriptor of this process that
// path names: "-", /dev/stdout, /dev/stderr, /dev/fd/N or /proc/self/fd/N.
func Descriptor(path string) (fd int, ok bool) {
	if path == "-" {
		return 1, true
	}
	switch path = filepath.Clean(path); path {
	case "/dev/stdout":
		return 1, true
	case "/dev/stderr":
		return 2, true
	}
	for _, folder := range []string{"/dev/fd/", "/proc/self/fd/"} {
		if number, found := strings.CutPrefix(path, folder); found {
			fd, err := strconv.Atoi(number)
			return fd, err == nil && fd >= 0
		}
	}
	return 0, false
}

// ErrForeign is wrapped by errors of files that exist and cannot be vddkcp's own.
var ErrForeign = errors.New("this is not a file of vddkcp")

// Open opens or creates a file that is vddkcp's own, with the flags and
// permissions of os.OpenFile. Nobody else writes or links such a file, so a
// symbolic link, a FIFO, a folder, a device, or a file with a second name (a hard
// link) is an error that wraps ErrForeign, and nothing was changed or waited for.
func Open(path string, flags int, perm fs.FileMode) (*os.File, error) {
	foreign := func(what string) error {
		return &fs.PathError{Op: "open", Path: path, Err: fmt.Errorf("it is %s, and %w; remove it", what, ErrForeign)}
	}
	f, err := os.OpenFile(path, flags&^os.O_TRUNC|unix.O_NOFOLLOW|unix.O_NONBLOCK, perm)
	switch {
	case errors.Is(err, unix.ELOOP):
		return nil, foreign("a symbolic link")
	case errors.Is(err, unix.EISDIR):
		return nil, foreign("a folder")
	case errors.Is(err, unix.ENXIO):
		return nil, foreign("a FIFO, a socket or a device")
	case err != nil:
		return nil, err
	}
	info, err := f.Stat()
	if err == nil {
		if what := notOwn(info); what != "" {
			err = foreign(what)
		}
	}
	if err == nil && flags&os.O_TRUNC != 0 {
		err = f.Truncate(0)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// notOwn says what Open refuses a file for, "" for nothing.
func notOwn(info fs.FileInfo) string {
	switch info.Mode().Type() {
	case 0:
		if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Nlink > 1 {
			return fmt.Sprintf("a file with %d names (hard links)", st.Nlink)
		}
		return ""
	case fs.ModeDir:
		return "a folder"
	case fs.ModeNamedPipe:
		return "a FIFO"
	case fs.ModeSocket:
		return "a socket"
	}
	return "a device"
}

// ReadFile is os.ReadFile for a regular file, which path may lead to through
// symbolic links. Anything else (a FIFO, a folder, a device) is an error and is
// neither waited for nor read.
func ReadFile(path string) ([]byte, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("it is %s: want a regular file", notOwn(info))}
	}
	return io.ReadAll(f)
}
