package raw

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/lifecycle"
	"github.com/vddkcp/vddkcp/sink"
)

// Stream returns a disk that is written to w, in order and from the current
// position of w on. w is a pipe, a socket, a character device, or any other open
// file. Zeros are written as data. The parameter name is used in messages. The
// methods Publish, Suspend and Abort of the disk close w.
//
// The returned disk is sequential, and has the ability sink.Sizer. It cannot be
// checkpointed.
func Stream(ctx context.Context, w *os.File, name string, size int64) (sink.Disk, error) {
	s := &stream{life: newLife(ctx, name, size), w: w}
	info, err := w.Stat()
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	s.regular = info.Mode().IsRegular()
	if s.regular {
		return s, nil
	}
	// When the context ends, a blocked write must end as well. If the Go
	// runtime can poll w, a write deadline makes such a write return.
	//
	// A pipe that another process opened is usually in blocking mode, so that
	// the runtime cannot poll it. Making w itself non-blocking would change
	// it for all processes that share it. Therefore the pipe is opened once
	// more. If that is not possible, writePolling waits for room before each
	// write.
	if w.SetWriteDeadline(time.Time{}) == nil {
		s.deadline = w
	} else if info.Mode().Type() == fs.ModeNamedPipe {
		same, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", w.Fd()), os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			s.deadline = same
		}
	}
	return s, nil
}

type stream struct {
	life
	w        *os.File
	deadline *os.File // w or the same pipe opened again, if write deadlines work; else nil
	regular  bool
	next     int64
}

func (d *stream) WriteAt(p []byte, off int64) (int, error) {
	return d.writeAt(p, off, func(p []byte, off int64) error { return d.write(d.Context, p, off) })
}

func (d *stream) ZeroAt(ctx context.Context, off, n int64) error {
	if err := d.Begin(ctx, off, n); err != nil {
		return err
	}
	defer d.Done()
	for n > 0 {
		p := zeros[:min(n, int64(len(zeros)))]
		if err := d.write(ctx, p, off); err != nil {
			return d.Fail(err)
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	return nil
}

func (d *stream) write(ctx context.Context, p []byte, off int64) error {
	if off != d.next {
		return fmt.Errorf("%s is a stream: the next write must be at offset %d, not at %d", d.Name, d.next, off)
	}
	if err := d.Stopped(ctx); err != nil {
		return err
	}
	var n int
	var err error
	switch {
	case d.regular:
		n, err = d.w.Write(p)
	case d.deadline != nil:
		n, err = d.writeUntil(ctx, p)
	default:
		n, err = d.writePolling(ctx, p)
	}
	d.next += int64(n)
	if err != nil {
		if stopped := d.Stopped(ctx); stopped != nil {
			return stopped
		}
		// The error of os.File contains a path that the user may not know. The
		// error below contains the name of the stream instead.
		if path, ok := errors.AsType[*fs.PathError](err); ok {
			err = path.Err
		}
		return fmt.Errorf("cannot write to %s at offset %d: %w", d.Name, d.next, explain(int(d.w.Fd()), err))
	}
	return nil
}

// writeUntil writes the bytes p. It returns early when its parameter ctx or the
// context of the disk ends.
func (d *stream) writeUntil(ctx context.Context, p []byte) (int, error) {
	past := func() { d.deadline.SetWriteDeadline(time.Unix(1, 0)) }
	defer context.AfterFunc(ctx, past)()
	defer context.AfterFunc(d.Context, past)()
	return d.deadline.Write(p)
}

// writePolling writes p in pieces of at most 4096 bytes (PIPE_BUF). Before each
// piece it waits until poll reports room in the pipe. The write of the piece then
// does not block.
func (d *stream) writePolling(ctx context.Context, p []byte) (int, error) {
	const room = 4096
	fd, done := int(d.w.Fd()), 0
	for done < len(p) {
		if err := d.Stopped(ctx); err != nil {
			return done, err
		}
		ready := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLOUT}}
		if n, err := unix.Poll(ready, 200); n == 0 || err == unix.EINTR {
			continue
		} else if err != nil {
			return done, err
		}
		n, err := unix.Write(fd, p[done:min(done+room, len(p))])
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		}
		if err == nil && n <= 0 {
			err = io.ErrShortWrite
		}
		if err != nil {
			return done, err
		}
		done += n
	}
	return done, nil
}

func (d *stream) Checkpoint(off int64) ([]byte, func(context.Context) error, error) {
	if err := d.Begin(d.Context, off, 0); err != nil {
		return nil, nil, err
	}
	defer d.Done()
	return nil, nil, d.Fail(fmt.Errorf("%s is a stream and cannot be resumed: %w", d.Name, errors.ErrUnsupported))
}

func (d *stream) SetSize(n int64) error { return d.life.SetSize(n, nothing) }

func (d *stream) Finish(ctx context.Context) error {
	return d.Advance(ctx, lifecycle.Writing, func() error {
		if d.next != d.Size {
			return fmt.Errorf("%s: only %d of %d bytes were written", d.Name, d.next, d.Size)
		}
		// Pipes, sockets and most character devices have no data to sync.
		err := d.w.Sync()
		if err != nil && !lacking(err) && !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("fsync %s: %w", d.Name, err)
		}
		return nil
	})
}

func (d *stream) Publish(ctx context.Context) error {
	return d.Advance(ctx, lifecycle.Finished, d.close)
}

func (d *stream) Suspend() error { return d.End(d.close) }
func (d *stream) Abort() error   { return d.life.Abort(d.close) }

func (d *stream) close() error {
	var err error
	if d.deadline != nil && d.deadline != d.w {
		err = d.deadline.Close()
	}
	return errors.Join(err, d.w.Close())
}
