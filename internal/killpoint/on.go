//go:build killpoints

// Package killpoint lets tests kill the process with SIGKILL, or stop it for some time, at named
// points of its code. The tests check what happens if the process ends, gets a signal or is overtaken
// by something else at such a point. The points exist only in builds with the build tag killpoints.
package killpoint

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

var (
	mu     sync.Mutex
	passed = map[string]int{} // how often each point was reached
)

// At is a point with the given name, at which tests may kill or stop the process.
//
// If the environment variable VDDKCP_KILL_AT has this name as its value, At kills the process. If the
// value has the form NAME:N, the N-th call of At with this name kills the process.
//
// If the folder that the environment variable VDDKCP_STOP_AT names has a FIFO with the name of the
// point, or with a name of the form NAME:N, At opens the FIFO and returns when its other end is
// closed. The other goroutines go on in the meantime. A test that opens the FIFO for writing
// therefore waits until the point is reached, and closes it to let the process continue.
func At(name string) {
	mu.Lock()
	passed[name]++
	numbered := fmt.Sprintf("%s:%d", name, passed[name])
	mu.Unlock()
	if want := os.Getenv("VDDKCP_KILL_AT"); want == name || want == numbered {
		syscall.Kill(os.Getpid(), syscall.SIGKILL)
		select {}
	}
	if dir := os.Getenv("VDDKCP_STOP_AT"); dir != "" {
		wait(filepath.Join(dir, name))
		wait(filepath.Join(dir, numbered))
	}
}

// wait waits until the other end of a FIFO was opened and closed. It returns at once if there is no
// FIFO at the path.
func wait(fifo string) {
	f, err := os.Open(fifo)
	if err != nil {
		return
	}
	defer f.Close()
	io.Copy(io.Discard, f)
}

// Interval returns the time between two checkpoints of a copy. Tests set it with the environment
// variable VDDKCP_CHECKPOINT_EVERY. The result 0 stands for the default interval.
func Interval() time.Duration { return duration("VDDKCP_CHECKPOINT_EVERY") }

// Poll returns the time between two looks at a task of a server. Tests set it with the environment
// variable VDDKCP_POLL. The result 0 stands for the default time.
func Poll() time.Duration { return duration("VDDKCP_POLL") }

// Watch returns the time between two looks at a VM while its disks are copied. Tests set it with the
// environment variable VDDKCP_WATCH. The result 0 stands for the default time.
func Watch() time.Duration { return duration("VDDKCP_WATCH") }

func duration(variable string) time.Duration {
	d, _ := time.ParseDuration(os.Getenv(variable))
	return d
}
