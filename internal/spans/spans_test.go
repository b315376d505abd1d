package spans

import (
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
)

func TestAdd(t *testing.T) {
	tests := []struct {
		name    string
		add     []Span
		want    []Span
		problem string // of the last range
		missing Span   // of [0, 100)
	}{
		{name: "nothing", missing: Span{0, 100}},
		{name: "first", add: []Span{{10, 20}}, want: []Span{{10, 20}}, missing: Span{0, 10}},
		{name: "everything", add: []Span{{0, 100}}, want: []Span{{0, 100}}},
		{name: "at the end of a span", add: []Span{{0, 20}, {20, 30}}, want: []Span{{0, 30}}, missing: Span{30, 100}},
		{name: "at the start of a span", add: []Span{{20, 30}, {10, 20}}, want: []Span{{10, 30}}, missing: Span{0, 10}},
		{name: "between two spans", add: []Span{{0, 10}, {20, 100}, {10, 20}}, want: []Span{{0, 100}}},
		{name: "in a gap", add: []Span{{0, 10}, {90, 100}, {40, 50}}, want: []Span{{0, 10}, {40, 50}, {90, 100}}, missing: Span{10, 40}},
		{name: "the end of a gap", add: []Span{{0, 10}, {90, 100}, {80, 90}}, want: []Span{{0, 10}, {80, 100}}, missing: Span{10, 80}},
		{name: "again", add: []Span{{10, 20}, {10, 20}}, want: []Span{{10, 20}}, problem: "the range [10, 20) repeats bytes [10, 20)", missing: Span{0, 10}},
		{name: "inside", add: []Span{{10, 20}, {12, 13}}, want: []Span{{10, 20}}, problem: "repeats bytes [12, 13)", missing: Span{0, 10}},
		{name: "around", add: []Span{{10, 20}, {5, 25}}, want: []Span{{10, 20}}, problem: "repeats bytes [10, 20)", missing: Span{0, 10}},
		{name: "overlap at the start", add: []Span{{10, 20}, {5, 11}}, want: []Span{{10, 20}}, problem: "repeats bytes [10, 11)", missing: Span{0, 10}},
		{name: "overlap at the end", add: []Span{{10, 20}, {19, 30}}, want: []Span{{10, 20}}, problem: "repeats bytes [19, 20)", missing: Span{0, 10}},
		{name: "overlap of the next", add: []Span{{0, 10}, {20, 30}, {10, 21}}, want: []Span{{0, 10}, {20, 30}}, problem: "repeats bytes [20, 21)", missing: Span{10, 20}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			var s Set
			for i, e := range test.add {
				err := s.Add(e.From, e.To)
				if i+1 == len(test.add) && test.problem != "" {
					if err == nil || !strings.Contains(err.Error(), test.problem) {
						t.Errorf("got %v, want %q", err, test.problem)
					}
				} else if err != nil {
					t.Fatal(err)
				}
			}
			if !slices.Equal(s.list, test.want) {
				t.Errorf("got %v, want %v", s.list, test.want)
			}
			got, ok := s.Missing(0, 100)
			if want := test.missing != (Span{}); ok != want || ok && got != test.missing {
				t.Errorf("missing: got %v, %v, want %v, %v", got, ok, test.missing, want)
			}
		})
	}
}

func TestMax(t *testing.T) {
	var s Set
	for i := range int64(Max) {
		if err := s.Add(2*i, 2*i+1); err != nil {
			t.Fatal(err)
		}
	}
	if err := s.Add(2*Max, 2*Max+1); err == nil || !strings.Contains(err.Error(), "more than 4096 separate ranges") {
		t.Errorf("got %v, want an error for one range too many", err)
	}
	// A range that closes a gap makes room for another one.
	if err := s.Add(1, 2); err != nil {
		t.Fatal(err)
	}
	if err := s.Add(2*Max, 2*Max+1); err != nil {
		t.Fatal(err)
	}
}

// TestRandom compares sets with a slice that has one element for each offset.
func TestRandom(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		var s Set
		var received [64]bool
		for range 30 {
			from := r.IntN(len(received))
			to := min(from+1+r.IntN(8), len(received))
			repeated := slices.Contains(received[from:to], true)
			if err := s.Add(int64(from), int64(to)); (err != nil) != repeated {
				t.Fatalf("Add(%d, %d) to %v: got %v, want an error: %v", from, to, s.list, err, repeated)
			}
			if !repeated {
				for i := from; i < to; i++ {
					received[i] = true
				}
			}
			first := slices.Index(received[:], false)
			if got, ok := s.Missing(0, int64(len(received))); ok != (first >= 0) || ok && got.From != int64(first) {
				t.Fatalf("%v: missing: got %v, %v, want the offset %d", s.list, got, ok, first)
			}
		}
	}
}
