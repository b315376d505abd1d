package main

import (
	"context"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// standardOutput returns standard output for writing so much that a reader may
// stop reading in between (a pager): where it is a pipe, a write that waits for
// room there ends with ctx, whose cause it returns.
func standardOutput(ctx context.Context) io.Writer {
	fi, err := os.Stdout.Stat()
	if err != nil || fi.Mode()&os.ModeNamedPipe == 0 {
		return os.Stdout
	}
	return &pipeWriter{ctx, os.Stdout}
}

type pipeWriter struct {
	ctx  context.Context
	pipe *os.File
}

func (w *pipeWriter) Write(p []byte) (n int, err error) {
	for n < len(p) {
		if err := w.wait(); err != nil {
			return n, err
		}
		// A pipe that has room has it for a page, which is written at once.
		k, err := w.pipe.Write(p[n:min(len(p), n+os.Getpagesize())])
		n += k
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// wait waits until the pipe has room, or an error for the next write.
func (w *pipeWriter) wait() error {
	const milliseconds = 100 // between two looks at ctx
	for {
		if err := context.Cause(w.ctx); err != nil {
			return err
		}
		ready, err := unix.Poll([]unix.PollFd{{Fd: int32(w.pipe.Fd()), Events: unix.POLLOUT}}, milliseconds)
		if ready > 0 {
			return nil
		}
		if err != nil && err != unix.EINTR {
			return os.NewSyscallError("poll", err)
		}
	}
}
