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

// keptLines is the largest number of lines in GoneError.Last, the last output of the worker
// process.
const keptLines = 5

// logger removes secrets from log lines and passes the lines to Config.Log, one at a time.
type logger struct {
	write func(Level, string) // Config.Log; may be nil

	mu      sync.Mutex
	secrets *Redactor
	kept    []string // the last lines of the worker's output
}

// The method hide makes sure that the password and the cookie in the request r do not appear in
// later lines.
func (l *logger) hide(r *OpenRequest) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.secrets = NewRedactor(r.User, r.Password, r.Cookie)
}

// The method redact returns s with stars in place of secrets.
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

// The method line passes a log line of the worker process to Config.Log. The parameter dropped is
// the number of earlier lines that the worker could not send.
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

// The method last returns the last lines that the worker process wrote to standard output and
// standard error.
func (l *logger) last() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.kept
}

// readOutput reads the output of the worker process until the output ends. It passes each line to
// the method line, which passes it to Config.Log.
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
		// A line that is longer than the buffer is passed on in parts.
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

// outputReader reads the pipe to which a worker process writes its standard output and standard
// error. It makes sure that the last lines of the worker are not lost. It also makes sure that the
// reading ends soon after the worker process has ended, even if a child of the worker keeps the
// pipe open and writes to it.
//
// When the process has ended, the read deadline of the pipe is set. When the deadline has passed,
// outputReader returns only the bytes that are in the pipe at that moment, and then io.EOF.
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
