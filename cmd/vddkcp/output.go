package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// errorOutput is standard error, and textOutput is standard output for text and JSON. All
// text of this program is written through errorOutput, through textOutput, through the
// function standardOutput or through a progress.Display. Each of these four ways escapes
// characters that control a terminal. A test checks that no other code uses os.Stdout and
// os.Stderr.
var (
	errorOutput io.Writer = printable.NewWriter(os.Stderr)
	textOutput  io.Writer = printable.NewWriter(os.Stdout)

	// displayOutput is the file that a progress.Display draws on. The display escapes
	// text that other code writes through the display.
	displayOutput io.Writer = os.Stderr
)

// displayTo returns the Output of a display on standard error.
func displayTo(style progress.Style) progress.Output {
	return progress.Output{Style: style, To: displayOutput, Size: terminalSize, Stamp: stamp}
}

// standardOutput returns a writer to standard output, for large outputs. If standard
// output is a pipe, the process at its other end, such as a pager, may stop reading,
// and a write would then wait. Such a wait ends when ctx ends, and the write returns
// the cause of ctx.
func standardOutput(ctx context.Context) io.Writer {
	fi, err := os.Stdout.Stat()
	if err != nil || fi.Mode()&os.ModeNamedPipe == 0 {
		return textOutput
	}
	return printable.NewWriter(&pipeWriter{ctx, os.Stdout})
}

// printJSON prints a value as indented JSON.
func printJSON(w io.Writer, value any) error {
	e := json.NewEncoder(w)
	e.SetEscapeHTML(false)
	e.SetIndent("", "    ")
	return e.Encode(value)
}

// pauseOf returns the method Pause of the display if standard error is a terminal. If it is
// not a terminal, pauseOf returns a function without effect, because a program that reads
// the progress lines must continue to get them.
func pauseOf(d *progress.Display) func() func() {
	if !errorTerminal() {
		return noPause
	}
	return d.Pause
}

func noPause() func() { return func() {} }

// errorTerminal reports whether standard error is a terminal.
func errorTerminal() bool { return term.IsTerminal(int(os.Stderr.Fd())) }

// terminalSize returns the size of the terminal on standard error, 80 columns and
// 24 rows if there is none.
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
		// A pipe that poll reports as writable accepts at least one page of memory
		// without blocking.
		k, err := w.pipe.Write(p[n:min(len(p), n+os.Getpagesize())])
		n += k
		if err != nil {
			return n, err
		}
	}
	return n, nil
}

// The method wait waits until the next write to the pipe will not block.
func (w *pipeWriter) wait() error {
	const milliseconds = 100 // time between two checks of ctx
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

// errorJournal reports whether standard error is a connection to the journal of systemd.
func errorJournal() bool {
	var stat unix.Stat_t
	if err := unix.Fstat(int(os.Stderr.Fd()), &stat); err != nil {
		return false
	}
	return os.Getenv("JOURNAL_STREAM") == fmt.Sprintf("%d:%d", stat.Dev, stat.Ino)
}

// textColumns returns the number of columns of the terminal that is standard output. The result ok
// is false if standard output is no terminal.
func textColumns() (columns int, ok bool) {
	columns, _, err := term.GetSize(int(os.Stdout.Fd()))
	return columns, err == nil && columns > 0
}
