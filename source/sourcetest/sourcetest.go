// Package sourcetest holds what every source.Disk must pass, and disks in
// memory for the tests of what reads from one.
package sourcetest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/iotest"
	"time"

	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/source"
)

// Config is an implementation of source.Disk that is tested.
type Config struct {
	// Open opens the disk anew, to live under ctx. The suite closes it; what
	// else there is to remove is t.Cleanup's.
	Open func(ctx context.Context, t testing.TB) source.Disk
	// Content is what the disk must hold: at most 64 MiB, since it is read
	// several times over.
	Content []byte
}

// Run holds the disk against the contract of source.Disk and of the abilities
// that it has.
func Run(t *testing.T, c Config) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Config)
	}{
		{"Size", testSize},
		{"ReadWhole", testReadWhole},
		{"ReadBorders", testReadBorders},
		{"ReadEnd", testReadEnd},
		{"ReadConcurrently", testReadConcurrently},
		{"Reader", testReader},
		{"Extents", testExtents},
		{"ExtentsOfPart", testExtentsOfPart},
		{"ExtentsBreak", testExtentsBreak},
		{"ExtentsClose", testExtentsClose},
		{"ExtentsOutside", testExtentsOutside},
		{"Context", testContext},
		{"ContextOfExtents", testContextOfExtents},
		{"Close", testClose},
		{"CloseBesideCalls", testCloseBesideCalls},
		{"Identified", testIdentified},
		{"Described", testDescribed},
		{"InFile", testInFile},
		{"Map", testMap},
		{"Allocator", testAllocator},
		{"Uncached", testUncached},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, c) })
	}
}

// open opens the disk for one test.
func (c Config) open(t *testing.T) source.Disk {
	t.Helper()
	d := c.Open(t.Context(), t)
	t.Cleanup(func() { d.Close() })
	return d
}

func (c Config) size() int64 { return int64(len(c.Content)) }

func (c Config) random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 1)) }

// guard is what is around p while it is filled.
const guard = 0xA5

// readAt reads n bytes that lie in the disk, and compares them.
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

// differ returns an error that names the first difference; off is where the
// bytes lie in the disk.
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

// borders returns offsets in the disk at and beside what formats divide a disk
// by, its middle, its end, and the borders of some of its extents.
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
	n := min(c.size()-off, 10_000) // it is read byte by byte too
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

// extents returns what Extents yields for the range, checked by itself, and
// merged, checked by source.Covered too.
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
			// The body of the loop uses the disk, as a copy does.
			if err := c.readAt(d, e.Off, int(min(e.Len, 512))); err != nil {
				t.Fatal(err)
			}
			for _, err := range d.Extents(t.Context(), e.Off, e.Len) {
				if err != nil {
					t.Fatal(err)
				}
			}
			if n++; n == stop { // an iteration that goes on panics
				break
			}
		}
	}
	// Close would wait for ever for a lock that an iteration left.
	within(t, "Close after iterations that were left", func() {
		if err := d.Close(); err != nil {
			t.Errorf("Close: %v", err)
		}
	})
}

// Close does not wait for an iteration that is between two extents: whoever
// replaces a disk under it could wait for ever.
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

// within fails the test when do hangs. The contract says a second; the limit
// is far above it, so that a busy machine fails nothing.
func within(t *testing.T, what string, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s hangs", what)
	}
}

func testContext(t *testing.T, c Config) {
	ctx, cancel := context.WithCancelCause(t.Context())
	d := c.Open(ctx, t)
	defer d.Close()
	if c.size() > 0 {
		if err := c.readAt(d, 0, 1); err != nil {
			t.Fatal(err)
		}
	}
	// Readers that don't stop by themselves: each must end with the cause.
	why := errors.New("the operator said stop")
	var readers, running sync.WaitGroup
	for g := range 4 {
		running.Add(1)
		readers.Go(func() {
			r := c.random(uint64(g))
			for i := 0; ; i++ {
				if i == 1 || c.size() == 0 {
					running.Done()
				}
				if c.size() == 0 {
					return
				}
				off := r.Int64N(c.size())
				if err := c.readAt(d, off, int(min(64<<10, c.size()-off))); err != nil {
					if !errors.Is(err, why) {
						t.Errorf("a read while the context ends: %v, want its cause", err)
					}
					if i == 0 {
						running.Done()
					}
					return
				}
			}
		})
	}
	running.Wait()
	cancel(why)
	within(t, "reading after the context's end", readers.Wait)
	within(t, "ReadAt after the context's end", func() {
		if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, why) && c.size() > 0 {
			t.Errorf("ReadAt after the context's end: %v, want its cause", err)
		}
	})
	within(t, "Extents after the context's end", func() {
		if err := c.extentsError(d, t.Context()); !errors.Is(err, why) && c.size() > 0 {
			t.Errorf("Extents after the context's end: %v, want its cause", err)
		}
	})
	within(t, "Close after the context's end", func() { d.Close() })
}

