package vddk

import (
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/flush/flushtest"
)

func TestFlushes(t *testing.T) {
	flushtest.Run(t, func(t *testing.T, flush func() error) flushtest.Disk {
		host, _, d := newWritable(t, mib, Options{})
		host.onFlush = func(int, *fakeWorker) error {
			return when(flush() != nil, libraryError(1, "Unknown error"))
		}
		return flushtest.Disk{Flush: d.Flush, Calls: d.flushes.Calls, EIO: syscall.EIO}
	})
}
