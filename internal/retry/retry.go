// Package retry decides whether a failed operation is tried again, and how long to wait before
// that. The caller makes the attempts itself. Therefore it can reconnect, use another connection
// or make a request smaller between two attempts.
//
// A caller has one [Policy], and starts [Attempts] for each operation:
//
//	attempts := policy.Start(progress)
//	for {
//		err := operation()
//		if err == nil {
//			progress.Mark()
//			return nil
//		}
//		wait, gaveUp := attempts.Failed(err)
//		if gaveUp != nil {
//			return gaveUp
//		}
//		if !policy.Pause(ctx, err, wait, closing) {
//			return context.Cause(ctx)
//		}
//	}
//
// All operations that depend on one server share a [Progress]. As long as some of the operations
// succeed, the server is alive. The timeout for the other operations is then counted from the last
// success. A caller that counts failures itself uses [Policy.GiveUp] and [Policy.Wait] in place of
// Attempts.
//
// If every further attempt would fail in the same way, the error is marked with [Permanent]
// where it is created. [LogTo] returns a function for Policy.OnRetry that logs the retries.
package retry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"time"
)

const (
	// defaultTimeout is used if Policy.Timeout is 0.
	defaultTimeout = 15 * time.Minute

	// maxDelay is the longest delay between two attempts if Policy.Backoff is nil.
	maxDelay = time.Minute

	// leastAttempt is the shortest time in which another attempt can be made. If less time is
	// left, the operation is given up.
	leastAttempt = 250 * time.Millisecond
)

// Policy says how often and for how long an operation is tried again, and how long the delays
// between the attempts are. With the zero value, nothing is tried again. A Policy must not
// change after its first use; then it is safe for concurrent use.
type Policy struct {
	// Retries is the number of times that a failed operation is tried again before its error is
	// returned. A negative number means no limit.
	Retries int
	// Timeout limits the time without progress: after this time, an operation is not tried again. 0
	// means 15 minutes.
	Timeout time.Duration
	// Permanent reports whether an error is permanent. Errors for which the function IsPermanent
	// returns true are always permanent. Permanent may be nil.
	Permanent func(err error) bool
	// Backoff returns the delay before retry n, which is 1 for the first retry. If Backoff is
	// nil, the delay is 1 s and doubles with each retry up to 60 s. Then it is shortened by a
	// random amount, by half at most.
	Backoff func(n int) time.Duration
	// OnRetry is called before each wait, with the error of the failed attempt. It may be called
	// concurrently. It may be nil.
	OnRetry func(err error, wait time.Duration)
}

// Patience returns the longest time without progress. After this time, an operation is given up.
func (p *Policy) Patience() time.Duration { return cmp.Or(p.Timeout, defaultTimeout) }

// Delay returns the delay before retry n, which is 1 for the first retry. It does not consider
// the timeout.
func (p *Policy) Delay(n int) time.Duration {
	if p.Backoff != nil {
		return p.Backoff(n)
	}
	d := maxDelay
	if n < 7 {
		d = time.Second << (n - 1)
	}
	return d - rand.N(d/2)
}

// Wait returns the delay before retry n of an operation. idle is the time for which the
// operation has made no progress. The delay is at most three quarters of the time that is left
// before the timeout, so that some time is left for the retry itself. ok is false if too little
// time is left for a retry.
func (p *Policy) Wait(n int, idle time.Duration) (wait time.Duration, ok bool) {
	if !p.patient(idle) {
		return 0, false
	}
	return min(p.Delay(n), (p.Patience()-idle)/4*3), true
}

func (p *Policy) patient(idle time.Duration) bool {
	return p.Patience()-idle >= min(leastAttempt, p.Patience()/20)
}

// IsPermanent reports whether err is permanent. It is permanent if the function IsPermanent of
// this package or the function p.Permanent returns true for it.
func (p *Policy) IsPermanent(err error) bool {
	return IsPermanent(err) || p.Permanent != nil && p.Permanent(err)
}

// GiveUp returns nil if an operation is to be tried again. failures is the number of attempts
// that have failed in a row, err is the error of the last one, and idle is the time for which
// the operation has made no progress.
//
// If the operation is not to be tried again, GiveUp returns the error that the operation fails
// with. This is err itself if err is permanent or the policy has no retries. Otherwise it is an
// error that wraps err and says after how many retries, or after how much time, the operation
// was given up.
func (p *Policy) GiveUp(err error, failures int, idle time.Duration) error {
	switch {
	case p.IsPermanent(err), p.Retries == 0:
		return err
	case p.Retries > 0 && failures > p.Retries:
		return fmt.Errorf("gave up after %d retries: %w", p.Retries, err)
	case !p.patient(idle):
		return p.TimedOut(err, idle)
	}
	return nil
}

// TimedOut returns the error of an operation that is given up because it made no progress for
// too long. idle is the time for which it made no progress, and err is the error of the last
// attempt.
func (p *Policy) TimedOut(err error, idle time.Duration) error {
	return fmt.Errorf("gave up after %v without progress: %w", idle.Round(time.Second), err)
}

// Pause calls OnRetry and then waits for the given time. It returns true after the wait. It
// returns false as soon as ctx ends or the channel stop is closed. stop may be nil.
func (p *Policy) Pause(ctx context.Context, err error, wait time.Duration, stop <-chan struct{}) bool {
	if p.OnRetry != nil {
		p.OnRetry(err, wait)
	}
	return Sleep(ctx, wait, stop)
}

// Sleep waits for the given duration and returns true. It returns false as soon as ctx ends or
// the channel stop is closed. stop may be nil.
func Sleep(ctx context.Context, d time.Duration, stop <-chan struct{}) bool {
	select {
	case <-ctx.Done():
		return false
	case <-stop:
		return false
	default:
	}
	if d <= 0 {
		return true
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
	case <-stop:
	}
	return false
}

// Permanent marks err as permanent: every further attempt would fail in the same way. The text
// of err does not change.
func Permanent(err error) error { return &permanentError{err} }

type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

// IsMarked reports whether err was marked with Permanent.
func IsMarked(err error) bool { return errors.As(err, new(*permanentError)) }

// IsPermanent reports whether err is permanent: it was marked with Permanent, or it says that a
// file does not exist or that a permission is missing.
//
// The error of an ended context does not count as permanent, because a connection whose time limit
// has passed fails with an error that looks the same (context.DeadlineExceeded). Therefore callers
// must check whether their own context has ended.
func IsPermanent(err error) bool {
	return IsMarked(err) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
}
