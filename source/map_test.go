package source_test

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// mapped is a disk that is source.Mapped.
type mapped struct {
	source.Disk
	all []source.Mapping
	err error // yielded at the end
}

func (d *mapped) Map(context.Context, int64, int64) iter.Seq2[source.Mapping, error] {
	return func(yield func(source.Mapping, error) bool) {
		for _, m := range d.all {
			if !yield(m, nil) {
				return
			}
		}
		if d.err != nil {
			yield(source.Mapping{}, d.err)
		}
	}
}

// inFiles is a disk that is source.InFile, for at most two bytes at a time.
type inFiles struct {
	source.Disk
	place func(off int64) (f *os.File, pos int64)
}

func (d *inFiles) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	f, pos = d.place(off)
	return f, pos, 2, f != nil
}

func mapOf(d source.Disk, off, length int64) (all []source.Mapping, err error) {
	for m, err := range source.Map(context.Background(), d, off, length) {
		if err != nil {
			return all, err
		}
		all = append(all, m)
	}
	return all, nil
}

func extent(off, n int64, kind source.Kind) source.Extent {
	return source.Extent{Off: off, Len: n, Kind: kind}
}

func TestMapMerges(t *testing.T) {
	a, b := new(os.File), new(os.File)
	at := func(off, n int64, f *os.File, pos int64) source.Mapping {
		return source.Mapping{Extent: extent(off, n, source.Data), File: f, Pos: pos}
	}
	for _, c := range []struct {
		name string
		all  []source.Mapping
		want []source.Mapping
	}{
		{"goes on", []source.Mapping{at(0, 4, a, 7), at(4, 6, a, 11)}, []source.Mapping{at(0, 10, a, 7)}},
		{"jumps", []source.Mapping{at(0, 4, a, 7), at(4, 6, a, 12)}, nil},
		{"goes back", []source.Mapping{at(0, 4, a, 7), at(4, 6, a, 7)}, nil},
		{"another file", []source.Mapping{at(0, 4, a, 7), at(4, 6, b, 11)}, nil},
		{"in no file", []source.Mapping{at(0, 4, nil, 0), at(4, 6, nil, 0)}, []source.Mapping{at(0, 10, nil, 0)}},
		{"no more in a file", []source.Mapping{at(0, 4, a, 7), at(4, 6, nil, 0)}, nil},
		{"another kind", []source.Mapping{at(0, 4, nil, 0), {Extent: extent(4, 6, source.Zero)}}, nil},
		{"another depth", []source.Mapping{at(0, 4, nil, 0), {Extent: source.Extent{Off: 4, Len: 6, Depth: 1}}}, nil},
		{"absent", []source.Mapping{{Extent: extent(0, 4, source.Zero)}, {Extent: source.Extent{Off: 4, Len: 6, Kind: source.Zero, Absent: true}}}, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			if c.want == nil {
				c.want = c.all
			}
			got, err := mapOf(&mapped{Disk: &sourcetest.Memory{Bytes: make([]byte, 10)}, all: c.all}, 0, 10)
			if err != nil || !slices.Equal(got, c.want) {
				t.Errorf("%v, %v; want %v", got, err, c.want)
			}
		})
	}
}

func TestMapChecksTheCover(t *testing.T) {
	of := func(extents ...source.Extent) (all []source.Mapping) {
		for _, e := range extents {
			all = append(all, source.Mapping{Extent: e})
		}
		return all
	}
	for name, all := range map[string][]source.Mapping{
		"nothing":   nil,
		"early end": of(extent(0, 9, source.Data)),
		"late":      of(extent(1, 9, source.Data)),
		"gap":       of(extent(0, 4, source.Data), extent(5, 5, source.Data)),
		"overlap":   of(extent(0, 4, source.Data), extent(3, 7, source.Data)),
		"empty":     of(extent(0, 0, source.Data), extent(0, 10, source.Data)),
		"too long":  of(extent(0, 11, source.Data)),
	} {
		if got, err := mapOf(&mapped{Disk: &sourcetest.Memory{Bytes: make([]byte, 10)}, all: all}, 0, 10); err == nil {
			t.Errorf("%s: no error, %v", name, got)
		}
	}
	broken := errors.New("broken")
	if _, err := mapOf(&mapped{Disk: &sourcetest.Memory{Bytes: make([]byte, 10)}, all: of(extent(0, 5, source.Data)), err: broken}, 0, 10); !errors.Is(err, broken) {
		t.Errorf("error %v, want %v", err, broken)
	}
}

