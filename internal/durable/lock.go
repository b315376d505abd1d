package durable

import (
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// LockedError says that another process has locked a file.
type LockedError struct {
	Path string
	By   string // describes the process, such as "process 17 on host1, since 2026-12-01T02:00:00Z"
}

func (e *LockedError) Error() string { return fmt.Sprintf("%s is locked by %s", e.Path, e.By) }

// Lock creates the file at path and locks it against other processes. The lock ends when the file is
// closed, or when the process ends. The caller removes the file before it closes it. If another
// process has locked the file, the error is a *LockedError.
//
// A file that is replaced whenever it is written cannot be locked. Its writer locks another file
// next to it.
func Lock(path string) (*os.File, error) {
	for {
		f, err := Open(path, os.O_RDWR|os.O_CREATE, Private)
		if err != nil {
			return nil, err
		}
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
			defer f.Close()
			if !errors.Is(err, unix.EWOULDBLOCK) {
				return nil, fmt.Errorf("lock %s: %w", path, err)
			}
			owner, _ := io.ReadAll(io.LimitReader(f, 200)) // empty if the other process is just writing it
			by := strings.TrimSpace(string(owner))
			if by == "" {
				by = "another run"
			}
			return nil, &LockedError{path, by}
		}
		// The process that held the lock may have removed the file before this process got the
		// lock. Then this process has locked a removed file, and must try again.
		ours, err := f.Stat()
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		if there, err := os.Stat(path); err != nil || !os.SameFile(ours, there) {
			f.Close()
			continue
		}
		if err := BeginsWith(f, "process "); err != nil {
			return nil, errors.Join(fmt.Errorf("lock: %w", err), f.Close())
		}
		host, _ := os.Hostname() // only shown to people
		owner := fmt.Sprintf("process %d on %s, since %s\n", os.Getpid(), host, time.Now().Format(time.RFC3339))
		err = f.Truncate(0)
		if err == nil {
			_, err = f.WriteAt([]byte(owner), 0)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
		}
		return f, nil
	}
}

// CloseLocked closes a file that may be locked with flock. Closing it alone may not be enough to
// release the lock: a child process that is just being started has all open files until it executes
// its program. Another opening of the file would then fail, as if another process used it.
func CloseLocked(f *os.File) error {
	_ = unix.Flock(int(f.Fd()), unix.LOCK_UN) // fails on file systems without locks
	return f.Close()
}

// BeginsWith returns an error if a file is not empty and does not begin with prefix. Such a
// file belongs to another program and must not be overwritten.
func BeginsWith(f *os.File, prefix string) error {
	head := make([]byte, len(prefix))
	n, err := f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if n > 0 && !strings.HasPrefix(prefix, string(head[:n])) {
		return fmt.Errorf("%s begins with %q, expected %q: %w; move this file away, or remove it if you do not need it", f.Name(), head[:n], prefix, ErrForeign)
	}
	return nil
}
