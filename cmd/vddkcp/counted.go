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
