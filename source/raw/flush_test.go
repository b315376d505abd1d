package raw

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// The kernel reports a lost page to one call of fdatasync. A second Flush that runs
// meanwhile must not return before the error of the first is known.
func TestFlushesAreOneAtATime(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.raw")
	if err := os.WriteFile(path, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	d, err := OpenWritable(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	calls := 0
	d.fdatasync = func(int) error {
		calls++
		if d.flushing.TryLock() {
			d.flushing.Unlock()
			t.Error("another Flush can run during fdatasync")
		}
		if calls == 1 {
			return unix.EIO
		}
		return nil
	}
	for range 2 {
		if err := d.Flush(t.Context()); !errors.Is(err, unix.EIO) {
			t.Errorf("Flush: %v, want EIO", err)
		}
	}
}
