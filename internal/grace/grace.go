// Package grace prolongs contexts. A signal ends the context of the program, but some work must
// still be finished after that. A prolonged context gives this work some more time.
package grace

import (
	"context"
	"time"
)

// Prolong returns a context that ends later than ctx: when the given delay has passed after the
// end of ctx. It has the same cause as ctx. A call of cancel ends it at once.
func Prolong(ctx context.Context, delay time.Duration) (prolonged context.Context, cancel context.CancelFunc) {
	prolonged, end := context.WithCancelCause(context.WithValue(context.WithoutCancel(ctx), originalKey{}, ctx))
	stop := context.AfterFunc(ctx, func() {
		timer := time.NewTimer(delay)
		defer timer.Stop()
		select {
		case <-timer.C:
			end(context.Cause(ctx))
		case <-prolonged.Done():
		}
	})
	return prolonged, func() {
		stop()
		end(nil)
	}
}

// originalKey is the key under which a prolonged context stores the original context, the one
// that was passed to Prolong.
type originalKey struct{}

// Original returns the context that was passed to Prolong, if ctx comes from Prolong. Otherwise
// it returns ctx. It is for work that must stop at the signal itself, for example a prompt for a
// password.
func Original(ctx context.Context) context.Context {
	if original, ok := ctx.Value(originalKey{}).(context.Context); ok {
		return original
	}
	return ctx
}
