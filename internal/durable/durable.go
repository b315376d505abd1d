// Package durable writes the small files in which vddkcp keeps its state or reports: journals,
// state files, reports and statistics. [Replace] replaces a whole file. [Write] writes to an
// output file that a user named. [Open] opens a file that only vddkcp uses. A [Record] is a
// small record that is kept twice in one file.
//
// If the power fails while a file is replaced, the file has either the old or the new content
// afterwards. Replace, Write and Open do not change a file of another program through a link to
// it.
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

	_ "github.com/vddkcp/vddkcp/internal/linuxonly"
)

// Private is the file mode of journals, state files and reports. Only the user may read them,
// because they can contain anything that a server or a command prints.
const Private fs.FileMode = 0o600

// Replace creates or replaces the file at the given path. The parameter text is the new content,
// and the parameter perm has the new permissions. Replace writes a temporary file in the same
// folder, makes it durable, renames it to the given path, and makes the folder durable. If there is
// a symbolic link at the path, the link itself is replaced.
func Replace(path string, text []byte, perm fs.FileMode) error {
	base := filepath.Base(path)
	f, err := os.CreateTemp(filepath.Dir(path), "."+base[:min(len(base), 200)]+".*")
	if err != nil {
		return err
	}
	return replace(f, path, text, perm)
}

// ReplaceBy is like Replace, but the caller chooses the path of the temporary file, temp. The
// temporary file must be in the same folder as the file that is replaced. No other program may
// use the temporary file, because ReplaceBy removes one that an earlier run has left.
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

// The function replace writes a text to the temporary file f, makes f durable, closes it, and
// renames it to the given path.
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

// SyncFolder makes the names of the files in the given folder durable. It does nothing if the file
// system does not support that.
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

// Write writes text to an output that a user named. It replaces a regular file in the same way as
// Replace. A terminal, a FIFO, a character device and an open descriptor of this process
// (/dev/stdout, /dev/fd/N) are not replaced but written to. "-" is standard output. If no process
// reads from a FIFO, Write returns an error and does not wait.
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

// Replaces reports whether Write would replace the file at the given path, or create it, and not
// write to what is there already.
func Replaces(path string) bool {
	if _, ok := Descriptor(path); ok {
		return false
	}
	info, err := os.Stat(path)
	return err != nil || info.Mode().IsRegular()
}

// openInPlace opens an output that cannot be replaced, such as a FIFO. It returns nil if Replace
// should write to the path instead.
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
		return nil, nil // Replace returns the error
	}
	if info.Mode().Type() == fs.ModeDevice {
		return nil, &fs.PathError{Op: "write", Path: path, Err: errors.New("this output cannot be written to a block device: name a file")}
	}
	return OpenOutput(path, os.O_WRONLY)
}

// OpenOutput opens an output that a user named. flags are those of os.OpenFile. If the output is a
// FIFO and no process reads from it, OpenOutput returns an error and does not wait.
func OpenOutput(path string, flags int) (*os.File, error) {
	f, err := os.OpenFile(path, flags|unix.O_NONBLOCK|unix.O_NOCTTY, 0o666)
	if errors.Is(err, unix.ENXIO) {
		return nil, &fs.PathError{Op: "open", Path: path, Err: errors.New("no process reads from the FIFO")}
	}
	return f, err
}

// Descriptor returns the number of the file descriptor of this process that the given path stands
// for. Such paths are "-", /dev/stdout, /dev/stderr, /dev/fd/N and /proc/self/fd/N. ok is false for
// other paths.
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

// ErrForeign says that a file exists at a path and that vddkcp cannot have written it. It is never
// returned alone, but wrapped in an error that names the file.
var ErrForeign = errors.New("not a file that vddkcp has written")

// Open opens or creates a file that only vddkcp uses. flags and perm are those of os.OpenFile. Such
// a file is always a regular file with one name. If there is a symbolic link, a FIFO, a folder, a
// device or a file with several hard links at the path, Open returns an error that wraps
// ErrForeign. In that case Open has changed nothing, and it has not waited.
func Open(path string, flags int, perm fs.FileMode) (*os.File, error) {
	foreign := func(what string) error {
		return &fs.PathError{Op: "open", Path: path, Err: fmt.Errorf("%w: expected a regular file with a single name, found %s: remove what is at this path, or name another file", ErrForeign, what)}
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

// notOwn describes a file that Open refuses, such as "a folder". It returns "" for a file that
// Open accepts.
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

// ReadFile reads a regular file as os.ReadFile does, and follows symbolic links. If there is
// anything else at the path, such as a FIFO, a folder or a device, ReadFile returns an error
// without reading or waiting.
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
		return nil, &fs.PathError{Op: "read", Path: path, Err: fmt.Errorf("the file is %s, want a regular file", notOwn(info))}
	}
	return io.ReadAll(f)
}
