// Package impatient stops waiting for a call that has no context, when the context of the caller
// ends. An example of such a call is opening a FIFO that no process writes to.
package impatient

import "context"

// Call calls f and returns its result. If ctx ends first, Call returns the cause of ctx. In that
// case f continues in a goroutine of its own, and nobody gets its result.
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
