package allocation

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
)

// runs lists the runs of a map: "h" or "d", for hole or data, and the number of chunks.
func runs(a *Map) string {
	var s strings.Builder
	for c := uint32(0); c < a.chunks; {
		allocated, end := a.Run(c)
		if end <= c || end > a.chunks {
			return fmt.Sprintf("%s then [%d, %d)", s.String(), c, end)
		}
		kind := "h"
		if allocated {
			kind = "d"
		}
		fmt.Fprintf(&s, "%s%d ", kind, end-c)
		c = end
	}
	return strings.TrimSpace(s.String())
}

func TestAllocation(t *testing.T) {
	const first = 1 << 20 // sector
	for _, test := range []struct {
		name   string
		blocks [][2]uint64 // sectors, from first
		want   string      // of 8 chunks; "": an error
	}{
		{"nothing", nil, "h8"},
		{"all", [][2]uint64{{0, 1024}}, "d8"},
		{"the first", [][2]uint64{{0, 128}}, "d1 h7"},
		{"the last", [][2]uint64{{896, 128}}, "h7 d1"},
		{"two", [][2]uint64{{128, 128}, {512, 256}}, "h1 d1 h2 d2 h2"},
		{"touching", [][2]uint64{{128, 128}, {256, 256}}, "h1 d3 h4"},
		{"parts of chunks", [][2]uint64{{130, 1}, {300, 300}}, "h1 d4 h3"},
		{"two in one chunk", [][2]uint64{{130, 1}, {140, 1}}, "h1 d1 h6"},
		{"empty block", [][2]uint64{{128, 0}}, ""},
		{"descending", [][2]uint64{{256, 128}, {128, 128}}, ""},
		{"overlapping", [][2]uint64{{128, 256}, {256, 128}}, ""},
		{"past the end", [][2]uint64{{896, 129}}, ""},
		{"before the start", [][2]uint64{{^uint64(0) - 127, 128}}, ""},
		{"overflowing", [][2]uint64{{128, ^uint64(0) - 100}}, ""},
	} {
		var blocks []Block
		for _, b := range test.blocks {
			blocks = append(blocks, Block{Start: first + b[0], Count: b[1]})
		}
		a, err := New(first, 8, 128, blocks)
		if (err != nil) != (test.want == "") {
			t.Errorf("%s: %v", test.name, err)
			continue
		}
		if err != nil {
			continue
		}
		if got := runs(a); got != test.want {
			t.Errorf("%s: %s, want %s", test.name, got, test.want)
		}
		if a.bits == nil { // check the other form of the same map, too
			a.bits = make([]uint64, 1)
			for i := 0; i < len(a.borders); i += 2 {
				a.setBits(a.borders[i], a.borders[i+1])
			}
			if got := runs(a); got != test.want {
				t.Errorf("%s as bits: %s, want %s", test.name, got, test.want)
			}
		}
	}
}

// Both forms of a map give the same answers, and no map takes much more than a bit for each
// chunk.
func TestAllocationForms(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, density := range []int{2, 3, 40, 10000} {
		var blocks []Block
		want := make([]bool, 100_000)
		for c := 0; c < len(want); c++ {
			if r.IntN(density) == 0 {
				blocks = append(blocks, Block{Start: uint64(c) * 128, Count: 128})
				want[c] = true
			}
		}
		a, err := New(0, uint32(len(want)), 128, blocks)
		if err != nil {
			t.Fatal(err)
		}
		if limit := len(want)/8 + 200; a.bytes() > limit {
			t.Errorf("density %d: %d bytes", density, a.bytes())
		}
		for c := 0; c < len(want); c += 1 + r.IntN(3) {
			got, end := a.Run(uint32(c))
			to := c
			for to < len(want) && want[to] == want[c] {
				to++
			}
			if got != want[c] || int(end) != to {
				t.Fatalf("density %d, chunk %d: %v until %d, want %v until %d", density, c, got, end, want[c], to)
			}
		}
	}
}

func TestWindows(t *testing.T) {
	w := NewWindows(1000)
	a, _ := New(0, 8, 128, nil)
	for n := range int64(100) {
		w.Put(n, a)
		w.Get(0) // window 0 is always one of the last used
	}
	if w.Get(0) == nil || w.Get(99) == nil || w.Get(50) != nil || w.bytes > 1000 {
		t.Errorf("%d bytes", w.bytes)
	}
}
