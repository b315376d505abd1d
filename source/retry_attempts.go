package source

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"
)

// wait waits before a retry, which err is the reason of.
func (r *retrying) wait(ctx context.Context, err error, d time.Duration) error {
	if r.o.OnRetry != nil {
		r.o.OnRetry(err, d)
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-r.ctx.Done():
		return context.Cause(r.ctx)
	case <-r.closing.Done():
		return os.ErrClosed
	}
}

// attempts are those of one call.
type attempts struct {
	r        *retrying
	ctx      context.Context
	failures int
	since    time.Duration // since r.started: when the call began, or was last known to get on
}

// attempt begins a call.
func (r *retrying) attempt(ctx context.Context) attempts {
	return attempts{r: r, ctx: ctx, since: time.Since(r.started)}
}

// idle is for how long there has been no progress that the call could hope from.
func (a *attempts) idle() time.Duration {
	return time.Since(a.r.started) - max(a.since, time.Duration(a.r.lastRead.Load()))
}

// gaveUp is the error of a call whose patience is over.
func (a *attempts) gaveUp(err error) error {
	return fmt.Errorf("given up after %v without a read that succeeded: %w", a.idle().Round(time.Second), err)
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
		if left := a.r.o.Patience() - a.idle(); left > 0 {
			timer.Reset(left)
			return
		}
		a.r.abandon(generation)
		d.forget(errNoAnswer)
	}
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(max(a.r.o.Patience()-a.idle(), 0), look)
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
	case replaced && a.idle() < r.o.Patience(): // under this call, which may be all that is wrong
		return nil
	case IsPermanent(err), r.o.Permanent != nil && r.o.Permanent(err):
		return err
	}
	a.failures++
	if r.o.Retries >= 0 && a.failures > r.o.Retries {
		r.leave(generation)
		if r.o.Retries == 0 {
			return err
		}
		return fmt.Errorf("given up after %d retries: %w", r.o.Retries, err)
	}
	wait, ok := r.o.Wait(a.failures, a.idle())
	if !ok {
		r.leave(generation)
		return a.gaveUp(err)
	}
	r.retries.Add(1)
	if generation == 0 {
		return nil // the next reopening waits
	}
	if err := r.wait(a.ctx, err, wait); err != nil {
		return err
	}
	if a.failures > 1 {
		r.discard(generation)
	}
	return nil
}
