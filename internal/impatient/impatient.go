// Package impatient gives up waiting for calls that have no context, such as the
// opening of a FIFO that nobody writes to.
package impatient

import "context"

// Call returns what f returns, or, when ctx ends before, its cause. Then f goes on
// in a goroutine of its own, and its result is lost.
func Call[T any](ctx context.Context, f func() (T, error)) (T, error) {
	type result struct {
		value T
		err   error
	}
	done := make(chan result, 1)
	go func() {
		value, err := f()
		done <- result{value, err}
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-ctx.Done():
		var none T
		return none, context.Cause(ctx)
	}
}
