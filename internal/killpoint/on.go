//go:build killpoints

// Package killpoint lets tests kill the process with SIGKILL at a named point, as a
// loss of power would. The points exist only in builds with the tag killpoints.
package killpoint

import (
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

var (
	mu     sync.Mutex
	passed int
)

// At kills the process at the point with the given name, if the environment variable
// VDDKCP_KILL_AT is this name (kill at the first pass) or NAME:N (kill at the N-th
// pass).
func At(name string) {
	want, number, _ := strings.Cut(os.Getenv("VDDKCP_KILL_AT"), ":")
	if name != want {
		return
	}
	mu.Lock()
	defer mu.Unlock()
	if passed++; number == "" || strconv.Itoa(passed) == number {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
}

// Interval returns the time between checkpoints that VDDKCP_CHECKPOINT_EVERY asks for,
// or 0 for the default.
func Interval() time.Duration {
	d, _ := time.ParseDuration(os.Getenv("VDDKCP_CHECKPOINT_EVERY"))
	return d
}
