package vddk

import (
	"bytes"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// The number of connections grows as long as that raises the rate and the budget allows it, and
// Stats reports it.
func TestAuto(t *testing.T) {
	for _, test := range []struct {
		name      string
		transport string
		budget    int64 // budget in connections; 0 for none
		openFails bool  // opening more than two connections fails
		want      int
		warnings  int
	}{
		{name: "nbd", transport: "nbd", want: 4},
		{name: "nbdssl", transport: "nbdssl", want: 4},
		{name: "san", transport: "san", want: 1},
		{name: "hotadd", transport: "hotadd", want: 1},
		{name: "file", transport: "file", want: 1},
		{name: "budget of three", transport: "nbd", budget: 3, want: 3},
		{name: "two can be opened", transport: "nbd", openFails: true, want: 2, warnings: 1},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				host, _ := newFakeHost(t, 4*mib)
				host.opened.Transport = test.transport
				host.delay = 10 * time.Millisecond // with 4 requests in flight, a connection has 400 requests per second
				host.onOpen = func(n int, _ *worker.Opened) error {
					return when(test.openFails && n > 2, libraryError(1, "Unknown error"))
				}
				var warnings []string
				var log bytes.Buffer
				o := Options{RequestSize: 4096, Warn: func(s string) { warnings = append(warnings, s) },
					Log: slog.New(slog.NewTextHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))}
				if test.budget > 0 {
					o.Budget = nfcbudget.New(test.budget * defaultBuffers.Bytes())
				}
				d := host.mustOpen(Params{Server: "esxi"}, o)
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				var wg sync.WaitGroup
				for range 32 {
					wg.Go(func() {
						p := make([]byte, 4096)
						for ctx.Err() == nil {
							if _, err := d.ReadAt(p, 0); err != nil {
								t.Error(err)
								return
							}
						}
					})
				}
				wg.Wait()
				if got := d.Stats().Connections; got != test.want || len(warnings) != test.warnings {
					t.Errorf("%d connections, want %d; warnings %q", got, test.want, warnings)
				}
				checkTunerLog(t, log.String(), test.want, test.budget > 0)
				if host.mostInFlight > 4*test.want {
					t.Errorf("%d requests in flight", host.mostInFlight)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
				if o.Budget != nil {
					if _, ok := o.Budget.TryAcquire(test.budget * defaultBuffers.Bytes()); !ok {
						t.Error("the budget did not come back")
					}
				}
				host.checkGone()
			})
		})
	}
}

// A connection that does not raise the rate is closed again, while reads continue.
func TestAutoShrinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, content := newFakeHost(t, 4*mib)
		line := make(chan struct{}, 1) // the host carries out one request at a time
		host.onRead = func(int, *fakeWorker, uint64, int) error {
			line <- struct{}{}
			time.Sleep(2 * time.Millisecond)
			<-line
			return nil
		}
		d := host.mustOpen(Params{}, Options{RequestSize: 64 << 10})
		for range 100 {
			if err := readBoth(t, d, content); err != nil {
				t.Fatal(err)
			}
		}
		if got := d.Stats().Connections; got != 1 || host.starts < 2 {
			t.Errorf("%d connections of %d that were tried", got, host.starts)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		host.checkGone()
	})
}

// After a crash, the disk is opened again without a wait, and only requests that were in flight are
// repeated.
func TestCrashIsRepairedAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, content := newFakeHost(t, 32*mib)
		host.delay = time.Millisecond
		host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 15, errCrash) }
		var waits []time.Duration
		d := host.mustOpen(Params{Snapshot: "snapshot-1"}, Options{Connections: 1, Retry: source.RetryOptions{Retries: -1,
			Backoff: func(int) time.Duration { return time.Hour },
			OnRetry: func(err error, wait time.Duration) { waits = append(waits, wait) }}})
		start := time.Now()
		if err := readBoth(t, d, content); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took > time.Second || len(waits) != 1 || waits[0] != 0 {
			t.Errorf("it took %v, waits %v", took, waits)
		}
		if again := host.reads - 32; again > 4 {
			t.Errorf("%d requests were made again of 4 in flight", again)
		}
		d.Close()
		host.checkGone()
	})
}

