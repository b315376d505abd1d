package image_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/image"
)

func TestPlaces(t *testing.T) {
	p, err := image.NewPlaces([]int64{5000, 1000, 2000, 3000, 9000, 9500, 20000, 20000, 21500}, 1000)
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct{ start, end, from, to int64 }{
		{0, 1000, 0, 0}, {0, 1001, 1000, 4000}, {3999, 4000, 1000, 4000}, {4000, 5000, 0, 0}, {4999, 5001, 5000, 6000},
		{9999, 10000, 9000, 10500}, {0, 1 << 40, 1000, 4000}, {21000, 21500, 0, 0}, {22499, 22500, 21500, 22500}, {22500, 1 << 40, 0, 0},
	} {
		if from, to, ok := p.Has(c.start, c.end); from != c.from || to != c.to || ok != (c.to > 0) {
			t.Errorf("Has(%d, %d): %d, %d, %v, want %d, %d", c.start, c.end, from, to, ok, c.from, c.to)
		}
	}
	var overlap []int64
	for at := int64(0); at < 30000; at += 500 {
		if p.Overlaps(at) {
			overlap = append(overlap, at)
		}
	}
	if want := []int64{9000, 9500, 20000}; !slices.Equal(overlap, want) {
		t.Errorf("%v overlap, want %v", overlap, want)
	}
}

func TestPlacesAreBounded(t *testing.T) {
	starts := make([]int64, 3*image.MaxSpans)
	for i := range starts {
		starts[i] = int64(i) * 2000
	}
	p, err := image.NewPlaces(starts, 1000)
	if err != nil {
		t.Fatal(err)
	}
	// knows checks that p has the first n ranges and no others.
	knows := func(p *image.Places, n int) {
		t.Helper()
		for i := range starts {
			if _, _, ok := p.Has(int64(i)*2000+999, int64(i)*2000+1000); ok != (i < n) {
				t.Fatalf("range %d: %v, want the first %d", i, ok, n)
			}
		}
	}
	knows(p, image.MaxSpans)
	half, err := image.NewPlaces(starts[:image.MaxSpans/2], 1000)
	if err != nil {
		t.Fatal(err)
	}
	var m image.Memory
	m.Share(half)
	m.Share(p)
	knows(half, image.MaxSpans/2)
	knows(p, image.MaxSpans/2)
	for i := range starts {
		starts[i] = int64(i)
	}
	if _, err := image.NewPlaces(starts, 1000); err == nil || !strings.Contains(err.Error(), "overlap each other, and the first of them is at offset 0") {
		t.Error(err)
	}
	var none *image.Places
	if _, _, ok := none.Has(0, 1<<60); ok || none.Overlaps(0) {
		t.Error("no places have some")
	}
	m.Share(none)
}
