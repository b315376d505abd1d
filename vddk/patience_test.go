package vddk

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// The copy fails within a second after --retry-timeout is over, whatever the disk waits for: a retry,
// a read that hangs, or an opening that fails or hangs.
func TestPatience(t *testing.T) {
	const patience = 6 * time.Second
	crashes := func(h *fakeHost) {
		h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k >= 5, errCrash) }
	}
	for _, c := range []struct {
		name  string
		fault func(h *fakeHost)
	}{
		{"reads fail", func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error {
				return when(k >= 5, libraryError(14009, "the server refused connection"))
			}
		}},
		{"reads hang", func(h *fakeHost) {
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k >= 5, errHang) }
		}},
		{"workers crash", crashes},
		{"opening is refused", func(h *fakeHost) {
			crashes(h)
			h.onOpen = func(n int, _ *worker.Opened) error { return when(n > 1, libraryError(18000, "cannot connect")) }
		}},
		{"opening hangs", func(h *fakeHost) {
			crashes(h)
			h.onOpen = func(n int, _ *worker.Opened) error { return when(n > 1, errHang) }
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				host, content := newFakeHost(t, 8*mib)
				c.fault(host)
				d := host.mustOpen(Params{}, Options{Connections: 1, Retry: source.RetryOptions{Retries: -1, Timeout: patience}})
				start := time.Now()
				err := readBoth(t, d, content)
				if err == nil || !strings.Contains(err.Error(), "gave up after 6s without progress") {
					t.Errorf("%v", err)
				}
				if took := time.Since(start); took < patience-time.Second || took > patience+time.Second {
					t.Errorf("ended after %v, want %v", took, patience)
				}
				d.Close()
				host.checkGone()
			})
		})
	}
}

// If the retry policy leaves less time than Options.Timeout, a worker that hangs is killed earlier,
// and the error names the time after which it was killed.
func TestPatienceInError(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, _ := newFakeHost(t, mib)
		host.onRead = func(int, *fakeWorker, uint64, int) error { return errHang }
		d := host.mustOpen(Params{}, Options{Connections: 1, Timeout: 4 * time.Second, Retry: source.RetryOptions{Retries: -1, Timeout: 6 * time.Second}})
		_, err := d.ReadAt(make([]byte, 4096), 0)
		if err == nil || !strings.Contains(err.Error(), "no answer within 2s") {
			t.Errorf("%v, want the 2s that were left after the first attempt of 4s", err)
		}
		d.Close()
		host.checkGone()
	})
}
