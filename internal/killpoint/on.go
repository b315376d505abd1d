//go:build killpoints

// Package killpoint lets tests end the process at a named point, by SIGKILL, as
// a power cut would. Only builds with the tag killpoints have such points.
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

// At ends the process at the N-th pass of the point that VDDKCP_KILL_AT names,
// as NAME or NAME:N.
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

// Interval is how often checkpoints are taken, as VDDKCP_CHECKPOINT_EVERY says;
// 0: as ever.
func Interval() time.Duration {
	d, _ := time.ParseDuration(os.Getenv("VDDKCP_CHECKPOINT_EVERY"))
	return d
}
