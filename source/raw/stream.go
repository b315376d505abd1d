package raw

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Stream returns a reader of f, which may be a pipe, a terminal or a file. When ctx
// ends, a blocked Read returns the error context.Cause(ctx) within a second. By
// contrast, os.Stdin itself is a reader whose blocked Read cannot be interrupted. Only
// one goroutine may use the reader that Stream returns.
func Stream(ctx context.Context, f *os.File) io.Reader { return &stream{ctx, f} }

type stream struct {
	ctx context.Context
	f   *os.File
}

func (s *stream) Read(p []byte) (int, error) {
	for {
		if err := context.Cause(s.ctx); err != nil {
			return 0, err
		}
		fds := []unix.PollFd{{Fd: int32(s.f.Fd()), Events: unix.POLLIN}}
		n, err := unix.Poll(fds, int((250 * time.Millisecond).Milliseconds()))
		if err != nil && err != unix.EINTR {
			return 0, fmt.Errorf("poll %s: %w", s.f.Name(), err)
		}
		// Poll also returns when the file has an error, or when the program that writes
		// to the pipe has ended. In both cases the following Read returns the error or
		// the end of the file.
		if n > 0 {
			return s.f.Read(p)
		}
	}
}
