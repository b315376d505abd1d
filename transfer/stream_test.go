package transfer_test

import (
	"context"
	"errors"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/transfer"
)

// silent is a stream of a given number of bytes. After them Read waits until the
// stream is interrupted.
type silent struct {
	given   int
	waiting chan struct{} // closed when all bytes were read
	over    context.Context
}

func (s *silent) Read(p []byte) (int, error) {
	if s.given > 0 {
		n := min(len(p), s.given)
		s.given -= n
		return n, nil
	}
	close(s.waiting)
	<-s.over.Done()
	return 0, context.Cause(s.over)
}

// TestTargetFailsWhileTheStreamIsSilent checks that a copy ends when its target has
// failed, although the stream delivers nothing.
func TestTargetFailsWhileTheStreamIsSilent(t *testing.T) {
	over, interrupt := context.WithCancelCause(t.Context())
	s := &silent{1 << 20, make(chan struct{}), over}
	m := &sinktest.Memory{}
	m.Before = func(_ context.Context, c sinktest.Call) error {
		if c.Op != sinktest.OpWrite && c.Op != sinktest.OpZero {
			return nil
		}
		<-s.waiting
		return errBoom
	}
	_, err := transfer.CopyStream(t.Context(), s, 8<<20, create(t, m, 8<<20, sink.Options{}), transfer.Options{
		RequestSize: 1 << 20, KeepZeros: true, Interrupt: interrupt,
	})
	if !errors.Is(err, errBoom) {
		t.Errorf("%v", err)
	}
	ended(t, m)
}
