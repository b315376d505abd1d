package worker

import (
	"bytes"
	"fmt"
	"io"
	"strings"
	"sync"
)

// keptLines is how many of the worker's last words are remembered.
const keptLines = 5

// logger hands lines on, one at a time.
type logger struct {
	write func(Level, string)

	mu      sync.Mutex
	secrets *strings.Replacer
	kept    []string // last lines of the worker's output
}

// hide keeps secrets out of every later line. Short ones stay: hiding them
// would tell more than it hides.
func (l *logger) hide(secrets ...string) {
	var pairs []string
	for _, s := range secrets {
		if len(s) >= 4 {
			pairs = append(pairs, s, "***")
		}
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.secrets = strings.NewReplacer(pairs...)
}

func (l *logger) redact(s string) string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.redactLocked(s)
}

func (l *logger) redactLocked(s string) string {
	if l.secrets == nil {
		return s
	}
	return l.secrets.Replace(s)
}

// line takes a line of the worker's, and the number of those lost before it.
func (l *logger) line(level Level, text []byte, dropped uint64) {
	if l.write == nil && level != Output {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if dropped > 0 {
		l.write(Warning, fmt.Sprintf("%d lines of the library came too fast and are lost", dropped))
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

func (l *logger) last() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.kept
}

// readOutput splits what r gives into lines until it ends.
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
		// A line that fills the buffer goes on in the next.
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
