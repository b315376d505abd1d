package source

import (
	"cmp"
	"context"
	"errors"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
)

// pause waits before a retry that err made necessary. It returns an error if the
// disk or ctx ends first.
func (r *retrying) pause(ctx context.Context, err error, wait time.Duration) error {
	if r.policy.Pause(ctx, err, wait, r.ending.Done()) {
		return nil
	}
	return cmp.Or(context.Cause(r.ending), context.Cause(ctx))
}

// attempts are those of one call.
type attempts struct {
	retry.Attempts
	r   *retrying
	ctx context.Context
}

// attempt begins a call.
func (r *retrying) attempt(ctx context.Context) attempts {
	return attempts{Attempts: r.policy.Start(r.progress), r: r, ctx: ctx}
}

// errNoAnswer ends a disk that hangs for longer than the patience.
var errNoAnswer = errors.New("no answer")

// watch ends the disk d when a call to it, which is about to begin, takes longer
// than the patience and nothing else gets on either. Stop says that the call has
// returned.
func (a *attempts) watch(d *openedDisk, generation int) (stop func()) {
	var mu sync.Mutex // guards what follows
	var timer *time.Timer
	stopped := false
	look := func() {
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
		d.forget(errNoAnswer)
	}
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(a.Left(), look)
	return func() {
		mu.Lock()
		defer mu.Unlock()
		stopped = true
		timer.Stop()
	}
}

// again is told of a failure with the disk of the generation, or with opening
// it (0). It waits and returns nil when the call is to be made once more, with
// the current disk.
func (a *attempts) again(generation int, err error) error {
	r := a.r
	r.mu.Lock()
	ended := r.endedLocked(a.ctx)
	replaced := generation != 0 && (r.disk == nil || r.generation != generation)
	r.mu.Unlock()
	switch {
	case ended != nil:
		return ended
	case replaced && a.Left() > 0: // under this call, which may be all that is wrong
		return nil
	case r.policy.IsPermanent(err):
		return err
	}
	wait, gaveUp := a.Failed(err)
	if gaveUp != nil {
		r.leave(generation)
		return gaveUp
	}
	r.retries.Add(1)
	if generation == 0 {
		return nil // the next reopening waits
	}
	if err := r.pause(a.ctx, err, wait); err != nil {
		return err
	}
	if a.Failures() > 1 {
		r.discard(generation)
	}
	return nil
}
