package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"strings"
	"sync"

	"github.com/vddkcp/vddkcp/internal/printable"
)

// logFlags are the flags for the log, which every command has.
type logFlags struct {
	LogLevel  string `help:"Lowest level of messages to log: debug, info, warn or error." enum:"debug,info,warn,error" default:"info"`
	LogFormat string `help:"Format of the log: text or json." enum:"text,json" default:"text"`
	LogFile   string `help:"Append the log to FILE instead of writing it to standard error." placeholder:"FILE" type:"path"`
	Verbose   bool   `help:"Log all messages; the same as --log-level debug." short:"v"`
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
		return slog.New(slog.NewJSONHandler(stderr, options)).With("type", "log"), none, nil
	}
	return slog.New(&plainHandler{out: stderr, level: level, mu: new(sync.Mutex)}), none, nil
}

// plainHandler writes messages for people: "vddkcp: warning: text key=value".
type plainHandler struct {
	out   io.Writer
	level slog.Level
	attrs string
	mu    *sync.Mutex
}

func (h *plainHandler) Enabled(_ context.Context, level slog.Level) bool { return level >= h.level }

func (h *plainHandler) Handle(_ context.Context, r slog.Record) error {
	var line strings.Builder
	line.WriteString("vddkcp: ")
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
