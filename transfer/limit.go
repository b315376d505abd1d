package transfer

import (
	"context"

	"golang.org/x/time/rate"
)

// Limiter bounds how many bytes a second are read from sources. One Limiter
// may be shared by many copies, and then bounds their sum. A nil Limiter does
// not limit. It is safe for concurrent use.
type Limiter struct {
	bucket *rate.Limiter
	within *Limiter // nil: no further bound
}

// NewLimiter returns a Limiter of so many bytes a second (more than zero).
func NewLimiter(bytesPerSecond int64) *Limiter {
	// A tenth of a second's worth at once: short enough to look even, long
	// enough not to wake up for every request.
	burst := max(bytesPerSecond/10, 1)
	return &Limiter{bucket: rate.NewLimiter(rate.Limit(bytesPerSecond), int(min(burst, 1<<30)))}
}

// Within returns a Limiter that bounds what l does, and besides, together with
// all others that are within outer, what that does. Either may be nil.
func (l *Limiter) Within(outer *Limiter) *Limiter {
	if l == nil {
		return outer
	}
	return &Limiter{bucket: l.bucket, within: outer}
}

// Wait blocks until n bytes may be read or ctx ends, and then returns its cause.
func (l *Limiter) Wait(ctx context.Context, n int) error {
	if l == nil {
		return nil
	}
	if err := l.within.Wait(ctx, n); err != nil {
		return err
	}
	for n > 0 {
		piece := min(n, l.bucket.Burst())
		if err := l.bucket.WaitN(ctx, piece); err != nil {
			if cause := context.Cause(ctx); cause != nil {
				return cause
			}
			return err
		}
		n -= piece
	}
	return nil
}
