package open

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
)

func (p Place) planStdout(size int64, o Options) (*Target, error) {
	const name = "standard output"
	stdout := o.Stdout
	if stdout == nil {
		stdout = os.Stdout
	}
	info, err := stdout.Stat()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if err := checkStream(name, info, o); err != nil {
		return nil, err
	}
	if wasClosed(stdout, info) {
		return nil, errClosedStdout
	}
	return &Target{Place: p, Format: "raw", options: &o, create: func(ctx context.Context) (sink.Disk, error) {
		// The disk gets a duplicate of the file descriptor of standard output.
		// Closing the disk then leaves standard output itself open.
		fd, err := dup(stdout)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		return stream(ctx, os.NewFile(uintptr(fd), name), name, size)
	}}, nil
}

// errClosedStdout is the error for the target "-", which is standard output, if
// the process was started with standard output closed. Without this error,
// everything that is written to the target would be lost.
var errClosedStdout = &closedError{}

type closedError struct{}

func (*closedError) Error() string {
	return "standard output is closed, or is /dev/null opened for reading and writing: the disk would be lost"
}

func (*closedError) Hint() string {
	return `to read the source without writing a target, use "null:" as DST`
}

// wasClosed reports whether standard output was closed when the process was
// started. The parameter f is the file of standard output. If it was closed, the Go
// runtime has opened /dev/null in its place, for reading and writing. If a shell
// has redirected standard output to /dev/null, f is open for writing only, and
// wasClosed returns false.
func wasClosed(f *os.File, info os.FileInfo) bool {
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Mode&unix.S_IFMT != unix.S_IFCHR || unix.Major(uint64(st.Rdev)) != 1 || unix.Minor(uint64(st.Rdev)) != 3 {
		return false
	}
	flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
	return err == nil && flags&unix.O_ACCMODE == unix.O_RDWR
}

func dup(f *os.File) (fd int, err error) {
	c, err := f.SyscallConn()
	if err != nil {
		return 0, err
	}
	if controlErr := c.Control(func(old uintptr) { fd, err = unix.FcntlInt(old, unix.F_DUPFD_CLOEXEC, 3) }); controlErr != nil {
		return 0, controlErr
	}
	return fd, err
}

func (p Place) planStream(path string, size int64, o Options) (*Target, error) {
	if err := checkStream(path, p.info, o); err != nil {
		return nil, err
	}
	if err := unix.Faccessat(unix.AT_FDCWD, path, unix.W_OK, unix.AT_EACCESS); err != nil {
		return nil, fmt.Errorf("cannot write to %s: %w", path, err)
	}
	return &Target{Place: p, Format: "raw", options: &o, create: func(ctx context.Context) (sink.Disk, error) {
		w, err := openStream(ctx, path)
		if err != nil {
			return nil, err
		}
		return stream(ctx, w, path, size)
	}}, nil
}

func checkStream(name string, info os.FileInfo, o Options) error {
	if o.State != nil {
		return usage.Errorf("%s is a stream and cannot be resumed", name)
	}
	if o.Source != nil {
		if path, ok := o.Source(info); ok {
			return fmt.Errorf("%s is a file of the source (the same as %s) and must not be overwritten: choose another target", name, path)
		}
	}
	return nil
}

// openStream opens a FIFO or character device. If a FIFO has no reader,
// openStream waits for one until ctx ends.
func openStream(ctx context.Context, path string) (*os.File, error) {
	retry := time.NewTicker(20 * time.Millisecond)
	defer retry.Stop()
	for {
		w, err := os.OpenFile(path, os.O_WRONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
		if err == nil || !errors.Is(err, unix.ENXIO) {
			return w, err
		}
		if info, statErr := os.Stat(path); statErr != nil || info.Mode().Type() != fs.ModeNamedPipe {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-retry.C:
		}
	}
}

// The function stream returns a disk that writes to w. If stream returns an error, it
// has closed w.
func stream(ctx context.Context, w *os.File, name string, size int64) (sink.Disk, error) {
	d, err := raw.Stream(ctx, w, name, size)
	if err != nil {
		return nil, errors.Join(err, w.Close())
	}
	return d, nil
}