// If a lost connection cannot be opened again, the disk uses the other one and stops trying.
func TestDoneWithout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, content := newFakeHost(t, 32*mib)
		host.delay = 10 * time.Millisecond
		host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error { return when(k == 8, errCrash) }
		host.onOpen = func(n int, _ *worker.Opened) error { return when(n > 2, libraryError(18000, "too many")) }
		var warnings []string
		d := host.mustOpen(Params{Snapshot: "snapshot-1"}, Options{Connections: 2, Retry: fastRetry(-1), Warn: func(s string) { warnings = append(warnings, s) }})
		synctest.Wait()
		if err := readBoth(t, d, content); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if len(warnings) != 1 || !strings.Contains(warnings[0], "continues with 1") || host.starts > 6 {
			t.Errorf("%d workers were started, %q", host.starts, warnings)
		}
		d.Close()
		host.checkGone()
	})
}

// Requests that wait use any connection that becomes free. A request that waited forever would be
// a deadlock, which synctest reports.
func TestTurns(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			host, _ := newFakeHost(t, mib)
			r := rand.New(rand.NewPCG(seed, 1))
			var mu sync.Mutex
			host.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error {
				mu.Lock()
				took := time.Duration(r.IntN(5000)) * time.Microsecond
				mu.Unlock()
				time.Sleep(took)
				return when(k%301 == 0, errCrash)
			}
			d := host.mustOpen(Params{}, Options{Connections: 3, Depth: 1, RequestSize: 4096, Retry: fastRetry(-1)})
			var wg sync.WaitGroup
			for range 16 {
				wg.Go(func() {
					for range 40 {
						if _, err := d.ReadAt(make([]byte, 512), 0); err != nil {
							t.Error(err)
						}
					}
				})
			}
			wg.Wait()
			d.Close()
			host.checkGone()
		})
	}
}

// Disks that were attached to this machine are detached even after the end of the context.
func TestCancelCleansUp(t *testing.T) {
	for transport, want := range map[string]int{"hotadd": 1, "san": 1, "nbd": 0} {
		host, _ := newFakeHost(t, mib)
		host.opened.Transport = transport
		ctx, cancel := context.WithCancel(t.Context())
		d, err := host.open(ctx, Params{Server: "vc"}, Options{})
		if err != nil {
			t.Fatal(err)
		}
		cancel()
		d.Close()
		if host.cleanups != want {
			t.Errorf("%s: %d calls of Cleanup, want %d", transport, host.cleanups, want)
		}
	}
}

func TestRequests(t *testing.T) {
	host, _ := newFakeHost(t, mib)
	p := Params{File: "[ds] a/a.vmdk", Server: "vc", User: `DOM\u`, Password: NewSecret("pw"), VM: "moref=vm-1", Snapshot: "snapshot-9",
		Port: 444, NFCHostPort: 903, Transports: "nbd", Compression: "fastlz", SingleLink: true, Unbuffered: true}
	host.holes = []worker.Block{{Start: 256, Count: 512}}
	host.opened.LogicalSector = 4096
	var warnings []string
	d := host.mustOpen(p, Options{Warn: func(s string) { warnings = append(warnings, s) }})
	want := worker.OpenRequest{Path: p.File, ReadOnly: true, Server: "vc", Port: 444, NFCPort: 903, VMXSpec: "moref=vm-1", Thumbprint: "AA:BB",
		User: `DOM\u`, Password: "pw", Snapshot: "snapshot-9", Transports: "nbd",
		Flags: worker.FlagReadOnly | worker.FlagFastLZ | worker.FlagSingleLink | worker.FlagUnbuffered}
	if got := host.requests[0]; got != want {
		t.Errorf("asked for %#v, %+v", got, want)
	}
	same := int64(0)
	for e, err := range d.Extents(t.Context(), 0, d.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		if e.Kind == source.Zero {
			t.Errorf("%+v: the hole of a single link is not zero", e)
		}
		if e.Kind == source.Inherited {
			same += e.Len
		}
	}
	if same != 512*sectorSize {
		t.Errorf("%d bytes are Inherited", same)
	}
	if len(warnings) != 0 || d.Info().LogicalSector != 4096 || d.Info().GuestSector != 4096 {
		t.Errorf("%q, %+v", warnings, d.Info())
	}
}

// checkTunerLog checks that the log says why the number of connections was raised to n, and, if a
// budget limits the number, why it was not raised further.
func checkTunerLog(t *testing.T, log string, n int, limited bool) {
	t.Helper()
	if n > 1 && !strings.Contains(log, "2 connections instead of 1: the rate with 1 connection is ") ||
		n > 2 && !strings.Contains(log, "3 connections instead of 2: the rate was ") ||
		limited != strings.Contains(log, fmt.Sprintf("no further connection to %d: ", n)) {
		t.Errorf("%d connections, log:\n%s", n, log)
	}
}
