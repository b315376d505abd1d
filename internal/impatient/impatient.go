// Package impatient stops waiting for calls that do not support a context, such as the
// opening of a FIFO that no process writes to.
package impatient

import "context"

// Call returns the result of f. If ctx ends first, Call returns the cause; f then
// continues in a goroutine of its own, and its result is dropped.
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
