package transfer

import (
	"cmp"
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
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// The tables write parts as "data 0-10, zero 10-20, same 20-30, file 30-40@5", where
// the last one is data that lies in a file from position 5 on.

// parseParts returns an iterator over the parts in a text.
func parseParts(t *testing.T, text string, file *os.File) iter.Seq2[part, error] {
	t.Helper()
	var parts []part
	for s := range strings.SplitSeq(text, ", ") {
		if s == "" {
			continue
		}
		var kind string
		var end int64
		var p part
		s, pos, _ := strings.Cut(s, "@")
		if _, err := fmt.Sscanf(s, "%s %d-%d", &kind, &p.Off, &end); err != nil {
			t.Fatalf("%q: %v", s, err)
		}
		p.Len = end - p.Off
		p.Kind = map[string]source.Kind{"zero": source.Zero, "same": source.Inherited}[kind]
		if kind == "file" {
			p.file = file
			fmt.Sscan(pos, &p.pos)
		}
		parts = append(parts, p)
	}
	return func(yield func(part, error) bool) {
		for _, p := range parts {
			if !yield(p, nil) {
				return
			}
		}
	}
}

// parseExtents is parseParts without files.
func parseExtents(t *testing.T, text string) iter.Seq2[source.Extent, error] {
	t.Helper()
	return func(yield func(source.Extent, error) bool) {
		for p := range parseParts(t, text, nil) {
			if !yield(p.Extent, nil) {
				return
			}
		}
	}
}

// formatParts returns the text of parts.
func formatParts(t *testing.T, parts iter.Seq2[part, error]) string {
	t.Helper()
	var b []string
	for p, err := range parts {
		if err != nil {
			t.Fatal(err)
		}
		s := fmt.Sprintf("%s %d-%d", p.Kind, p.Off, p.End())
		if p.file != nil {
			s = fmt.Sprintf("file %d-%d@%d", p.Off, p.End(), p.pos)
		}
		b = append(b, s)
	}
	return strings.Join(b, ", ")
}

// formatExtents returns the text of extents.
func formatExtents(t *testing.T, extents iter.Seq2[source.Extent, error]) string {
	t.Helper()
	return formatParts(t, asParts(extents))
}

// planOf returns the plan of a disk with the extents, and the disk.
func planOf(t *testing.T, text string) (*Plan, source.Disk) {
	t.Helper()
	src := &sourcetest.Memory{}
	for e := range parseExtents(t, text) {
		src.ExtentList = append(src.ExtentList, e)
		src.Bytes = append(src.Bytes, make([]byte, e.Len)...)
	}
	p, err := NewPlan(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	return p, src
}

// counted returns the parts, and adds their idle bytes to idle.
func counted(idle *int64, parts iter.Seq2[part, error]) iter.Seq2[part, error] {
	return func(yield func(part, error) bool) {
		for p, err := range parts {
			*idle += p.idle
			if !yield(p, err) {
				return
			}
		}
	}
}

func TestPlanned(t *testing.T) {
	const disk = "data 0-10, zero 10-30, same 30-40, data 40-60"
	for _, c := range []struct {
		name             string
		start            int64
		overFrom, overTo int64
		zeroed           bool
		want             string
		free             int64 // bytes that the iterator counts as done
	}{
		{name: "all", want: disk},
		{name: "from a border", start: 30, want: "same 30-40, data 40-60"},
		{name: "from the middle of an extent", start: 15, want: "zero 15-30, same 30-40, data 40-60"},
		{name: "from the end", start: 60, want: ""},
		{name: "work of an earlier run", start: 45, overTo: 45, want: "data 45-60", free: 10 + 20 + 5},
		{name: "zeroed work of an earlier run", start: 45, overTo: 45, zeroed: true, want: "data 45-60", free: 10 + 5},
		{name: "part of the work of an earlier run", start: 45, overFrom: 20, overTo: 45, want: "data 45-60", free: 10 + 5},
	} {
		plan, src := planOf(t, disk)
		counters := new(progress.Counters)
		cut := &cutter{plan: plan, src: src, counters: counters, start: c.start, overFrom: c.overFrom, overTo: c.overTo, known: plan.Size, zerosWork: !c.zeroed}
		if got := formatExtents(t, cut.planned(t.Context())); got != c.want {
			t.Errorf("%s: %s\nwant: %s", c.name, got, c.want)
		}
		if s := counters.Snapshot(); s.Done != c.free || s.Late != c.free || s.Planned != 0 || s.Skipped != 0 {
			t.Errorf("%s: %d bytes are done, %d of them late, planned were %d and skipped %d; want %d done", c.name, s.Done, s.Late, s.Planned, s.Skipped, c.free)
		}
	}
}

func TestUnits(t *testing.T) {
	for _, c := range []struct {
		name, in, want string
		start          int64
		zeroed         bool
		known          int64 // 0: all
		idle           int64 // bytes in data that were not planned as work
	}{
		{name: "at borders", in: "data 0-16, zero 16-32, same 32-40", want: "data 0-16, zero 16-32, same 32-40"},
		{name: "short last unit", in: "data 0-16, zero 16-37", want: "data 0-16, zero 16-37"},
		{name: "data ends in a unit", in: "data 0-11, zero 11-24", want: "data 0-8, data 8-16, zero 16-24"},
		{name: "data ends in a unit, zeroed", in: "data 0-11, zero 11-24", zeroed: true, want: "data 0-8, data 8-16, zero 16-24", idle: 5},
		{name: "inherited ends in a unit", in: "same 0-11, data 11-24", want: "same 0-8, data 8-16, data 16-24", idle: 3},
		{name: "several in one unit", in: "same 0-9, zero 9-11, same 11-13, data 13-14, same 14-24", want: "same 0-8, data 8-16, same 16-24", idle: 5},
		{name: "several in the last unit", in: "same 0-9, zero 9-11, same 11-13", want: "same 0-8, data 8-13", idle: 3},
		{name: "not known", in: "same 0-9, zero 9-11, data 11-24", zeroed: true, known: 10, want: "same 0-8, data 8-16, data 16-24", idle: 2},
		{name: "from the middle", start: 8, in: "zero 8-12, data 12-24", want: "data 8-16, data 16-24"},
		{name: "none", in: "", want: ""},
	} {
		end := int64(0)
		for e := range parseExtents(t, c.in) {
			end = e.End()
		}
		cut := &cutter{plan: &Plan{Size: end}, unit: 8, start: c.start, known: cmp.Or(c.known, end), zerosWork: !c.zeroed}
		idle := int64(0)
		if got := formatParts(t, counted(&idle, cut.units(parseExtents(t, c.in)))); got != c.want {
			t.Errorf("%s: %s\nwant: %s", c.name, got, c.want)
		}
		if idle != c.idle {
			t.Errorf("%s: %d bytes of data were not planned as work, want %d", c.name, idle, c.idle)
		}
	}
}

// inFile is a disk whose bytes lie at the same position in a file, except every
// second 100000 bytes.
type inFile struct {
	source.Disk
	file *os.File
}

func (d inFile) InFile(off int64) (*os.File, int64, int64, bool) {
	const n = 100_000
	return d.file, off, n - off%n, off/n%2 == 0
}

func TestSharedParts(t *testing.T) {
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	s, err := newSharer(inFile{file: file}, func(*os.File) int64 { return 4096 }, ReflinkAuto)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ in, want string }{
		{"zero 0-1000, same 1000-2000", "zero 0-1000, same 1000-2000"},
		{"data 0-98304", "file 0-98304@0"},
		{"data 10-100000", "data 10-4096, file 4096-98304@4096, data 98304-100000"},
		{"data 0-20000", "data 0-20000"}, // too short to share
		{"data 90000-150000", "data 90000-100000, data 100000-131072, data 131072-150000"},
	} {
		if got := formatParts(t, s.parts(parseParts(t, c.in, nil))); got != c.want {
			t.Errorf("%s: %s\nwant: %s", c.in, got, c.want)
		}
	}
}

func TestJoined(t *testing.T) {
	for _, c := range []struct {
		name, in, want    string
		keepZeros, zeroed bool
		idle              int64 // bytes in data that were not planned as work
	}{
		{name: "short hole", in: "data 0-100, zero 100-200, data 200-300", want: "data 0-100, data 100-200, data 200-300"},
		{name: "short hole, zeroed", in: "data 0-100, zero 100-200, data 200-300", zeroed: true, want: "data 0-100, data 100-200, data 200-300", idle: 100},
		{name: "zeros are kept", in: "data 0-100, zero 100-200, data 200-300", keepZeros: true, want: "data 0-100, zero 100-200, data 200-300"},
		{name: "long hole", in: "data 0-100, zero 100-32869, data 32869-40000", want: "data 0-100, zero 100-32869, data 32869-40000"},
		{name: "longest hole", in: "data 0-100, zero 100-32868, data 32868-40000", want: "data 0-100, data 100-32868, data 32868-40000"},
		{name: "two requests", in: "data 0-65000, zero 65000-66000, data 66000-67000", want: "data 0-65000, zero 65000-66000, data 66000-67000"},
		{name: "hole ends the request", in: "data 0-65000, zero 65000-65536, data 65536-67000", want: "data 0-65000, zero 65000-65536, data 65536-67000"},
		{name: "hole begins a request", in: "data 0-65536, zero 65536-66000, data 66000-67000", want: "data 0-65536, zero 65536-66000, data 66000-67000"},
		{name: "at the end", in: "data 0-100, zero 100-200", want: "data 0-100, zero 100-200"},
		{name: "at the start", in: "zero 0-100, data 100-200", want: "zero 0-100, data 100-200"},
		{name: "two holes", in: "data 0-100, zero 100-200, zero 200-300, data 300-400", want: "data 0-100, zero 100-200, zero 200-300, data 300-400"},
		{name: "several", in: "data 0-100, zero 100-200, data 200-300, zero 300-400, data 400-500", want: "data 0-100, data 100-200, data 200-300, data 300-400, data 400-500"},
		{name: "inherited", in: "data 0-100, same 100-200, data 200-300", want: "data 0-100, same 100-200, data 200-300"},
		{name: "before a shared part", in: "data 0-100, zero 100-200, file 200-300@7", want: "data 0-100, zero 100-200, file 200-300@7"},
		{name: "after a shared part", in: "file 0-100@7, zero 100-200, data 200-300", want: "file 0-100@7, zero 100-200, data 200-300"},
	} {
		cut := &cutter{known: 1 << 20, request: 64 << 10, keepZeros: c.keepZeros, zerosWork: !c.zeroed}
		idle := int64(0)
		if got := formatParts(t, counted(&idle, cut.joined(parseParts(t, c.in, os.Stdin)))); got != c.want {
			t.Errorf("%s: %s\nwant: %s", c.name, got, c.want)
		}
		if idle != c.idle {
			t.Errorf("%s: %d bytes of data were not planned as work, want %d", c.name, idle, c.idle)
		}
	}
}

func TestCut(t *testing.T) {
	for _, c := range []struct {
		name, in, want     string
		zeroed, readShared bool
	}{
		{name: "one request", in: "data 0-100", want: "data 0-100"},
		{name: "several requests", in: "data 10-250", want: "data 10-100, data 100-200, data 200-250"},
		{name: "touching data", in: "data 0-30, data 30-50, data 50-130, data 130-140", want: "data 0-100, data 100-140"},
		{name: "data between others", in: "zero 0-30, data 30-40, data 40-50, same 50-200, data 200-300", want: "zero 0-30, data 30-50, same 50-200, data 200-300"},
		{name: "long hole", in: "zero 5-300000005", want: "zero 5-134217733, zero 134217733-268435461, zero 268435461-300000005"},
		{name: "long inherited range", in: "same 0-300000000", want: "same 0-134217728, same 134217728-268435456, same 268435456-300000000"},
		{name: "long hole, zeroed", in: "zero 5-300000005", zeroed: true, want: "zero 5-300000005"},
		{name: "shared", in: "data 0-10, file 10-100000010@4, data 100000010-100000020", want: "data 0-10, file 10-67108874@4, file 67108874-100000010@67108868, data 100000010-100000020"},
		{name: "shared and read", in: "file 10-250@4", readShared: true, want: "file 10-100@4, file 100-200@94, file 200-250@194"},
		{name: "none", in: "", want: ""},
	} {
		cut := &cutter{request: 100, zeroed: c.zeroed, readShared: c.readShared}
		if got := formatParts(t, cut.cut(parseParts(t, c.in, os.Stdin))); got != c.want {
			t.Errorf("%s: %s\nwant: %s", c.name, got, c.want)
		}
	}
}

// TestPartsEnd checks that the iterators pass an error on as the last value, and end
// when their consumer stops after any number of parts.
func TestPartsEnd(t *testing.T) {
	const disk = "data 0-100, zero 100-200, data 200-300, same 300-1000, zero 1000-1100"
	plan, src := planOf(t, disk)
	cut := &cutter{plan: plan, src: src, counters: new(progress.Counters), unit: 8, request: 64}
	all := 0
	for range cut.parts(t.Context()) {
		all++
	}
	for stop := range all {
		n := 0
		for range cut.parts(t.Context()) {
			if n == stop {
				break
			}
			n++
		}
	}

	errBroken := errors.New("broken")
	plan.cache, plan.cachedTo = plan.cache[:2], 200
	cut.src = &sourcetest.Memory{Bytes: make([]byte, plan.Size), OnExtent: func(source.Extent) error { return errBroken }}
	var errs []error
	for _, err := range cut.parts(context.Background()) {
		errs = append(errs, err)
	}
	if n := len(errs); n == 0 || !errors.Is(errs[n-1], errBroken) || slices.ContainsFunc(errs[:n-1], func(err error) bool { return err != nil }) {
		t.Errorf("%v", errs)
	}
}
