package main

import (
	"context"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// errorOutput is standard error, and textOutput standard output for text and
// JSON. All that this program says goes through these two, standardOutput or a
// display: they escape whatever could steer a terminal, so that no message has
// to. A test sees that nobody else uses os.Stdout and os.Stderr.
var (
	errorOutput io.Writer = printable.NewWriter(os.Stderr)
	textOutput  io.Writer = printable.NewWriter(os.Stdout)

	// displayOutput is what a progress.Display draws on, which escapes what others
	// write through it.
	displayOutput io.Writer = os.Stderr
)

// warn writes a warning on standard error, before there is a log or where a
// command has none.
func warn(message string) {
	fmt.Fprintf(errorOutput, "vddkcp: warning: %s\n", printable.Line(message))
}

// standardOutput returns textOutput for writing so much that a reader may stop
// reading in between (a pager): where it is a pipe, a write that waits for room
// there ends with ctx, whose cause it returns.
func standardOutput(ctx context.Context) io.Writer {
	fi, err := os.Stdout.Stat()
	if err != nil || fi.Mode()&os.ModeNamedPipe == 0 {
		return textOutput
	}
	return printable.NewWriter(&pipeWriter{ctx, os.Stdout})
}

// pauseOf returns the display's Pause, where there is something to pause: on a
// terminal. A program that reads lines of progress goes on getting them.
func pauseOf(d *progress.Display) func() func() {
	if !errorTerminal() {
		return noPause
	}
	return d.Pause
}

func noPause() func() { return func() {} }

// errorTerminal reports whether standard error is a terminal.
func errorTerminal() bool { return term.IsTerminal(int(os.Stderr.Fd())) }

// terminalSize returns the size of the terminal that standard error is.
func terminalSize() (columns, rows int) {
	columns, rows, err := term.GetSize(int(os.Stderr.Fd()))
	if err != nil {
		return 80, 24
	}
	return columns, rows
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
