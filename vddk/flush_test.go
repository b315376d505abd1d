package vddk

import (
	"runtime"
	"strings"
	"sync"
	"testing"
)

// Many flushes at once are two of the library's: none is answered by the one that
// was under way when it came.
func TestFlushesTogether(t *testing.T) {
	host, _ := newFakeHost(t, mib)
	first, going := make(chan struct{}), make(chan struct{})
	host.onFlush = func(k int, _ *fakeWorker) error {
		if k == 1 {
			close(first)
			<-going
		}
		return nil
	}
	d := host.mustOpen(Params{}, Options{Writable: true, Retry: fastRetry(-1)})
	var all sync.WaitGroup
	flush := func() {
		if err := d.Flush(t.Context()); err != nil {
			t.Error(err)
		}
	}
	all.Go(flush)
	<-first
	const calls = 20
	for range calls {
		all.Go(flush)
	}
	stacks := make([]byte, 1<<20)
	for waiting := 0; waiting < calls; runtime.Gosched() {
		waiting = 0
		for g := range strings.SplitSeq(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
			if strings.Contains(g, "[sync.Mutex.Lock") && strings.Contains(g, "Disk).Flush") {
				waiting++
			}
		}
	}
	close(going)
	all.Wait()
	if host.flushes != 2 {
		t.Errorf("%d flushes of the library with %d calls that came during the first, want 2", host.flushes, calls)
	}
}
