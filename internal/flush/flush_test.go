package flush_test

import (
	"context"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/flush"
	"github.com/vddkcp/vddkcp/internal/flush/flushtest"
)

func TestGroup(t *testing.T) {
	flushtest.Run(t, func(_ *testing.T, f func() error) flushtest.Disk {
		var g flush.Group
		return flushtest.Disk{
			Flush: func(ctx context.Context) error { return g.Do(ctx, f) },
			Calls: g.Calls,
			EIO:   syscall.EIO,
		}
	})
}
