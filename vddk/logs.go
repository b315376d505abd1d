package vddk

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"
	"unicode"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

const (
	// keptWarnings are shown when a copy fails.
	keptWarnings = 20
	// keptLines of any level serve the hints: the library often says why on a
	// level below warning.
	keptLines = 40
	// maxLine is the length in bytes that a line is cut to.
	maxLine = 1000
	// levelNoise is for what the library says of its telemetry.
	levelNoise = slog.LevelDebug - 4
)

// logs takes what the library says in the workers of one disk. It is safe for
// concurrent use.
type logs struct {
	out     *slog.Logger // nil: nowhere
	disk    string
	secrets *worker.Redactor

	count atomic.Int64 // of lines, noise left out

	// The library waits for whoever takes its lines, and so do its
	// completions: a slow terminal must not.
	queue   chan logLine
	dropped atomic.Int64

	mu       sync.Mutex
	warnings []string // the last ones
	lines    []string // the last ones of any level, noise left out
}

type logLine struct {
	level   slog.Level
	text    string
	warning bool
}

func newLogs(p *Params, out *slog.Logger) *logs {
	return &logs{
		out: out, disk: p.File, queue: make(chan logLine, 1024),
		secrets: worker.NewRedactor(p.User, p.Password.Reveal(), p.Cookie.Reveal()),
	}
}

// add takes a line. It may hold anything.
func (l *logs) add(warning bool, text string) {
	text = l.clean(text)
	if text == "" {
		return
	}
	level := slog.LevelDebug
	if strings.Contains(text, "PhoneHome") || strings.Contains(text, "CEIP") {
		level, warning = levelNoise, false
	} else {
		l.mu.Lock()
		l.count.Add(1)
		l.lines = keepLast(l.lines, text, keptLines)
		if warning {
			l.warnings = keepLast(l.warnings, text, keptWarnings)
		}
		l.mu.Unlock()
	}
	if l.out == nil || !l.out.Enabled(context.Background(), level) {
		return
	}
	select {
	case l.queue <- logLine{level, text, warning}:
	default:
		l.dropped.Add(1)
	}
}

// run writes the lines to the log until ctx ends.
func (l *logs) run(ctx context.Context) {
	for {
		select {
		case line := <-l.queue:
			l.write(line)
		case <-ctx.Done():
			return
		}
	}
}

// drain writes what is left, when nothing is added any more.
func (l *logs) drain() {
	for {
		select {
		case line := <-l.queue:
			l.write(line)
		default:
			return
		}
	}
}

func (l *logs) write(line logLine) {
	args := []any{"disk", l.disk}
	if line.warning {
		args = append(args, "warning", true)
	}
	if n := l.dropped.Swap(0); n > 0 {
		args = append(args, "lines_left_out", n)
	}
	l.out.Log(context.Background(), line.level, "vddk: "+line.text, args...)
}

// clean makes text fit for a terminal and one line of a log.
func (l *logs) clean(text string) string {
	// It is cut twice: whatever comes, little is looked at. A secret that the
	// first cut tears apart is behind the second.
	text = l.secrets.Redact(text[:min(len(text), 4*maxLine)], len(text) > 4*maxLine)
	text = strings.TrimSpace(strings.Map(func(r rune) rune {
		switch {
		case r == '\t' || r == '\n' || r == '\r':
			return ' '
		case r == utf8.RuneError, unicode.IsPrint(r):
			return r
		}
		return -1
	}, text))
	if len(text) > maxLine {
		cut := maxLine
		for !utf8.RuneStart(text[cut]) {
			cut--
		}
		text = text[:cut] + "..."
	}
	return text
}

func keepLast(list []string, text string, most int) []string {
	if len(list) == most {
		copy(list, list[1:])
		list[most-1] = text
		return list
	}
	return append(list, text)
}

// lastWarnings returns the last warnings, the newest last.
func (l *logs) lastWarnings() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.warnings...)
}

// mark returns a point in the lines for since.
func (l *logs) mark() int64 { return l.count.Load() }

// since returns the lines after the mark, the newest last, as far as they are
// kept.
func (l *logs) since(mark int64) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(max(l.count.Load()-mark, 0), int64(len(l.lines)))
	return append([]string(nil), l.lines[int64(len(l.lines))-n:]...)
}
