// Package eintr repeats system calls that a signal interrupted. The Go runtime
// sends signals to its own threads, so that any slow system call which is made
// through golang.org/x/sys/unix can fail with EINTR; package os repeats its own
// calls in the same way.
package eintr

import (
	"golang.org/x/sys/unix"

	_ "github.com/vddkcp/vddkcp/internal/linuxonly"
)

// Retry repeats call as long as it returns EINTR, and returns any other result of it.
func Retry(call func() error) error {
	for {
		if err := call(); err != unix.EINTR {
			return err
		}
	}
}