// extentsError iterates over the whole disk and returns the error.
func (c Config) extentsError(d source.Disk, ctx context.Context) error {
	for _, err := range d.Extents(ctx, 0, c.size()) {
		if err != nil {
			return err
		}
	}
	return nil
}

func testContextOfExtents(t *testing.T, c Config) {
	if c.size() == 0 {
		t.Skip("an empty disk")
	}
	d := c.open(t)
	why := errors.New("only this iteration")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	// In mid-iteration: what comes is still right, or it is the cause.
	next, ended := int64(0), error(nil)
	for e, err := range d.Extents(ctx, 0, c.size()) {
		if ended != nil {
			t.Fatalf("%+v, %v after the error", e, err)
		}
		if ended = err; err != nil {
			continue
		}
		if e.Off != next {
			t.Fatalf("%+v, want one at %d", e, next)
		}
		next = e.End()
		cancel(why)
	}
	if ended == nil && next != c.size() || ended != nil && !errors.Is(ended, why) {
		t.Errorf("the context ended during Extents: at %d of %d, %v", next, c.size(), ended)
	}
	if err := c.extentsError(d, ctx); !errors.Is(err, why) {
		t.Errorf("Extents with a context that has ended: %v, want its cause", err)
	}
	if err := c.readAt(d, 0, 1); err != nil { // the disk lives on
		t.Error(err)
	}
	c.extents(t, d, 0, c.size())
}

func testClose(t *testing.T, c Config) {
	d := c.Open(t.Context(), t)
	if err := d.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	c.closed(t, d)
	_ = d.Close() // harmless or an error
	c.closed(t, d)
}

// closed checks that a closed disk says so.
func (c Config) closed(t *testing.T, d source.Disk) {
	t.Helper()
	if c.size() == 0 {
		return
	}
	if n, err := d.ReadAt(make([]byte, 1), 0); err == nil || err == io.EOF {
		t.Errorf("ReadAt after Close: %d, %v, want an error", n, err)
	}
	if err := c.extentsError(d, t.Context()); err == nil {
		t.Errorf("Extents after Close: no error")
	}
}

func testCloseBesideCalls(t *testing.T, c Config) {
	if c.size() == 0 {
		t.Skip("an empty disk")
	}
	d := c.Open(t.Context(), t)
	var wg, running sync.WaitGroup
	var closed atomic.Bool
	for g := range 8 {
		running.Add(1)
		wg.Go(func() {
			r := c.random(uint64(g))
			p := make([]byte, min(64<<10, c.size()))
			for i := 0; ; i++ {
				off := r.Int64N(c.size() - int64(len(p)) + 1)
				late := closed.Load()
				var err error
				if g == 0 {
					err = c.extentsError(d, t.Context())
				} else if _, err = d.ReadAt(p, off); err == nil || err == io.EOF {
					// What succeeded beside Close is whole all the same.
					if err = differ(p, c.Content[off:off+int64(len(p))], off); err != nil {
						t.Errorf("a read beside Close: %v", err)
					}
				}
				if i == 0 {
					running.Done()
				}
				if err == nil && late {
					t.Error("a call that began after Close succeeded")
				}
				if err != nil || late {
					return
				}
			}
		})
	}
	running.Wait()
	within(t, "Close beside reads", func() {
		if err := d.Close(); err != nil {
			t.Errorf("Close beside reads: %v", err)
		}
	})
	closed.Store(true)
	within(t, "reading a closed disk", wg.Wait)
	c.closed(t, d)
}

