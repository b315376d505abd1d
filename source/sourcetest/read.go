package sourcetest

import (
	"bytes"
	"fmt"
	"io"
	"math"
	"slices"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/vddkcp/vddkcp/source"
)

// The constant guard is the value of the bytes that follow a buffer in memory, and that belong
// to the capacity of the buffer but not to its length. A read into the buffer must not change
// these bytes.
const guard = 0xA5

// readAt reads n bytes at the given offset and compares them with the expected content. The
// whole range that is read must lie in the disk.
func (c Config) readAt(d source.Disk, off int64, n int) error {
	space := bytes.Repeat([]byte{guard}, n+64)
	got, err := d.ReadAt(space[:n], off)
	if err != nil && !(err == io.EOF && off+int64(n) == c.size()) {
		return fmt.Errorf("ReadAt [%d, %d) of %d: %d, %w", off, off+int64(n), c.size(), got, err)
	}
	if got != n {
		return fmt.Errorf("ReadAt [%d, %d) of %d: %d bytes, %v, want %d", off, off+int64(n), c.size(), got, err, n)
	}
	if err := differ(space[:n], c.Content[off:off+int64(n)], off); err != nil {
		return fmt.Errorf("ReadAt [%d, %d) of %d: %w", off, off+int64(n), c.size(), err)
	}
	for i, b := range space[n:] {
		if b != guard {
			return fmt.Errorf("ReadAt [%d, %d) wrote byte %d of the buffer's capacity", off, off+int64(n), n+i)
		}
	}
	return nil
}

// The function differ compares got, the bytes that were read, with want, the expected bytes. If
// the two are not equal, it returns an error that names the first different byte. The parameter
// off is the offset in the disk at which the bytes were read.
func differ(got, want []byte, off int64) error {
	if bytes.Equal(got, want) {
		return nil
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			return fmt.Errorf("byte %d is %#02x, want %#02x", off+int64(i), got[i], want[i])
		}
	}
	return fmt.Errorf("%d bytes at %d, want %d", len(got), off, len(want))
}

func testSize(t *testing.T, c Config) {
	if got := c.open(t).Size(); got != c.size() {
		t.Errorf("Size %d, want %d", got, c.size())
	}
}

func (c Config) readWhole(t *testing.T, d source.Disk) {
	t.Helper()
	for _, piece := range []int{1 << 20, len(c.Content)} {
		for off := 0; off < len(c.Content); off += piece {
			if err := c.readAt(d, int64(off), min(piece, len(c.Content)-off)); err != nil {
				t.Fatal(err)
			}
		}
	}
}

func testReadWhole(t *testing.T, c Config) { c.readWhole(t, c.open(t)) }

// The method borders returns offsets at which an implementation of Disk is likely to make
// mistakes: borders of sectors, grains and clusters, the middle and the end of the disk, and
// the borders of some of its extents. It also returns the offsets next to these.
func (c Config) borders(t *testing.T, d source.Disk) []int64 {
	t.Helper()
	at := []int64{0, 512, 4 << 10, 64 << 10, 128 << 10, 1 << 20, c.size() / 2, c.size() &^ 511, c.size()}
	extents := c.extents(t, d, 0, c.size())
	for i := 0; i < len(extents); i += 1 + len(extents)/16 {
		at = append(at, extents[i].Off, extents[i].End())
	}
	var all []int64
	for _, a := range at {
		for _, off := range []int64{a - 1, a, a + 1} {
			if off >= 0 && off <= c.size() {
				all = append(all, off)
			}
		}
	}
	slices.Sort(all)
	return slices.Compact(all)
}

func testReadBorders(t *testing.T, c Config) {
	d := c.open(t)
	for _, off := range c.borders(t, d) {
		for _, n := range []int64{0, 1, 2, 511, 512, 513, 4096, 65537} {
			if off == c.size() || off+n > c.size() {
				continue
			}
			if err := c.readAt(d, off, int(n)); err != nil {
				t.Error(err)
			}
		}
	}
}

func testReadEnd(t *testing.T, c Config) {
	d := c.open(t)
	for _, r := range []struct {
		off int64
		n   int
	}{
		{c.size() - 1, 2}, {c.size() - 1, 1000}, {c.size() - 700, 100000}, {c.size() &^ 511, 512}, {c.size() &^ 4095, 8192},
		{0, len(c.Content) + 1}, {c.size(), 1}, {c.size(), 5000}, {c.size() + 1, 1}, {c.size() + 1<<20, 512}, {math.MaxInt64 - 10, 100},
	} {
		want := max(c.size()-r.off, 0)
		if r.off < 0 || int64(r.n) <= want {
			continue
		}
		p := make([]byte, r.n)
		n, err := d.ReadAt(p, r.off)
		if int64(n) != want || err != io.EOF {
			t.Errorf("ReadAt(%d bytes, %d) of %d: %d, %v, want %d, io.EOF", r.n, r.off, c.size(), n, err, want)
			continue
		}
		if n > 0 {
			if err := differ(p[:n], c.Content[r.off:], r.off); err != nil {
				t.Errorf("ReadAt(%d bytes, %d) of %d: %v", r.n, r.off, c.size(), err)
			}
		}
	}
	for _, off := range []int64{-1, -512, math.MinInt64} {
		if n, err := d.ReadAt(make([]byte, 512), off); n != 0 || err == nil || err == io.EOF {
			t.Errorf("ReadAt(512 bytes, %d): %d, %v, want an error", off, n, err)
		}
	}
}

func testReadConcurrently(t *testing.T, c Config) {
	if c.size() == 0 {
		t.Skip("an empty disk")
	}
	d := c.open(t)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			r := c.random(uint64(g))
			for range 64 {
				off := r.Int64N(c.size())
				if err := c.readAt(d, off, int(min(1+r.Int64N(128<<10), c.size()-off))); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func testReader(t *testing.T, c Config) {
	d := c.open(t)
	off := c.size() / 3
	n := min(c.size()-off, 10_000) // few, because they are also read byte by byte
	if err := iotest.TestReader(io.NewSectionReader(d, off, n), c.Content[off:off+n]); err != nil {
		t.Error(err)
	}
	var whole bytes.Buffer
	if _, err := io.Copy(&whole, io.NewSectionReader(d, 0, d.Size())); err != nil {
		t.Error(err)
	} else if err := differ(whole.Bytes(), c.Content, 0); err != nil {
		t.Error(err)
	}
}
