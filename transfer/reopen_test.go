package transfer

import (
	"context"
	"errors"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
)

// suspended is a target that counts the calls of Suspend.
type suspended struct {
	sink.Disk
	times int
}

func (s *suspended) Suspend() error { s.times++; return nil }

// TestOpenedWhileStopped stops the copy at the moment when the target has been opened.
// The target must be suspended and not returned: the stop ends the context with which
// it was opened, so no call of the target would succeed.
func TestOpenedWhileStopped(t *testing.T) {
	cause := errors.New("a signal")
	for i := range 5000 {
		stop, cancel := context.WithCancelCause(t.Context())
		dst := new(suspended)
		var opening context.Context
		r := &reopener{stop: stop}
		r.open = func(ctx context.Context, _ []byte, _ int64) (sink.Disk, error) {
			opening = ctx
			cancel(cause)
			return dst, nil
		}
		got, err := r.openWithin(t.Context(), checkpointInterval, new(Checkpoint))
		if got != nil || !errors.Is(err, errStopped) || dst.times != 1 {
			t.Fatalf("try %d: opened %v, suspended %d times: %v; the context's cause is %v", i, got != nil, dst.times, err, context.Cause(opening))
		}
	}
}
