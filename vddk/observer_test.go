package vddk

import (
	"bytes"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/internal/observer"
)

// watched collects what a disk tells its observer.
type watched struct {
	mu             sync.Mutex
	open, waiting  int
	waits          int // number of waits that have begun
	waitBegins     chan struct{}
	connectionsMin int
}

func (w *watched) observer() observer.Observer {
	return observer.Observer{
		Connections: func(n int) {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.open += n
			w.connectionsMin = min(w.connectionsMin, w.open)
		},
		Waiting: func(n int) {
			w.mu.Lock()
			defer w.mu.Unlock()
			if w.waiting += n; n > 0 {
				w.waits++
				w.waitBegins <- struct{}{}
			}
		},
	}
}

func (w *watched) check(t *testing.T, when string, open, waiting int) {
	t.Helper()
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.open != open || w.waiting != waiting || w.connectionsMin < 0 {
		t.Errorf("%s: %d connections, at least %d, and %d calls wait; want %d and %d", when, w.open, w.connectionsMin, w.waiting, open, waiting)
	}
}

func TestObserverOfConnections(t *testing.T) {
	host, content := newFakeHost(t, 1<<20)
	crash := true
	host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error {
		if k == 1 && crash {
			return errCrash
		}
		return nil
	}
	w := &watched{waitBegins: make(chan struct{}, 100)}
	d, err := host.open(observer.With(t.Context(), w.observer()), Params{}, Options{Retry: fastRetry(3)})
	if err != nil {
		t.Fatal(err)
	}
	w.check(t, "open", 1, 0)
	p := make([]byte, len(content))
	if _, err := d.ReadAt(p, 0); err != nil || !bytes.Equal(p, content) {
		t.Fatalf("the content differs, or %v", err)
	}
	w.check(t, "opened again", 1, 0)
	if !d.pool.growth.add(func() {}, nil) {
		t.Fatal("no second connection")
	}
	w.check(t, "one more", 2, 0)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	w.check(t, "closed", 0, 0)
}

// TestObserverOfBudget opens a second disk on a host whose memory another disk uses.
func TestObserverOfBudget(t *testing.T) {
	budget := nfcbudget.New(defaultBuffers.Bytes())
	remote := Params{Server: "h", User: "u"}
	first, _ := newFakeHost(t, 1<<20)
	d := first.mustOpen(remote, Options{Budget: budget})
	w := &watched{waitBegins: make(chan struct{}, 100)}
	second, _ := newFakeHost(t, 1<<20)
	done := make(chan error)
	go func() {
		_, err := second.open(observer.With(t.Context(), w.observer()), remote, Options{Budget: budget})
		done <- err
	}()
	<-w.waitBegins
	w.check(t, "waiting", 0, 1)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	w.check(t, "open", 1, 0)
}

// TestObserverOfMemory reads from a host that has no memory for some requests.
func TestObserverOfMemory(t *testing.T) {
	host, content := newFakeHost(t, 1<<20)
	host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error {
		if k == 1 {
			return libraryError(2, "memory")
		}
		return nil
	}
	w := &watched{waitBegins: make(chan struct{}, 100)}
	var log bytes.Buffer
	d, err := host.open(observer.With(t.Context(), w.observer()), Params{}, Options{Retry: fastRetry(3),
		Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))})
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, len(content))
	if _, err := d.ReadAt(p, 0); err != nil || !bytes.Equal(p, content) {
		t.Fatalf("the content differs, or %v", err)
	}
	w.check(t, "read", 1, 0)
	if w.waits == 0 || !strings.Contains(log.String(), "at most 3 requests of 512.0 KiB at a time") {
		t.Errorf("%d waits, log %s", w.waits, &log)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
}