// TestMapByInFile maps a disk that has only Extents and InFile.
func TestMapByInFile(t *testing.T) {
	a := new(os.File)
	memory := &sourcetest.Memory{Bytes: make([]byte, 30), ExtentList: []source.Extent{
		extent(0, 10, source.Data), extent(10, 5, source.Zero), {Off: 15, Len: 5, Kind: source.Zero, Absent: true}, extent(20, 5, source.Inherited), extent(25, 5, source.Data),
	}}
	d := &inFiles{memory, func(off int64) (*os.File, int64) {
		switch {
		case off < 6:
			return a, 100 + off
		case off < 25:
			return a, 200 + off
		}
		return nil, 0
	}}
	got, err := mapOf(d, 1, 28)
	if err != nil {
		t.Fatal(err)
	}
	var s strings.Builder
	for _, m := range got {
		fmt.Fprintf(&s, "%d+%d %v %v at %d; ", m.Off, m.Len, m.Kind, m.File != nil, m.Pos)
	}
	// InFile answers for two bytes at a time, here from 1 on, so that one of its
	// answers is for the bytes from 5 to 7, across the border of an extent.
	if want := "1+6 data true at 101; 7+3 data true at 207; 10+5 zero true at 210; 15+5 zero false at 0; 20+5 same false at 0; 25+4 data false at 0; "; s.String() != want {
		t.Errorf("%s\nwant %s", s.String(), want)
	}
	if _, err := mapOf(d, 20, 11); err == nil {
		t.Error("past the end: no error")
	}
}

// TestMapAllTellsHowFarItIs tests that the map of a whole disk does not depend on the
// windows in which it is read, and that progress is reported before the first mapping
// is.
func TestMapAllTellsHowFarItIs(t *testing.T) {
	const size = 16 << 40
	d := &sourcetest.Memory{Content: strings.NewReader(""), Length: size, ExtentList: []source.Extent{
		extent(0, 10<<40, source.Data), extent(10<<40, 4096, source.Zero), extent(10<<40+4096, size-10<<40-4096, source.Data),
	}}
	want, err := mapOf(d, 0, size)
	if err != nil {
		t.Fatal(err)
	}
	var told []int64
	var got []source.Mapping
	for m, err := range source.MapAll(t.Context(), d, func(n int64) { told = append(told, n) }) {
		if err != nil {
			t.Fatal(err)
		}
		if len(got) == 0 && len(told) < 10 {
			t.Errorf("told %d times before the first mapping, of 10 TiB", len(told))
		}
		got = append(got, m)
	}
	if !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if len(told) < 100 || len(told) > 2000 || !slices.IsSorted(told) || told[len(told)-1] != size {
		t.Errorf("told %d times, at last %d", len(told), told[len(told)-1])
	}
}

func TestWindows(t *testing.T) {
	for _, size := range []int64{0, 1, 64 << 30, 64<<30 + 1, 1 << 45, 1<<62 - 512} {
		next, n := int64(0), 0
		for off, length := range source.Windows(size) {
			if off != next || length <= 0 {
				t.Fatalf("%d bytes: [%d, +%d) after %d", size, off, length, next)
			}
			next = off + length
			n++
		}
		if next != size || n > 2048 {
			t.Errorf("%d bytes: %d windows, up to %d", size, n, next)
		}
	}
}