func testIdentified(t *testing.T, c Config) {
	d := c.open(t)
	i, ok := source.Ability[source.Identified](d)
	if !ok {
		t.Skip("it is not Identified")
	}
	id, proof, err := i.Identity(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Contains([]string{"snapshot", "mtime", "none"}, proof) {
		t.Errorf("proof %q", proof)
	}
	c.readWhole(t, d)
	if id2, proof2, err := i.Identity(t.Context()); err != nil || id2 != id || proof2 != proof {
		t.Errorf("Identity %q, %q, and after reading %q, %q, %v", id, proof, id2, proof2, err)
	}
}

func testDescribed(t *testing.T, c Config) {
	d, ok := source.Ability[source.Described](c.open(t))
	if !ok {
		t.Skip("it is not Described")
	}
	info := d.Info()
	if info.Format == "" || info.Allocated < 0 || info.LogicalSector < 0 || info.ClusterSize < 0 {
		t.Errorf("Info: %+v", info)
	}
}

func testInFile(t *testing.T, c Config) {
	d := c.open(t)
	f, ok := source.Ability[source.InFile](d)
	if !ok {
		t.Skip("it is not InFile")
	}
	for _, off := range []int64{-1, c.size(), c.size() + 1, math.MaxInt64} {
		if file, pos, n, ok := f.InFile(off); ok {
			t.Errorf("InFile(%d) of %d bytes: %v, %d, %d", off, c.size(), file, pos, n)
		}
	}
	check := func(off int64) (n int64) {
		file, pos, n, ok := f.InFile(off)
		if !ok {
			return 0
		}
		if n <= 0 || n > c.size()-off {
			t.Fatalf("InFile(%d) of %d bytes: %d bytes", off, c.size(), n)
		}
		p := make([]byte, n)
		if _, err := file.ReadAt(p, pos); err != nil && err != io.EOF {
			t.Fatalf("InFile(%d), at %d in %s: %v", off, pos, file.Name(), err)
		}
		if err := differ(p, c.Content[off:off+n], off); err != nil {
			t.Fatalf("InFile(%d), at %d in %s: %v", off, pos, file.Name(), err)
		}
		return n
	}
	for off := int64(0); off < c.size(); {
		off += max(check(off), 512)
	}
	for _, off := range c.borders(t, d) {
		check(off)
	}
}

// testMap holds the map against Extents and InFile, as a whole and in parts.
func testMap(t *testing.T, c Config) {
	d := c.open(t)
	files, _ := source.Ability[source.InFile](d)
	inFile := func(off int64) (f *os.File, pos int64) {
		if files != nil {
			f, pos, _, _ = files.InFile(off)
		}
		return f, pos
	}
	check := func(off, length int64) {
		var merged []source.Extent
		for m, err := range source.Map(t.Context(), d, off, length) {
			if err != nil {
				t.Fatalf("Map of [%d, %d): %v", off, off+length, err)
			}
			if n := len(merged); n > 0 && merged[n-1].Kind == m.Kind && merged[n-1].Depth == m.Depth && merged[n-1].Absent == m.Absent {
				merged[n-1].Len += m.Len
			} else {
				merged = append(merged, m.Extent)
			}
			for _, at := range []int64{m.Off, m.Off + m.Len/2, m.End() - 1} {
				f, pos := inFile(at)
				if f != m.File || f != nil && pos != m.Pos+at-m.Off {
					t.Fatalf("Map of [%d, %d): %+v; InFile(%d) is %v, %d", off, off+length, m, at, f, pos)
				}
			}
			if m.File == nil {
				continue
			}
			p := make([]byte, m.Len)
			if _, err := m.File.ReadAt(p, m.Pos); err != nil && err != io.EOF {
				t.Fatalf("%+v: %v", m, err)
			}
			if err := differ(p, c.Content[m.Off:m.End()], m.Off); err != nil {
				t.Fatalf("%+v: %v", m, err)
			}
		}
		var want []source.Extent
		for e, err := range source.Covered(t.Context(), d, off, length) {
			if err != nil {
				t.Fatal(err)
			}
			want = append(want, e)
		}
		if !slices.Equal(merged, want) {
			t.Fatalf("Map of [%d, %d) has the extents %v, want %v", off, off+length, merged, want)
		}
	}
	check(0, c.size())
	borders := c.borders(t, d)
	for i, off := range borders {
		for _, end := range []int64{off, off + 1, borders[(i+1)%len(borders)], borders[(i*7+3)%len(borders)]} {
			if off <= end && end <= c.size() {
				check(off, end-off)
			}
		}
	}
	for _, r := range [][2]int64{{-1, 1}, {0, c.size() + 1}, {c.size(), 1}, {1, math.MaxInt64}} {
		for m, err := range source.Map(t.Context(), d, r[0], r[1]) {
			if err == nil {
				t.Errorf("Map of %d bytes at %d of %d: %+v", r[1], r[0], c.size(), m)
			}
			break
		}
	}
}

func testAllocator(t *testing.T, c Config) {
	d := c.open(t)
	a, ok := source.Ability[source.Allocator](d)
	if !ok {
		t.Skip("it is not an Allocator")
	}
	for _, n := range []int{1, 4096, 1 << 20} {
		n = min(n, len(c.Content))
		b, free, err := a.Buffer(t.Context(), n)
		if err != nil || len(b) != n {
			t.Fatalf("Buffer(%d): %d bytes, %v", n, len(b), err)
		}
		if _, err := d.ReadAt(b, 0); err != nil && err != io.EOF {
			t.Fatal(err)
		}
		if err := differ(b, c.Content[:n], 0); err != nil {
			t.Errorf("ReadAt into Buffer(%d): %v", n, err)
		}
		free()
	}
	b, free, err := a.Buffer(t.Context(), min(4096, len(c.Content)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := d.ReadAt(b, 0); err != nil && err != io.EOF {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if err := differ(b, c.Content[:len(b)], 0); err != nil {
		t.Errorf("a Buffer after Close: %v", err)
	}
	free()
}

func testUncached(t *testing.T, c Config) {
	d := c.open(t)
	u, ok := source.Ability[source.Uncached](d)
	if !ok {
		t.Skip("it is not Uncached")
	}
	u.ReadUncached()
	c.readWhole(t, d)
	testReadEnd(t, Config{Open: func(context.Context, testing.TB) source.Disk { return d }, Content: c.Content})
}
