package cow

import (
	"sync"
	"sync/atomic"
	"testing"
)

// TestRunBesideWrites checks that run never returns 0 blocks when the state of the
// first block changes at the same time: the reader would not move forward.
func TestRunBesideWrites(t *testing.T) {
	p := new(page)
	tab := &table{pages: make([]atomic.Pointer[page], 1), onFile: new(page)}
	tab.pages[0].Store(p)
	var wg sync.WaitGroup
	var done atomic.Bool
	wg.Go(func() {
		for !done.Load() {
			p.set(3, 2, present)
			p.set(3, 2, zeroed)
		}
	})
	defer wg.Wait()
	defer done.Store(true)
	for range 1_000_000 {
		state, same, err := tab.run(3, 2)
		if err != nil || same < 1 || same > 2 || state != present && state != zeroed && state != absent {
			t.Fatalf("run beside writes: state %d of %d blocks, %v", state, same, err)
		}
	}
}
