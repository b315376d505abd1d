package vddk

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"unicode"
	"unicode/utf8"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

const (
	// keptWarnings is the number of warnings of the library that are kept to be shown when a
	// copy fails.
	keptWarnings = 20
	// keptLines is the number of log lines that are kept to be searched for the cause of an
	// error. Lines of all levels are kept, because the library often logs the cause at a level
	// below warning.
	keptLines = 40
	// maxLine is the largest number of bytes of a line; longer lines are cut.
	maxLine = 1000
	// levelNoise is the log level for the library's lines about its telemetry, which explain no
	// errors.
	levelNoise = slog.LevelDebug - 4
)

// logs collects the log lines of all worker processes of one disk and writes them to a log.
// Secrets are replaced by stars. It is safe for concurrent use.
type logs struct {
	out     *slog.Logger // nil if the lines are not logged
	disk    string       // Params.File
	secrets atomic.Pointer[worker.Redactor]

	count atomic.Int64 // lines so far, except noise

	// queue holds the lines that are not written yet. The goroutine of the method run writes them.
	// If the method add wrote them itself, a slow terminal would delay the library and its answers
	// to requests.
	queue   chan logLine
	dropped atomic.Int64 // lines that found the queue full

	mu       sync.Mutex
	hidden   []string // the secrets so far
	warnings []string // the last warnings
	lines    []string // the last lines of any level, except noise
}

type logLine struct {
	level   slog.Level
	text    string
	warning bool
}

func newLogs(p *Params, out *slog.Logger) *logs {
	l := &logs{out: out, disk: p.File, queue: make(chan logLine, 1024)}
	l.hide(p)
	return l
}

// The method hide makes the secrets of p stars in all further lines. Earlier secrets remain hidden,
// because older workers still use them.
func (l *logs) hide(p *Params) {
	l.mu.Lock()
	defer l.mu.Unlock()
	known := len(l.hidden)
	for _, s := range []string{p.Password.Reveal(), p.Cookie.Reveal()} {
		if s != "" && !slices.Contains(l.hidden, s) {
			l.hidden = append(l.hidden, s)
		}
	}
	if len(l.hidden) > known || l.secrets.Load() == nil {
		l.secrets.Store(worker.NewRedactor(p.User, l.hidden...))
	}
}

// The method add adds a line that the library logged. The line may contain any bytes.
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

// The method run writes the lines of the queue to the log until ctx ends.
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

// The method drain writes the lines that are left in the queue. It is called after all worker
// processes have ended and the method run has returned.
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

// The method clean returns text without secrets and without characters that cannot be printed. If
// the result would be longer than maxLine bytes, it is cut.
func (l *logs) clean(text string) string {
	// The text is cut before it is searched for secrets, which limits the time of the search. The
	// cut may divide a secret. Redact is told that text is missing after the cut, and then also
	// hides the first part of such a secret.
	text = l.secrets.Load().Redact(text[:min(len(text), 4*maxLine)], len(text) > 4*maxLine)
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

// keepLast appends text to a list, which may have at most the given number of texts. If the list is
// full, the oldest text is removed.
func keepLast(list []string, text string, limit int) []string {
	if len(list) == limit {
		copy(list, list[1:])
		list[limit-1] = text
		return list
	}
	return append(list, text)
}

// lastWarnings returns the last warnings of the library, the newest at the end.
func (l *logs) lastWarnings() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return append([]string(nil), l.warnings...)
}

// The method mark returns the current position in the log. The method since returns the lines after
// such a position.
func (l *logs) mark() int64 { return l.count.Load() }

// The method since returns the lines that were added after a position. The position is a result of
// the method mark. The newest line is the last one. If many lines were added, the oldest of them
// are missing.
func (l *logs) since(mark int64) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := min(max(l.count.Load()-mark, 0), int64(len(l.lines)))
	return append([]string(nil), l.lines[int64(len(l.lines))-n:]...)
}
