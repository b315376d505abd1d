package transfer

import (
	"context"
	"time"

	"golang.org/x/time/rate"

	"github.com/vddkcp/vddkcp/transfer/progress"
)

// Limiter limits how many bytes per second are read from sources. Copies that share a
// Limiter are limited together. A nil Limiter does not limit. A Limiter is safe for
// concurrent use.
type Limiter struct {
	bucket *rate.Limiter
	within *Limiter        // another limit that applies too; nil: none
	until  context.Context // see Until; nil: none
}

// NewLimiter returns a Limiter that allows the given number of bytes per second, which must be
// greater than 0.
func NewLimiter(bytesPerSecond int64) *Limiter {
	// After a time without reads, as many bytes may be read at once as the rate allows in a tenth
	// of a second. A tenth of a second is short enough for an even rate, and long enough that not
	// every request has to wait.
	burst := max(bytesPerSecond/10, 1)
	return &Limiter{bucket: rate.NewLimiter(rate.Limit(bytesPerSecond), int(min(burst, 1<<30)))}
}

// Within returns a Limiter that applies both the limit of l and the limit of outer. If several
// Limiters are made with the same outer Limiter, they share its rate. Both l and outer may be nil.
func (l *Limiter) Within(outer *Limiter) *Limiter {
	if l == nil {
		return outer
	}
	return &Limiter{bucket: l.bucket, within: outer, until: l.until}
}

// Until returns a Limiter that shares the rate of l, and whose method Wait also returns when ctx
// ends, with the cause of ctx. A copy that is stopped reads no more, but still writes the data that
// it has read. It must not wait for reads that will not begin. The receiver l may be nil.
func (l *Limiter) Until(ctx context.Context) *Limiter {
	if l == nil {
		return nil
	}
	return &Limiter{bucket: l.bucket, within: l.within.Until(ctx), until: ctx}
}

// Wait blocks until n bytes may be read. If ctx ends first, Wait returns the cause of ctx.
func (l *Limiter) Wait(ctx context.Context, n int) error {
	return l.wait(ctx, n, new(progress.Counters))
}

// The method wait does what Wait does, and counts the time in the given counters.
func (l *Limiter) wait(ctx context.Context, n int, counters *progress.Counters) error {
	if l == nil {
		return nil
	}
	if err := l.within.wait(ctx, n, counters); err != nil {
		return err
	}
	for n > 0 {
		piece := min(n, l.bucket.Burst())
		if err := l.waitPiece(ctx, piece, counters); err != nil {
			return err
		}
		n -= piece
	}
	return nil
}

// waitPiece does what the method wait does, for at most as many bytes as may be read at once.
func (l *Limiter) waitPiece(ctx context.Context, n int, counters *progress.Counters) error {
	if l.bucket.AllowN(time.Now(), n) && ctx.Err() == nil {
		return nil
	}
	counters.Begin(progress.WaitRateLimit)
	defer counters.End(progress.WaitRateLimit)
	if l.until != nil {
		both, cancel := context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(l.until, func() { cancel(context.Cause(l.until)) })()
		ctx = both
	}
	err := l.bucket.WaitN(ctx, n)
	if cause := context.Cause(ctx); err != nil && cause != nil {
		return cause
	}
	return err
}
