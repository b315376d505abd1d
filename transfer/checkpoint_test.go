package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"syscall"
	"testing"

	"vddkcp/sink"
	"vddkcp/sink/sinktest"
	"vddkcp/source/sourcetest"
	"vddkcp/transfer"
)

// A checkpoint whose sync failed is not kept: what it says is done is perhaps
// not there.
func TestCheckpointThatWasNotSynced(t *testing.T) {
	for _, c := range []struct {
		name string
		err  error
	}{
		{"input/output error", syscall.EIO},
		{"no space", syscall.ENOSPC},
		{"target lost", sink.ErrLost},
	} {
		for _, first := range []int64{0, 1 << 20} { // the offset from which on syncs fail
			src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 4<<20)}
			m := &sinktest.Memory{}
			failed := int64(-1)
			m.Before = func(_ context.Context, call sinktest.Call) error {
				if call.Op == sinktest.OpSync && call.Off > first {
					failed = max(failed, call.Off)
					return c.err
				}
				return nil
			}
			var s shelf
			_, err := transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), plan(t, src),
				transfer.Options{RequestSize: 256 << 10, Requests: 1, Keep: s.keep, Interval: 1})
			if !errors.Is(err, c.err) || failed < 0 {
				t.Errorf("%s: error %v, sync failed at %d", c.name, err, failed)
			}
			for _, kept := range s.kept {
				if kept.Offset > first {
					t.Errorf("%s: a checkpoint at %d is kept, and no sync above %d succeeded", c.name, kept.Offset, first)
				}
			}
		}
	}
}
