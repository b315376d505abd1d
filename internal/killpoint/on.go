//go:build killpoints

// Package killpoint lets tests kill the process with SIGKILL at named points of its code. The tests
// check what happens if the process stops at such a point. The points exist only in builds with the
// build tag killpoints.
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

// At is a point with the given name, at which tests may kill the process. If the environment
// variable VDDKCP_KILL_AT has this name as its value, At kills the process. If the value has the
// form NAME:N, the N-th call of At with this name kills the process.
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

// Interval returns the time between two checkpoints of a copy. Tests set it with the environment
// variable VDDKCP_CHECKPOINT_EVERY. The result 0 stands for the default interval.
func Interval() time.Duration {
	d, _ := time.ParseDuration(os.Getenv("VDDKCP_CHECKPOINT_EVERY"))
	return d
}
