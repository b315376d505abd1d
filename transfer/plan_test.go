package transfer_test

import (
	"math"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// TestPlanShowsHowFarItIs checks that the progress of planning a large disk is shown,
// also within one long extent.
func TestPlanShowsHowFarItIs(t *testing.T) {
	const size = 16 << 40
	counters := new(progress.Counters)
	var seen []int64
	src := &sourcetest.Memory{
		Content: strings.NewReader(""), Length: size,
		OnExtent: func(source.Extent) error {
			seen = append(seen, counters.Snapshot().Examined)
			return nil
		},
	}
	p, err := transfer.NewPlanWithin(t.Context(), src, math.MaxInt64, counters)
	if err != nil {
		t.Fatal(err)
	}
	if p.Data != size || p.Extents != 1 {
		t.Errorf("%d bytes in %d extents, want one of all", p.Data, p.Extents)
	}
	if s := counters.Snapshot(); s.Examined != size || s.Size != size {
		t.Errorf("at the end %d of %d", s.Examined, s.Size)
	}
	if len(seen) < 100 || seen[len(seen)-1] < size/2 {
		t.Errorf("seen %v", seen)
	}
}
