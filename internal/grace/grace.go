// Package grace prolongs contexts, for work that must be finished after a signal has
// ended the context of the program.
package grace

import (
	"context"
	"time"
)

// Prolong returns a context that ends d after ctx does, with the same cause, or when
// cancel is called.
func Prolong(ctx context.Context, d time.Duration) (prolonged context.Context, cancel context.CancelFunc) {
	prolonged, end := context.WithCancelCause(context.WithValue(context.WithoutCancel(ctx), originalKey{}, ctx))
	stop := context.AfterFunc(ctx, func() {
		timer := time.NewTimer(d)
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

// originalKey is the key under which a prolonged context stores the context that it was
// made from.
type originalKey struct{}

// Original returns the context that ctx was made from by Prolong, or ctx itself. Use
// it for what must end with the signal itself, for example a prompt for a password.
func Original(ctx context.Context) context.Context {
	if original, ok := ctx.Value(originalKey{}).(context.Context); ok {
		return original
	}
	return ctx
}
