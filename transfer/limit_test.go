package transfer_test

import (
	"context"
	"errors"
	"testing"

	"github.com/vddkcp/vddkcp/transfer"
)

// TestLimiterUntil checks that a wait ends with each of its two contexts.
func TestLimiterUntil(t *testing.T) {
	own, given := errors.New("own"), errors.New("given")
	for _, want := range []error{own, given} {
		ctx, end := context.WithCancelCause(t.Context())
		until, stop := context.WithCancelCause(t.Context())
		defer end(nil)
		defer stop(nil)
		for _, l := range []*transfer.Limiter{
			transfer.NewLimiter(1).Until(until),
			transfer.NewLimiter(1 << 30).Within(transfer.NewLimiter(1)).Until(until),
		} {
			ended := make(chan error, 1)
			go func() { ended <- l.Wait(ctx, 1<<20) }() // for 12 days
			if want == own {
				end(own)
			} else {
				stop(given)
			}
			if err := <-ended; err != want {
				t.Errorf("error %v, want %v", err, want)
			}
		}
	}
	if l := (*transfer.Limiter)(nil).Until(t.Context()); l != nil || l.Wait(t.Context(), 1) != nil {
		t.Error("no limit became a limit")
	}
}
