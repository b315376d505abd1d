package main

import (
	"log/slog"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/source"
)

// noticeInterval is how often retries are told at most: where one request fails
// all those in flight do.
const noticeInterval = 10 * time.Second

// retryNotices returns what tells of retries: now and then, with how many there
// were meanwhile; all of them at debug level.
func retryNotices(log *slog.Logger) func(err error, wait time.Duration) {
	var mu sync.Mutex
	var last time.Time
	others := 0
	return func(err error, wait time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		wait = wait.Round(time.Millisecond)
		if time.Since(last) < noticeInterval {
			others++
			log.Debug("reading is tried again", "wait", wait, "error", err)
			return
		}
		args := []any{"wait", wait, "error", err}
		if others > 0 {
			args = append(args, "others_meanwhile", others)
		}
		last, others = time.Now(), 0
		log.Warn("reading is tried again", args...)
	}
}

// requests is how many reads are in flight of disks that are read side by side:
// depth on each connection that one may come to have.
func requests(depth int, disks ...source.Disk) int {
	connections := 1
	for _, d := range disks {
		if c, ok := source.Ability[source.Counted](d); ok {
			connections = max(connections, c.Stats().Most)
		}
	}
	return depth * connections
}

// countSource fills in what the report says of how the source was read, and
// shows what VDDK warned of before a copy failed with err.
func (j *job) countSource(err error) {
	if j.source == nil {
		return
	}
	if c, ok := source.Ability[source.Counted](j.source); ok {
		s := c.Stats()
		j.report.Transport, j.report.VDDKVersion, j.report.Connections = s.Transport, s.Library, s.Connections
		j.report.Retries, j.report.WorkerRestarts = s.Retries, s.Restarts
		if s.ExtentsSource != "" {
			j.report.ExtentsSource = s.ExtentsSource
		}
	}
	if err == nil {
		return
	}
	if l, ok := source.Ability[interface{ LastWarnings() []string }](j.source); ok {
		for _, line := range l.LastWarnings() {
			j.log.Warn("VDDK said: " + line)
		}
	}
}
