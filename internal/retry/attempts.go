package retry

import (
	"sync/atomic"
	"time"
)

// Progress records when an operation last succeeded. Operations that depend on the same server
// share one Progress. It is safe for concurrent use.
type Progress struct {
	start time.Time
	last  atomic.Int64 // nanoseconds from start to the last success; 0: no success yet
}

// NewProgress returns a Progress that has recorded no success yet.
func NewProgress() *Progress { return &Progress{start: time.Now()} }

// Mark records that an operation has succeeded now.
func (p *Progress) Mark() { p.last.Store(int64(time.Since(p.start))) }

// Idle returns for how long no operation has succeeded. It counts from the last success or from
// the given time, whichever is later.
func (p *Progress) Idle(since time.Time) time.Duration {
	if last := p.start.Add(time.Duration(p.last.Load())); last.After(since) {
		since = last
	}
	return time.Since(since)
}

// Attempts counts the failed attempts of one operation. Only one goroutine may use it at a time.
type Attempts struct {
	policy   Policy
	progress *Progress
	failures int
	since    time.Time // when the operation began, or last made progress of its own
}

// Start returns the Attempts for an operation that begins now. The operation can be retried for
// longer if other operations that share its Progress succeed.
func (p *Policy) Start(progress *Progress) Attempts {
	return Attempts{policy: *p, progress: progress, since: time.Now()}
}

// Failures returns the number of failures since the operation began, or since the last call of
// Advance.
func (a *Attempts) Failures() int { return a.failures }

// Advance records that a part of the operation succeeded. After that, the failures and the time
// without progress are counted from zero again.
func (a *Attempts) Advance() { a.failures, a.since = 0, time.Now() }

// Idle returns for how long neither this operation nor another operation with the same Progress
// has succeeded.
func (a *Attempts) Idle() time.Duration { return a.progress.Idle(a.since) }

// Left returns how much time is left before the operation is given up. It is never negative.
func (a *Attempts) Left() time.Duration { return max(a.policy.Patience()-a.Idle(), 0) }

// Failed counts a failed attempt. If another attempt is to be made, it returns how long to wait
// before that. Otherwise gaveUp is the error that the operation fails with, as Policy.GiveUp
// describes.
func (a *Attempts) Failed(err error) (wait time.Duration, gaveUp error) {
	a.failures++
	idle := a.Idle()
	if gaveUp := a.policy.GiveUp(err, a.failures, idle); gaveUp != nil {
		return 0, gaveUp
	}
	wait, _ = a.policy.Wait(a.failures, idle) // GiveUp has checked that enough time is left
	return wait, nil
}
