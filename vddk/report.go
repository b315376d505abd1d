package vddk

import (
	"context"
	"log/slog"
	"sync"
)

// reporter passes warnings to the user, and debugging messages to the log. It is safe for
// concurrent use.
type reporter struct {
	disk   string // Params.File
	log    *slog.Logger
	toUser func(text string)
	topics map[string]bool // Options.Debug
	stats  *callStats      // of the disk's calls; nil: they are not measured
}

func newReporter(p *Params, o *Options) *reporter {
	r := &reporter{disk: p.File, log: o.Log, toUser: o.Warn, topics: o.Debug}
	if o.Debug["stats"] {
		r.stats = &callStats{rows: make(map[string]*callRow)}
	}
	return r
}

// The method warn shows a warning to the user, if Options.Warn is set.
func (r *reporter) warn(text string) {
	if r.toUser != nil {
		r.toUser(text)
	}
}

// The method table logs the lines of a table that the user has asked for.
func (r *reporter) table(title string, lines []string) {
	if r.log == nil {
		return
	}
	r.log.Info(title, "disk", r.disk)
	for _, line := range lines {
		r.log.Info(line)
	}
}

func (r *reporter) warnOnce(once *sync.Once, text string) { once.Do(func() { r.warn(text) }) }

// The method debugs reports whether the method debug writes messages about a topic to the log. The
// topic is one of DebugKeys, or "" for messages that are always logged.
func (r *reporter) debugs(topic string) bool {
	return r.log != nil && (topic == "" || r.topics[topic])
}

// The method debug logs a message at the debug level, if the method debugs allows the topic of the
// message.
func (r *reporter) debug(topic, message string, args ...any) {
	if r.debugs(topic) {
		r.log.Log(context.Background(), slog.LevelDebug, "vddk: "+message, append(args, "disk", r.disk)...)
	}
}
