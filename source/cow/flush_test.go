package cow

import (
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/flush/flushtest"
)

func TestFlushes(t *testing.T) {
	flushtest.Run(t, func(t *testing.T, flush func() error) flushtest.Disk {
		var opened atomic.Bool
		sys := kernel()
		sys.fdatasync = func(*os.File) error {
			if !opened.Load() {
				return nil
			}
			return flush()
		}
		d, err := newDisk(t.Context(), memory(1<<20), Options{File: filepath.Join(t.TempDir(), "x.cow")}, sys)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { d.Close() })
		opened.Store(true)
		return flushtest.Disk{Flush: d.Flush, Calls: d.flushes.Calls, EIO: unix.EIO}
	})
}
