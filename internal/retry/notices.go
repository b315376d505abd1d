package retry

import (
	"log/slog"
	"sync"
	"time"
)

// noticeInterval is the shortest time between two warnings about retries. One warning is enough
// when a connection is lost and all requests in flight fail at the same time.
const noticeInterval = 10 * time.Second

// LogTo returns a function for Policy.OnRetry that logs each retry with the given message. At
// most once in ten seconds it logs a warning, with the number of retries since the last warning.
// It logs the other retries at the debug level. The function is safe for concurrent use.
func LogTo(log *slog.Logger, message string) func(err error, wait time.Duration) {
	var mu sync.Mutex
	var last time.Time
	others := 0
	return func(err error, wait time.Duration) {
		mu.Lock()
		defer mu.Unlock()
		wait = wait.Round(time.Millisecond)
		if time.Since(last) < noticeInterval {
			others++
			log.Debug(message, "wait", wait, "error", err)
			return
		}
		args := []any{"wait", wait, "error", err}
		if others > 0 {
			args = append(args, "others_meanwhile", others)
		}
		last, others = time.Now(), 0
		log.Warn(message, args...)
	}
}
