package source

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
)

// The method pause waits for the given time before a retry. err is the error that made
// the retry necessary. If Close is called, or ctx or the context of the disk ends during
// the wait, pause returns os.ErrClosed or the cause with which the context ended.
func (r *retrying) pause(ctx context.Context, err error, wait time.Duration) error {
	if r.policy.Pause(ctx, err, wait, r.ending.Done()) {
		return nil
	}
	return cmp.Or(context.Cause(r.ending), context.Cause(ctx))
}

// The type attempts counts the attempts at one call of the disk.
type attempts struct {
	retry.Attempts
	r   *retrying
	ctx context.Context
}

// newAttempts starts to count the attempts at a call that has the context ctx.
func (r *retrying) newAttempts(ctx context.Context) attempts {
	return attempts{Attempts: r.policy.Start(r.progress), r: r, ctx: ctx}
}

// errNoAnswer is the cause with which Retry cancels the context of a disk that has not
// responded for too long.
var errNoAnswer = errors.New("no answer from the source")

// The method watch limits the duration of one call of the opened disk d. The caller makes
// this call after watch has returned, and calls the function stop when the call has
// returned. RetryOptions have a time limit. If it passes before stop is called, and no
// call of the disk has succeeded in this time, watch abandons d (see abandon) and cancels
// the context of d. The call of d then returns.
func (a *attempts) watch(d *openedDisk, generation int) (stop func()) {
	var mu sync.Mutex // guards timer and stopped
	var timer *time.Timer
	stopped := false
	check := func() {
		mu.Lock()
		defer mu.Unlock()
		if stopped {
			return
		}
		if left := a.Left(); left > 0 {
			timer.Reset(left)
			return
		}
		a.r.abandon(generation)
		d.cancel(errNoAnswer)
	}
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(a.Left(), check)
	return func() {
		mu.Lock()
		defer mu.Unlock()
		stopped = true
		timer.Stop()
	}
}

// prepareRetry is called after a call of the disk failed with err. The parameter
// generation is the generation of the opened disk that the call used (see current), or 0
// if the disk could not be opened. prepareRetry waits and, if necessary, starts to open
// the disk again. It returns nil if the caller should repeat the call with the current
// disk. Otherwise it returns the error that the caller must return.
func (a *attempts) prepareRetry(generation int, err error) error {
	r := a.r
	r.mu.Lock()
	ended := r.endedLocked(a.ctx)
	replaced := generation != 0 && (r.disk == nil || r.generation != generation)
	r.mu.Unlock()
	switch {
	case ended != nil:
		return ended
	case replaced && a.Left() > 0: // another call replaced the disk, which may explain this failure
		return nil
	case r.policy.IsPermanent(err):
		return err
	}
	wait, gaveUp := a.Failed(err)
	if gaveUp != nil {
		r.abandonIfEnded(generation)
		return gaveUp
	}
	r.retries.Add(1)
	if generation == 0 {
		return nil // startReopening waits
	}
	if err := r.pause(a.ctx, err, wait); err != nil {
		return err
	}
	if a.Failures() > 1 {
		r.discard(generation)
	}
	return nil
}
