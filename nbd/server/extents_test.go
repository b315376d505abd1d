package server

import (
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// checkered is a disk of n extents of 4 KiB each, alternately data and zeros.
func checkered(n int) *sourcetest.Memory {
	var data []source.Extent
	for i := range int64(n / 2) {
		data = append(data, source.Extent{Off: 2 * i * 4096, Len: 4096})
	}
	return sourcetest.Pattern(int64(n)*4096, data...)
}

func TestExtents(t *testing.T) {
	const n = 3 * maxRuns
	d := checkered(n)
	var asked atomic.Int64
	d.OnExtent = func(e source.Extent) error {
		asked.Add(1)
		return nil
	}
	var mapped atomic.Int64
	x := newExtents(d, &mapped)
	check := func(off int64) {
		t.Helper()
		e, err := x.extentAt(t.Context(), off)
		kind := source.Data
		if off/4096%2 == 1 {
			kind = source.Zero
		}
		if err != nil || e.Off != off || e.End() != (off/4096+1)*4096 || e.Kind != kind {
			t.Fatalf("at %d: %+v, %v", off, e, err)
		}
	}
	if _, ok := x.cached(0); ok {
		t.Error("known before it was asked for")
	}
	random := rand.New(rand.NewPCG(1, 2))
	check(maxRuns * 4096) // the middle first, so that later queries end there
	for range 10_000 {
		check(random.Int64N(n * 4096))
	}
	// Each query ends where the cached extents begin, and returns a few more extents
	// than are cached.
	if got := asked.Load(); got > 4*n {
		t.Errorf("%d extents asked for, of %d", got, n)
	}
	before := asked.Load()
	for off := int64(0); off < n*4096; off += 1000 {
		check(off)
	}
	if asked.Load() != before {
		t.Error("what is known was asked for again")
	}
	if len(x.spans) < 3 || mapped.Load() < n*runSize {
		t.Errorf("%d spans, %d bytes", len(x.spans), mapped.Load())
	}

	// Only the written range must be queried again.
	x.invalidate(5*4096, 1)
	if _, ok := x.cached(5 * 4096); ok {
		t.Error("known after a write")
	}
	if _, ok := x.cached((n - 1) * 4096); !ok {
		t.Error("not known after a write elsewhere")
	}
	check(5 * 4096)
	x.clear()
	if mapped.Load() != 0 || len(x.spans) != 0 {
		t.Errorf("%d bytes, %d spans after all was dropped", mapped.Load(), len(x.spans))
	}
}

// TestExtentsChange writes during a query. The answer may be outdated and must not be cached.
func TestExtentsChange(t *testing.T) {
	d := checkered(100)
	var mapped atomic.Int64
	x := newExtents(d, &mapped)
	d.OnExtent = func(e source.Extent) error {
		if e.Off == 4096 {
			x.invalidate(90*4096, 1)
		}
		return nil
	}
	if e, err := x.extentAt(t.Context(), 0); err != nil || e.Len != 4096 {
		t.Errorf("%+v, %v", e, err)
	}
	if _, ok := x.cached(0); ok {
		t.Error("the old answer was kept")
	}
}

// TestExtentsBound queries more extents of two exports than the cache holds.
func TestExtentsBound(t *testing.T) {
	var mapped atomic.Int64
	const n = 2 * maxCacheBytes / runSize
	for _, x := range []*extents{newExtents(checkered(n), &mapped), newExtents(checkered(n), &mapped)} {
		for off := int64(0); off < n*4096; off += 1000 * 4096 {
			e, err := x.extentAt(t.Context(), off)
			if err != nil || e.Len != 4096 {
				t.Fatalf("at %d: %+v, %v", off, e, err)
			}
			if got := mapped.Load(); got > maxCacheBytes+2*(maxRuns*runSize+spanSize) {
				t.Fatalf("%d bytes", got)
			}
		}
		if _, ok := x.cached(0); ok {
			t.Error("the first is still known")
		}
		if _, ok := x.cached(n*4096 - 1); !ok {
			t.Error("the last is not known")
		}
	}
}

func TestExtentsFail(t *testing.T) {
	d := checkered(100)
	broken := errors.New("broken")
	d.OnExtent = func(source.Extent) error { return broken }
	var mapped atomic.Int64
	x := newExtents(d, &mapped)
	if _, err := x.extentAt(t.Context(), 0); !errors.Is(err, broken) {
		t.Errorf("%v", err)
	}
	d.OnExtent = nil
	if _, err := x.extentAt(t.Context(), 0); err != nil {
		t.Errorf("after an error: %v", err)
	}
}

// TestExtentsAtOnce makes many concurrent queries for the same extents, and writes meanwhile.
func TestExtentsAtOnce(t *testing.T) {
	d := checkered(1000)
	var asked, mapped atomic.Int64
	d.OnExtent = func(e source.Extent) error {
		if e.Off == 0 {
			asked.Add(1)
		}
		return nil
	}
	x := newExtents(d, &mapped)
	var all sync.WaitGroup
	for range 16 {
		all.Go(func() {
			if _, err := x.extentAt(t.Context(), 0); err != nil {
				t.Error(err)
			}
		})
	}
	all.Wait()
	if n := asked.Load(); n != 1 {
		t.Errorf("asked %d times, want once", n)
	}
	for g := range 4 {
		all.Go(func() {
			for i := range int64(1000) {
				off := i * 7919 % 1000 * 4096
				if g == 0 && i%10 == 0 {
					x.invalidate(off, 4096)
				}
				if e, err := x.extentAt(t.Context(), off); err != nil || e.Len != 4096 {
					t.Errorf("at %d: %+v, %v", off, e, err)
				}
			}
		})
	}
	all.Wait()
	x.clear()
	if mapped.Load() != 0 {
		t.Errorf("%d bytes left", mapped.Load())
	}
}
