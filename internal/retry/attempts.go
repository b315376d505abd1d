package retry

import (
	"sync/atomic"
	"time"
)

// Progress records when an operation last succeeded. Operations that depend on the
// same server share one. It is safe for concurrent use.
type Progress struct {
	start time.Time
	last  atomic.Int64 // nanoseconds from start to the last success; 0: no success yet
}

// NewProgress returns a Progress without a success.
func NewProgress() *Progress { return &Progress{start: time.Now()} }

// Mark records that an operation succeeded now.
func (p *Progress) Mark() { p.last.Store(int64(time.Since(p.start))) }

// Idle returns the time since the last success or since the given time, whichever
// is later.
func (p *Progress) Idle(since time.Time) time.Duration {
	if last := p.start.Add(time.Duration(p.last.Load())); last.After(since) {
		since = last
	}
	return time.Since(since)
}

// Attempts counts the failures of one operation. It is for one goroutine at a
// time.
type Attempts struct {
	policy   Policy
	progress *Progress
	failures int
	since    time.Time // when the operation began, or last made progress of its own
}

// Start begins an operation. If another operation records a success in the same
// Progress, this operation may be retried for longer.
func (p *Policy) Start(progress *Progress) Attempts {
	return Attempts{policy: *p, progress: progress, since: time.Now()}
}

// Failures returns the number of failures since the operation began, or since the
// last call of Advance.
func (a *Attempts) Failures() int { return a.failures }

// Advance records that a part of the operation succeeded. The failures are counted from
// 0 again, and the time without progress starts again.
func (a *Attempts) Advance() { a.failures, a.since = 0, time.Now() }

// Idle returns how long neither the operation nor another one that shares its
// Progress has succeeded.
func (a *Attempts) Idle() time.Duration { return a.progress.Idle(a.since) }

// Left returns the time that is left before the operation is given up, at least 0.
func (a *Attempts) Left() time.Duration { return max(a.policy.Patience()-a.Idle(), 0) }

// Failed counts a failure. It returns how long to wait before the next attempt, or
// the error to give up with, as Policy.GiveUp describes.
func (a *Attempts) Failed(err error) (wait time.Duration, gaveUp error) {
	a.failures++
	if gaveUp := a.policy.GiveUp(err, a.failures, a.Idle()); gaveUp != nil {
		return 0, gaveUp
	}
	wait, ok := a.policy.Wait(a.failures, a.Idle())
	if !ok { // the patience ended between the two looks at the clock
		return 0, a.TimedOut(err)
	}
	return wait, nil
}

// TimedOut returns the error of an operation that is given up now because too much
// time has passed without progress.
func (a *Attempts) TimedOut(err error) error { return a.policy.TimedOut(err, a.Idle()) }
