// Package retry decides whether an operation that failed is tried again, and
// after how long. It makes no call by itself, so that callers can reconnect,
// pick another connection or shrink a request between two attempts.
//
// A caller states a [Policy] once and starts [Attempts] for each operation:
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
// A [Progress] is shared by the operations that depend on one server: as long as
// one of them succeeds, the server is alive, and the others stay patient. Code
// that counts failures in its own structures uses [Policy.GiveUp] and
// [Policy.Wait], on which Attempts are built.
//
// An error that every further attempt would meet is marked with [Permanent] where
// it is created. [LogTo] returns a function for Policy.OnRetry that logs the retries.
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
	// defaultTimeout replaces a Policy.Timeout of 0.
	defaultTimeout = 15 * time.Minute

	// maxDelay bounds the default delay between two attempts.
	maxDelay = time.Minute

	// leastAttempt is the time that must be left for another attempt to be worth
	// waiting for.
	leastAttempt = 250 * time.Millisecond
)

// Policy says how often and how long an operation is tried again, and how long the
// delays between the attempts are. The zero value never tries again. A Policy is not
// changed after its first use, and is then safe for concurrent use.
type Policy struct {
	// Retries is how often an operation is tried again before its error is
	// returned. A negative number means no limit.
	Retries int
	// Timeout ends the retries of an operation after this time without progress.
	// 0 means 15 minutes.
	Timeout time.Duration
	// Permanent reports whether err is permanent, in addition to the errors that
	// IsPermanent recognises. If it is nil, no other errors are.
	Permanent func(err error) bool
	// Backoff returns the delay before retry n, counted from 1. If it is nil, the
	// delay is 1 s, doubles with each retry up to 60 s, and is then shortened by a
	// random amount of up to half.
	Backoff func(n int) time.Duration
	// OnRetry is called before each wait, with the error that caused it. Calls may
	// be concurrent. It may be nil.
	OnRetry func(err error, wait time.Duration)
}

// Patience returns the time without progress after which an operation is given up.
func (p *Policy) Patience() time.Duration { return cmp.Or(p.Timeout, defaultTimeout) }

// Delay returns the delay before retry n, counted from 1, as if there were no
// timeout.
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

// Wait returns the delay before retry n of an operation that has made no progress for
// idle. The delay takes at most three quarters of the time that is left, so that some
// time is left for the attempt itself. ok is false if too little time is left.
func (p *Policy) Wait(n int, idle time.Duration) (wait time.Duration, ok bool) {
	if !p.patient(idle) {
		return 0, false
	}
	return min(p.Delay(n), (p.Patience()-idle)/4*3), true
}

func (p *Policy) patient(idle time.Duration) bool {
	return p.Patience()-idle >= min(leastAttempt, p.Patience()/20)
}

// IsPermanent reports whether err is permanent according to the function IsPermanent or
// to p.Permanent.
func (p *Policy) IsPermanent(err error) bool {
	return IsPermanent(err) || p.Permanent != nil && p.Permanent(err)
}

// GiveUp returns nil if an operation is to be tried again after the given number
// of failures in a row, the last of which was err, and after idle without
// progress. Otherwise it returns the error to give up with: err itself if err is
// permanent or the policy has no retries, else an error that wraps err and says
// how many retries, or how much time, were used up.
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

// TimedOut returns the error of an operation that is given up after idle without
// progress, with err as its cause.
func (p *Policy) TimedOut(err error, idle time.Duration) error {
	return fmt.Errorf("gave up after %v without progress: %w", idle.Round(time.Second), err)
}

// Pause reports the retry to OnRetry and then waits. It returns false as soon as
// ctx ends or stop is closed. A nil stop is never closed.
func (p *Policy) Pause(ctx context.Context, err error, wait time.Duration, stop <-chan struct{}) bool {
	if p.OnRetry != nil {
		p.OnRetry(err, wait)
	}
	return Sleep(ctx, wait, stop)
}

// Sleep waits for d and returns true. It returns false as soon as ctx ends or stop
// is closed. A nil stop is never closed.
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

// Permanent marks err as an error that every further attempt would meet again. The
// text of err does not change.
func Permanent(err error) error { return &permanentError{err} }

type permanentError struct{ err error }

func (e *permanentError) Error() string { return e.err.Error() }
func (e *permanentError) Unwrap() error { return e.err }

// IsMarked reports whether err was marked with Permanent.
func IsMarked(err error) bool { return errors.As(err, new(*permanentError)) }

// IsPermanent reports whether err was marked with Permanent, or says that a file
// does not exist or that a permission is missing. The end of a context is not
// permanent by itself, because the timeout of a connection looks the same: callers
// check their own context.
func IsPermanent(err error) bool {
	return IsMarked(err) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission)
}
