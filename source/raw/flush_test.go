package raw

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/flush/flushtest"
)

func TestFlushes(t *testing.T) {
	flushtest.Run(t, func(t *testing.T, flush func() error) flushtest.Disk {
		d := openEmpty(t)
		d.fdatasync = func(int) error { return flush() }
		return flushtest.Disk{Flush: d.Flush, Calls: d.flushes.Calls, EIO: unix.EIO}
	})
}

func openEmpty(t *testing.T) *WritableDisk {
	t.Helper()
	path := filepath.Join(t.TempDir(), "d.raw")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := OpenWritable(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}
