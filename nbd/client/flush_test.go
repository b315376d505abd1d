package client

import (
	"context"
	"errors"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"vddkcp/nbd"
)

// Flushes that wait for another one have the next one together: none may be
// answered by the one that was under way when it came. Where their context has
// ended meanwhile, there is none.
func TestFlushesTogether(t *testing.T) {
	for name, want := range map[string]struct {
		ends    bool // the context ends during the first flush
		flushes int64
	}{"waiting": {false, 2}, "ended": {true, 1}} {
		t.Run(name, func(t *testing.T) {
			ctx, end := context.WithCancel(t.Context())
			defer end()
			const calls = 50
			first, going := make(chan struct{}), make(chan struct{})
			var flushes atomic.Int64
			s := play(t, greetingOf(fakeSize, nbd.SendFlush), func(r nbd.Request, _ []byte) []byte {
				if r.Type != nbd.CmdFlush {
					return nil
				}
				if flushes.Add(1) == 1 {
					close(first)
					<-going
				}
				return to(r, chunk(nbd.ChunkNone, true))
			})
			d := &WritableDisk{Disk: &Disk{server: s.server, size: fakeSize}, target: plainTarget(s.server)}
			defer d.Close()
			var all sync.WaitGroup
			all.Go(func() {
				if err := d.Flush(t.Context()); err != nil {
					t.Error(err)
				}
			})
			<-first
			for range calls {
				all.Go(func() {
					if err := d.Flush(ctx); (err != nil) != want.ends || want.ends && !errors.Is(err, context.Canceled) {
						t.Errorf("Flush: %v", err)
					}
				})
			}
			awaitFlushes(calls)
			if want.ends {
				end()
			}
			close(going)
			all.Wait()
			if n := flushes.Load(); n != want.flushes {
				t.Errorf("%d flushes with %d calls that came during the first, want %d", n, calls, want.flushes)
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
