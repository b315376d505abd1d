package transfer_test

import (
	"bytes"
	"slices"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
)

// TestHold checks that a copy with Options.Hold suspends the complete target, that a checkpoint at
// the end of the disk exists before that, and that Whole is called after it.
func TestHold(t *testing.T) {
	for _, verify := range []bool{false, true} {
		src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 1<<20)}
		m := &sinktest.Memory{}
		var s shelf
		whole := 0
		_, err := transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), plan(t, src), transfer.Options{
			Hold: true, Verify: verify, Keep: s.keep, Interval: time.Hour,
			Whole: func() {
				whole++
				if !m.Ended() {
					t.Error("Whole was called before Suspend")
				}
			},
		})
		ended(t, m)
		if err != nil || whole != 1 {
			t.Errorf("verify %v: %v, Whole was called %d times", verify, err, whole)
		}
		if _, ok := m.Published(); ok || len(m.Leftovers()) == 0 {
			t.Errorf("verify %v: published %v, left %v", verify, ok, m.Leftovers())
		}
		if len(s.kept) != 1 || s.last().Offset != src.Size() {
			t.Errorf("verify %v: %d checkpoints", verify, len(s.kept))
		}
		ops := m.Calls()
		finish := slices.IndexFunc(ops, func(c sinktest.Call) bool { return c.Op == sinktest.OpFinish })
		sync := slices.IndexFunc(ops, func(c sinktest.Call) bool { return c.Op == sinktest.OpSync })
		if sync < 0 || finish < sync {
			t.Errorf("verify %v: the last checkpoint is call %d, Finish is call %d", verify, sync, finish)
		}
	}
}
