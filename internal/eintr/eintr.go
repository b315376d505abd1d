// Package eintr repeats system calls that a signal interrupted. The Go runtime sends signals to
// its own threads. Therefore any slow system call through golang.org/x/sys/unix can fail with
// EINTR. Package os repeats its own calls in the same way.
package eintr

import (
	"golang.org/x/sys/unix"

	_ "github.com/vddkcp/vddkcp/internal/linuxonly"
)

// Retry calls the given function until its result is not EINTR, and returns that result.
func Retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
