package worker

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	_ "github.com/vddkcp/vddkcp/internal/linuxonly"
)

// keptLines is the number of lines of the worker's output that GoneError.Last has at most.
const keptLines = 5

// logger passes log lines to Config.Log, one at a time, without secrets.
type logger struct {
	write func(Level, string) // Config.Log; may be nil

	mu      sync.Mutex
	secrets *Redactor
	kept    []string // the last lines of the worker's output
}

// hide removes the secrets of a login from all later lines.
func (l *logger) hide(r *OpenRequest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.secrets = NewRedactor(r.User, r.Password, r.Cookie)
}

// redact returns s without secrets.
func (l *logger) redact(s string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.redactLocked(s)
}

func (l *logger) redactLocked(s string) string {
	const more = "..." // the end of a line that the program has cut
	if len(s) < MaxLine-len(more) {
		return l.secrets.Redact(s, false)
	}
	body, cut := strings.CutSuffix(s, more)
	s = l.secrets.Redact(body, true)
	if cut {
		s += more
	}
	return s
}

// line passes on a line of the worker. dropped is the number of lines before it that were lost.
func (l *logger) line(level Level, text []byte, dropped uint64) {
	if l.write == nil && level != Output {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if dropped > 0 {
		l.write(Warning, fmt.Sprintf("%d log lines of the library came too fast and were dropped", dropped))
	}
	s := clean(l.redactLocked(string(text)))
	if s == "" {
		return
	}
	if level == Output {
		if len(l.kept) == keptLines {
			l.kept = append(l.kept[:0], l.kept[1:]...)
		}
		l.kept = append(l.kept, s)
	}
	if l.write != nil {
		l.write(level, s)
	}
}

// last returns the last lines of the worker's output.
func (l *logger) last() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.kept
}

// readOutput reads the output of the worker until its end and passes on its lines.
func (l *logger) readOutput(r io.Reader) {
	buffer := make([]byte, MaxLine)
	n := 0
	for {
		m, err := r.Read(buffer[n:])
		n += m
		rest := buffer[:n]
		for {
			line, more, found := bytes.Cut(rest, []byte("\n"))
			if !found {
				break
			}
			l.line(Output, line, 0)
			rest = more
		}
		// A line that fills the buffer is passed on in parts.
		if len(rest) == len(buffer) || err != nil && len(rest) > 0 {
			l.line(Output, rest, 0)
			rest = nil
		}
		n = copy(buffer, rest)
		if err != nil {
			return
		}
	}
}

// outputReader reads the pipe that a worker writes its output to. When the read
// deadline of the pipe has passed, outputReader returns the bytes that the pipe holds
// then, followed by io.EOF. So the last lines of a worker that has ended are not lost,
// and a process that keeps writing to the pipe cannot delay the end.
type outputReader struct {
	pipe  *os.File
	ended bool // the deadline has passed
	left  int  // bytes to read after it
}

func (o *outputReader) Read(b []byte) (n int, err error) {
	if !o.ended {
		if n, err = o.pipe.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
			return n, err
		}
	}
	raw, err := o.pipe.SyscallConn()
	if err != nil {
		return 0, err
	}
	control := raw.Control(func(fd uintptr) {
		if !o.ended {
			o.ended = true
			o.left, err = unix.IoctlGetInt(int(fd), unix.TIOCINQ) // FIONREAD
		}
		if err == nil && o.left > 0 {
			n, err = unix.Read(int(fd), b[:min(len(b), o.left)])
		}
	})
	if n <= 0 {
		return 0, errors.Join(io.EOF, control, err)
	}
	o.left -= n
	return n, nil
}
