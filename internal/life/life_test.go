package life_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/vddkcp/vddkcp/internal/life"
)

var errStopped = errors.New("stopped by the user")

func TestCloseWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := life.Life{Context: t.Context(), Name: "the disk"}
		for range 2 {
			if err := l.Begin(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		released, closed := false, make(chan error)
		go func() { closed <- l.Close(func() error { released = true; return io.ErrShortWrite }) }()
		synctest.Wait()
		for range 3 { // calls that are refused do not end the wait
			if err := l.Begin(t.Context()); err != os.ErrClosed {
				t.Errorf("Begin while Close waits: %v", err)
			}
			if err := l.Check(t.Context()); err != os.ErrClosed {
				t.Errorf("Check while Close waits: %v", err)
			}
		}
		if err := l.Close(nil); !errors.Is(err, os.ErrClosed) {
			t.Errorf("second Close: %v", err)
		}
		l.End()
		synctest.Wait()
		if released {
			t.Fatal("released with a call in progress")
		}
		if err := l.Cause(t.Context()); err != nil {
			t.Errorf("the call in progress ended: %v", err)
		}
		l.End()
		if err := <-closed; err != io.ErrShortWrite || !released {
			t.Errorf("Close: %v, released: %v", err, released)
		}
		if err := l.Close(nil); !errors.Is(err, os.ErrClosed) || err.Error() != "close the disk: file already closed" {
			t.Errorf("third Close: %v", err)
		}
	})
}

// TestCloseRaces tests that no call runs after the release, even if calls and Close run
// at the same time.
func TestCloseRaces(t *testing.T) {
	for range 1000 {
		l := life.Life{Context: t.Context()}
		released := false // read and written without a lock, for the race detector
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				for l.Begin(t.Context()) == nil {
					if released {
						t.Error("a call runs after the release")
					}
					l.End()
				}
			})
		}
		if err := l.Close(func() error { released = true; return nil }); err != nil {
			t.Error(err)
		}
		all.Wait()
	}
}

func TestContexts(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	l := life.Life{Context: ctx, Name: "the disk"}
	other, stop := context.WithCancelCause(t.Context())
	stop(io.ErrNoProgress)
	if err := l.Begin(other); err != io.ErrNoProgress {
		t.Errorf("context of the call: %v", err)
	}
	cancel(errStopped)
	for name, err := range map[string]error{"Begin": l.Begin(other), "Check": l.Check(other), "Cause": l.Cause(other)} {
		if err != errStopped {
			t.Errorf("%s after the end of the disk's context: %v", name, err)
		}
	}
	_, err := l.ReadAt(make([]byte, 3), 1, 10, func(p []byte) (int, error) { return len(p), nil })
	if !errors.Is(err, errStopped) || err.Error() != "read the disk [1, 4): stopped by the user" {
		t.Errorf("ReadAt: %v", err)
	}
	if err := l.Close(func() error { return nil }); err != nil { // no call is counted
		t.Error(err)
	}
}

func TestReadAt(t *testing.T) {
	const size = 10
	l := life.Life{Context: t.Context(), Name: "the disk"}
	for _, test := range []struct {
		n, off int64
		read   int // bytes that the disk is asked for
		err    error
	}{
		{3, 0, 3, nil},
		{3, 7, 3, nil},
		{4, 7, 3, io.EOF},
		{0, 5, 0, nil},
		{0, 10, 0, io.EOF},
		{1, 10, 0, io.EOF},
		{1, 1 << 62, 0, io.EOF},
	} {
		t.Run(fmt.Sprintf("%d at %d", test.n, test.off), func(t *testing.T) {
			asked := 0
			n, err := l.ReadAt(make([]byte, test.n), test.off, size, func(p []byte) (int, error) { asked = len(p); return len(p), nil })
			if n != test.read || asked != test.read || err != test.err {
				t.Errorf("%d bytes, %v, the disk was asked for %d; want %d, %v", n, err, asked, test.read, test.err)
			}
		})
	}
	if _, err := l.ReadAt(nil, -1, size, nil); err == nil || err.Error() != "read the disk: negative offset -1" {
		t.Errorf("negative offset: %v", err)
	}
	if n, err := l.ReadAt(make([]byte, 20), 0, size, func(p []byte) (int, error) { return 4, errStopped }); n != 4 || err != errStopped {
		t.Errorf("a read that fails: %d, %v", n, err)
	}
}

func TestInDisk(t *testing.T) {
	for _, test := range []struct {
		off, n int64
		want   bool
	}{{0, 0, true}, {0, 10, true}, {10, 0, true}, {10, 1, false}, {11, 0, false}, {-1, 2, false}, {3, -1, false}, {5, 1<<63 - 1, false}} {
		if got := life.InDisk(test.off, test.n, 10); got != test.want {
			t.Errorf("[%d, +%d): %v", test.off, test.n, got)
		}
	}
}
