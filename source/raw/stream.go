package raw

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Stream returns a reader of f, a pipe, a terminal or a file, whose blocked
// reads end within a second of ctx, with its cause: a plain read of standard
// input can't be interrupted. It is for one goroutine.
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
		// An error or a hang-up also ends the wait: the read below tells which.
		if n > 0 {
			return s.f.Read(p)
		}
	}
}
