package raw

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"
)

// The kernel reports a lost page to one call of fdatasync. A second Flush that runs
// meanwhile must not return before the error of the first is known.
func TestFlushesAreOneAtATime(t *testing.T) {
	d := openEmpty(t)
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

// Flushes that wait for an fdatasync have the next one together: none may be
// answered by the one that was under way when it came. Where their context has
// ended meanwhile, there is none.
func TestFlushesTogether(t *testing.T) {
	for name, want := range map[string]struct {
		ends  bool // the context ends during the first fdatasync
		calls int
	}{"waiting": {false, 2}, "ended": {true, 1}} {
		t.Run(name, func(t *testing.T) {
			d := openEmpty(t)
			ctx, end := context.WithCancel(t.Context())
			defer end()
			const flushes = 100
			calls := 0
			var all sync.WaitGroup
			d.fdatasync = func(int) error {
				if calls++; calls > 1 {
					return nil
				}
				for range flushes {
					all.Go(func() {
						if err := d.Flush(ctx); (err != nil) != want.ends || want.ends && !errors.Is(err, context.Canceled) {
							t.Errorf("Flush: %v", err)
						}
					})
				}
				awaitFlushes(flushes)
				if want.ends {
					end()
				}
				return nil
			}
			if err := d.Flush(t.Context()); err != nil {
				t.Error(err)
			}
			all.Wait()
			if calls != want.calls {
				t.Errorf("%d calls of fdatasync with %d flushes that came during the first, want %d", calls, flushes, want.calls)
			}
			if err := d.Flush(t.Context()); err != nil {
				t.Errorf("Flush after that: %v", err)
			}
		})
	}
}

// awaitFlushes returns when n calls of Flush wait for another one's end.
func awaitFlushes(n int) {
	stacks := make([]byte, 1<<20)
	for waiting := 0; waiting < n; runtime.Gosched() {
		waiting = 0
		for g := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
			if strings.Contains(g, "[sync.Mutex.Lock") && strings.Contains(g, "WritableDisk).Flush") {
				waiting++
			}
		}
	}
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
