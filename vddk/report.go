package vddk

import (
	"context"
	"log/slog"
	"sync"
)

func (d *Disk) warn(text string) {
	if d.o.Warn != nil {
		d.o.Warn(text)
	}
}

func (d *Disk) warnOnce(once *sync.Once, text string) { once.Do(func() { d.warn(text) }) }

// debugs says whether a topic of Options.Debug is wanted.
func (d *Disk) debugs(topic string) bool {
	return d.o.Log != nil && (topic == "" || d.o.Debug[topic])
}

// debug logs for a topic; "" is always logged.
func (d *Disk) debug(topic, message string, args ...any) {
	if d.debugs(topic) {
		d.o.Log.Log(context.Background(), slog.LevelDebug, "vddk: "+message, append(args, "disk", d.params.File)...)
	}
}
