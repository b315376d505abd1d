package sourcetest

import (
	"math"
	"slices"
	"testing"

	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/source"
)

// The method extents checks the extents that a disk reports for a range. It returns these
// extents after source.Covered has merged adjacent ones.
func (c Config) extents(t *testing.T, d source.Disk, off, length int64) []source.Extent {
	t.Helper()
	next := off
	for e, err := range d.Extents(t.Context(), off, length) {
		if err != nil {
			t.Fatalf("Extents(%d, %d): %v", off, length, err)
		}
		if e.Off != next || e.Len <= 0 || e.Len > off+length-next {
			t.Fatalf("Extents(%d, %d): %+v, want one that starts at %d, is not empty, and ends by %d", off, length, e, next, off+length)
		}
		if e.Kind > source.Inherited || e.Depth < 0 || e.Absent && e.Kind == source.Data {
			t.Fatalf("Extents(%d, %d): %+v is no valid extent", off, length, e)
		}
		next = e.End()
	}
	if next != off+length {
		t.Fatalf("Extents(%d, %d) end at %d", off, length, next)
	}
	var all []source.Extent
	for e, err := range source.Covered(t.Context(), d, off, length) {
		if err != nil {
			t.Fatalf("Covered(%d, %d): %v", off, length, err)
		}
		all = append(all, e)
	}
	return all
}

func testExtents(t *testing.T, c Config) {
	d := c.open(t)
	for _, e := range c.extents(t, d, 0, c.size()) {
		if e.Kind == source.Zero && !zero.Is(c.Content[e.Off:e.End()]) {
			t.Errorf("%+v is Zero, and the content is not", e)
		}
	}
	for _, off := range []int64{0, c.size() / 2, c.size()} {
		if got := c.extents(t, d, off, 0); len(got) != 0 {
			t.Errorf("Extents(%d, 0): %+v", off, got)
		}
	}
}

func testExtentsOfPart(t *testing.T, c Config) {
	if c.size() == 0 {
		t.Skip("an empty disk")
	}
	d := c.open(t)
	whole := c.extents(t, d, 0, c.size())
	check := func(off, length int64) {
		t.Helper()
		for _, e := range c.extents(t, d, off, length) {
			i, found := slices.BinarySearchFunc(whole, e.Off, func(w source.Extent, off int64) int {
				switch {
				case w.End() <= off:
					return -1
				case w.Off > off:
					return 1
				}
				return 0
			})
			if !found {
				t.Fatalf("no extent of the whole disk has %d", e.Off)
			}
			w := whole[i]
			if w.Kind != e.Kind || w.Depth != e.Depth || w.Absent != e.Absent || w.End() < e.End() {
				t.Fatalf("Extents(%d, %d): %+v, and of the whole disk %+v", off, length, e, w)
			}
		}
	}
	borders := c.borders(t, d)
	for i, off := range borders {
		for _, end := range []int64{off + 1, off + 512, borders[min(i+1, len(borders)-1)], borders[min(i+5, len(borders)-1)], c.size()} {
			if end > off && end <= c.size() {
				check(off, end-off)
			}
		}
	}
	r := c.random(99)
	for range 64 {
		off := r.Int64N(c.size())
		check(off, 1+r.Int64N(c.size()-off))
	}
}

func testExtentsBreak(t *testing.T, c Config) {
	d := c.open(t)
	for stop := 1; stop <= 4; stop++ {
		n := 0
		for e, err := range d.Extents(t.Context(), 0, c.size()) {
			if err != nil {
				t.Fatal(err)
			}
			// The body of the loop over the extents reads the disk, as a program that
			// copies the disk does.
			if err := c.readAt(d, e.Off, int(min(e.Len, 512))); err != nil {
				t.Fatal(err)
			}
			for _, err := range d.Extents(t.Context(), e.Off, e.Len) {
				if err != nil {
					t.Fatal(err)
				}
			}
			if n++; n == stop { // Go panics if the iterator continues after this
				break
			}
		}
	}
	// The loops over extents above have ended with break. Extents may have left a lock
	// locked in such a loop. Close must not wait for that lock.
	within(t, "Close after iterations that were left", func() {
		if err := d.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}

// testExtentsClose tests that Close can be called in the body of a loop over extents,
// and returns although the iteration has not ended.
func testExtentsClose(t *testing.T, c Config) {
	d := c.open(t)
	next, failed := int64(0), false
	for e, err := range d.Extents(t.Context(), 0, c.size()) {
		if failed {
			t.Fatalf("%+v, %v after an error", e, err)
		}
		if failed = err != nil; failed {
			continue
		}
		if e.Off != next {
			t.Fatalf("%+v, want one at %d", e, next)
		}
		next = e.End()
		within(t, "Close between two extents", func() { d.Close() })
	}
	if !failed && next != c.size() {
		t.Errorf("closed between two extents: they end at %d of %d without an error", next, c.size())
	}
}

func testExtentsOutside(t *testing.T, c Config) {
	d := c.open(t)
	for _, r := range []struct{ off, length int64 }{
		{-1, 1}, {-512, 1024}, {0, c.size() + 1}, {c.size(), 1}, {c.size() + 1, 0}, {c.size() + 512, 512},
		{0, -1}, {c.size(), -1}, {0, math.MaxInt64}, {math.MaxInt64, math.MaxInt64}, {1, math.MaxInt64}, {math.MinInt64, 1},
	} {
		if r.off == 1 && c.size() == 0 {
			continue
		}
		failed := false
		for e, err := range d.Extents(t.Context(), r.off, r.length) {
			if failed {
				t.Fatalf("Extents(%d, %d) of %d bytes: %+v, %v after an error", r.off, r.length, c.size(), e, err)
			}
			if failed = err != nil; !failed {
				t.Fatalf("Extents(%d, %d) of %d bytes: %+v, want an error", r.off, r.length, c.size(), e)
			}
		}
		if !failed {
			t.Errorf("Extents(%d, %d) of %d bytes: nothing, want an error", r.off, r.length, c.size())
		}
	}
}
