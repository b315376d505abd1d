package sourcetest

import (
	"context"
	"io"
	"math"
	"os"
	"slices"
	"testing"

	"github.com/vddkcp/vddkcp/source"
)

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

// testMap tests the ability source.Mapped: it compares the mappings of the whole disk
// and of parts of it with the results of Extents and InFile.
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
