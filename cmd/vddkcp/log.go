package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// logFlags are the flags for the log, which every command has.
type logFlags struct {
	LogLevel  string `help:"Lowest level of messages to log: debug, info, warn or error." enum:"debug,info,warn,error" default:"info"`
	LogFormat string `help:"Format of the log: text or json. With json, every line on standard error is JSON, unless --log-file is given." enum:"text,json" default:"text"`
	LogFile   string `help:"Append the log to FILE instead of writing it to standard error." placeholder:"FILE" type:"path"`
	Verbose   bool   `help:"Log all messages; the same as --log-level debug." short:"v"`
}

// asJSON reports whether the flags make every line on standard error JSON. With a log file,
// --log-format is the format of that file alone.
func (f *logFlags) asJSON() bool { return f.LogFormat == "json" && f.LogFile == "" }

// The method style returns the style of the display for a value of --progress. It also reports
// whether every line on standard error must be JSON.
func (f *logFlags) style(flag string) (style progress.Style, asJSON bool) {
	style = progressStyle(flag)
	if f.asJSON() && style != progress.None {
		style = progress.JSON
	}
	return style, style == progress.JSON || f.asJSON()
}

// The method early returns a logger that writes to standard error, whatever --log-level and
// --log-file say. It is for messages of commands without a log, and for those that come before the
// log is open or after it was closed.
func (f *logFlags) early() *slog.Logger { return messages(errorOutput, f.asJSON()) }

// The method warn writes a warning to standard error, for the same messages as the method early.
func (f *logFlags) warn(message string) { f.early().Warn(message) }

// messages returns a logger that writes messages, except debug messages, to standard error.
func messages(stderr io.Writer, asJSON bool) *slog.Logger {
	if asJSON {
		return jsonLog(stderr, nil)
	}
	return slog.New(newPlainHandler(stderr, slog.LevelInfo))
}

// jsonLog returns a logger whose lines are JSON objects of the type "log".
func jsonLog(stderr io.Writer, options *slog.HandlerOptions) *slog.Logger {
	return slog.New(slog.NewJSONHandler(stderr, options)).With("type", "log")
}

// wantsJSON reports whether a command line, which need not be valid, has flags that make every line
// on standard error JSON.
func wantsJSON(args []string) bool {
	format, file := false, false
	for i, arg := range args {
		name, value, together := strings.Cut(arg, "=")
		if !together && i+1 < len(args) {
			value = args[i+1]
		}
		switch {
		case arg == "--":
			return format && !file
		case name == "--progress" && value == "json":
			return true
		case name == "--log-format":
			format = value == "json"
		case name == "--log-file":
			file = true
		}
	}
	return format && !file
}

// The method open returns the logger that the flags describe, and a function that closes
// the log file. Without a log file, the logger writes to stderr. The logger writes JSON if
// --log-format is json or if onlyJSON is true. The parameter onlyJSON means that stderr
// must not contain anything except JSON.
func (f *logFlags) open(stderr io.Writer, onlyJSON bool) (*slog.Logger, func() error, error) {
	level := slog.LevelDebug
	if !f.Verbose {
		if err := level.UnmarshalText([]byte(f.LogLevel)); err != nil {
			return nil, nil, fmt.Errorf("log level: %w", err)
		}
	}
	options := &slog.HandlerOptions{Level: level}
	if f.LogFile != "" {
		file, err := os.OpenFile(f.LogFile, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o666) // opening a FIFO waits for a reader
		if err != nil {
			return nil, nil, fmt.Errorf("log file: %w", err)
		}
		if f.LogFormat == "json" {
			return slog.New(slog.NewJSONHandler(printable.NewWriter(file), options)), file.Close, nil
		}
		return slog.New(slog.NewTextHandler(printable.NewWriter(file), options)), file.Close, nil
	}
	none := func() error { return nil }
	if onlyJSON || f.LogFormat == "json" {
		return jsonLog(stderr, options), none, nil
	}
	return slog.New(newPlainHandler(stderr, level)), none, nil
}

// stamp returns the text that a line of text on standard error begins with: the time and a space.
// On a terminal the text is empty, and also if the journal of systemd reads standard error, because
// the journal has the time of each line.
func stamp() string {
	if errorTerminal() || errorJournal() {
		return ""
	}
	return time.Now().Format(time.RFC3339) + " "
}

// plainHandler writes messages for people: "vddkcp: warning: text key=value". If standard error is
// no terminal, the line begins with the time.
type plainHandler struct {
	out   io.Writer
	level slog.Level
	attrs string
	mu    *sync.Mutex
}

func newPlainHandler(out io.Writer, level slog.Level) *plainHandler {
	return &plainHandler{out: out, level: level, mu: new(sync.Mutex)}
}

func (h *plainHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }

func (h *plainHandler) Handle(_ context.Context, r slog.Record) error {
	var line strings.Builder
	line.WriteString(stamp() + "vddkcp: ")
	switch {
	case r.Level >= slog.LevelError:
		line.WriteString("error: ")
	case r.Level >= slog.LevelWarn:
		line.WriteString("warning: ")
	}
	line.WriteString(printable.Line(r.Message))
	line.WriteString(h.attrs)
	r.Attrs(func(a slog.Attr) bool {
		fmt.Fprintf(&line, " %s=%s", a.Key, printable.Name(a.Value.String()))
		return true
	})
	line.WriteByte('\n')
	h.mu.Lock()
	defer h.mu.Unlock()
	_, err := io.WriteString(h.out, line.String())
	return err
}

func (h *plainHandler) WithAttrs(attrs []slog.Attr) slog.Handler {
	with := *h
	for _, a := range attrs {
		with.attrs += fmt.Sprintf(" %s=%s", a.Key, printable.Name(a.Value.String()))
	}
	return &with
}

// WithGroup ignores the group, because no message of vddkcp has one.
func (h *plainHandler) WithGroup(string) slog.Handler { return h }

// logLines is a writer that logs each line of text as a debug message. It is not safe for
// concurrent use.
type logLines struct {
	log     *slog.Logger
	partial []byte // the beginning of a line
}

func (w *logLines) Write(p []byte) (int, error) {
	w.partial = append(w.partial, p...)
	for {
		line, rest, ok := bytes.Cut(w.partial, []byte("\n"))
		if !ok {
			return len(p), nil
		}
		w.log.Debug(string(line))
		w.partial = rest
	}
}
