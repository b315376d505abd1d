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
	// keptWarnings is the number of warnings that are shown when a copy fails.
	keptWarnings = 20
	// keptLines is the number of lines of any level that are searched for the cause of an
	// error. The library often logs the cause at a level below warning.
	keptLines = 40
	// maxLine is the number of bytes that longer lines are cut to.
	maxLine = 1000
	// levelNoise is the level of lines about the library's telemetry.
	levelNoise = slog.LevelDebug - 4
)

// logs collects the log lines of all workers of one disk and writes them to a log. Secrets
// are replaced by stars. It is safe for concurrent use.
type logs struct {
	out     *slog.Logger // nil if the lines are not logged
	disk    string       // Params.File
	secrets *worker.Redactor

	count atomic.Int64 // lines so far, except noise

	// queue holds the lines that run has yet to write. If add wrote them, a slow terminal
	// would delay the library and the answers to its requests.
	queue   chan logLine
	dropped atomic.Int64 // lines that found the queue full

	mu       sync.Mutex
	warnings []string // the last warnings
	lines    []string // the last lines of any level, except noise
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

// add adds a line of the library, which may contain any bytes.
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

// run writes lines to the log until ctx ends.
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

// drain writes the lines that are left in the queue. It is called when all workers have ended
// and run has returned.
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

// clean removes secrets and characters that do not print, and shortens the text.
func (l *logs) clean(text string) string {
	// Cutting the text before the search limits the time of the search. If that cuts a secret
	// in two, Redact hides its first part, because it knows that the text was cut.
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

// keepLast appends text to a list of at most most texts, and removes the first one if needed.
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

// mark returns the current position in the log, for since.
func (l *logs) mark() int64 { return l.count.Load() }

// since returns the lines after a position, the newest last. Older lines may be missing.
func (l *logs) since(mark int64) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(max(l.count.Load()-mark, 0), int64(len(l.lines)))
	return append([]string(nil), l.lines[int64(len(l.lines))-n:]...)
}
