package source

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
)

type openedDisk struct {
	Disk
	forget    context.CancelCauseFunc // ends its context
	id, proof string
}

func (d *openedDisk) Close() error {
	defer d.forget(os.ErrClosed)
	return d.Disk.Close()
}

// reopening is one for all calls that wait for it.
type reopening struct {
	done chan struct{}
	err  error // once done is closed
}

// openOnce opens the disk and asks for its identity. Close ends it, and so does
// the limit, where it is not 0.
func (r *retrying) openOnce(limit time.Duration) (*openedDisk, error) {
	ctx, cancel := context.WithCancelCause(r.ctx)
	stop := context.AfterFunc(r.ending, func() { cancel(context.Cause(r.ending)) })
	defer stop()
	if limit > 0 {
		late := time.AfterFunc(limit, func() { cancel(errNoAnswer) })
		defer late.Stop()
	}
	d, err := r.open(ctx)
	if err != nil {
		cancel(nil)
		return nil, err
	}
	o := &openedDisk{Disk: d, forget: cancel}
	if i, ok := Ability[Identified](d); ok {
		if o.id, o.proof, err = i.Identity(ctx); err != nil {
			o.Close()
			return nil, err
		}
	}
	if ctx.Err() != nil { // it was opened when it was too late
		o.Close()
		return nil, context.Cause(ctx)
	}
	return o, nil
}

// current returns the disk, after it was opened again where that has to be. It
// waits as long as the call has patience.
func (r *retrying) current(a *attempts) (d *openedDisk, generation int, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for {
		if err := r.endedLocked(a.ctx); err != nil {
			return nil, 0, err
		}
		if r.disk != nil {
			return r.disk, r.generation, nil
		}
		if r.outage.reopening == nil {
			r.startReopening(nil)
		}
		f := r.outage.reopening
		r.mu.Unlock()
		patience, late := time.NewTimer(a.Left()), false
		select {
		case <-f.done:
			err = f.err
		case <-patience.C:
			late = true
		case <-a.ctx.Done():
		case <-r.ctx.Done():
		}
		patience.Stop()
		r.mu.Lock()
		if late {
			err = r.outage.lastErr
			if err == nil {
				err = fmt.Errorf("%w: %w", ErrReopen, errNoAnswer)
			}
		}
		if err != nil {
			return nil, 0, err
		}
	}
}

// discard has the disk opened again, unless another call did that already.
func (r *retrying) discard(generation int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.disk == nil || r.generation != generation {
		return
	}
	old := r.disk
	if old == r.first && r.inFile {
		old = nil // Close closes it
	}
	r.disk = nil
	r.startReopening(old)
}

// abandon gives the disk up, so that the next call opens it again.
func (r *retrying) abandon(generation int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.disk == nil || r.generation != generation {
		return
	}
	if r.disk != r.first || !r.inFile {
		r.outage.abandoned = r.disk
	}
	r.disk = nil
}

// leave is called when a call with the disk of the generation gave up.
func (r *retrying) leave(generation int) {
	if !r.revive || generation == 0 {
		return
	}
	r.mu.Lock()
	d := r.disk
	r.mu.Unlock()
	if d == nil {
		return
	}
	if e, ok := Ability[Ender](d.Disk); ok && e.Ended() != nil {
		r.abandon(generation)
	}
}

// startReopening is called with mu held, before Close.
func (r *retrying) startReopening(old *openedDisk) {
	if old == nil {
		old, r.outage.abandoned = r.outage.abandoned, nil
	}
	if r.outage.failures == 0 {
		r.outage.since = time.Now()
	}
	r.outage.reopening = &reopening{done: make(chan struct{})}
	r.work.Add(1)
	go r.reopen(r.outage.reopening, old, r.delayLocked(), r.outage.lastErr)
}

// delayLocked is how long to wait before the disk is opened again: not at all the
// first time, and else less what has passed since the last attempt. The caller
// holds mu.
func (r *retrying) delayLocked() time.Duration {
	if r.outage.failures == 0 {
		return 0
	}
	n := r.outage.failures + 2 // 1 and 2 were before the first reopening
	wait, ok := r.policy.Wait(n, r.progress.Idle(r.outage.since))
	if !ok {
		wait = r.policy.Delay(n) // the calls from before the outage have given up by then
	}
	return max(wait-time.Since(r.outage.failedAt), 0)
}

// reopen closes old first, where there is one, since the host may count
// connections. It runs beside the calls that wait for it, because any of them
// may be given up. A pause is what the failure before, lastErr, makes it wait.
func (r *retrying) reopen(f *reopening, old *openedDisk, delay time.Duration, lastErr error) {
	defer r.work.Done()
	defer close(f.done)
	if old != nil {
		old.Close() // an error of a disk that failed says nothing new
	}
	var d *openedDisk
	err := error(nil)
	if lastErr != nil {
		err = r.pause(r.ctx, lastErr, delay)
	}
	if err == nil {
		r.reopenings.Add(1)
		d, err = r.openOnce(r.policy.Patience())
	}
	if err == nil {
		if err = r.same(d); err == nil && r.samples != nil {
			err = r.compare(d)
		}
		if err != nil {
			d.Close()
		}
	}
	if err != nil {
		err = fmt.Errorf("%w: %w", ErrReopen, err)
	}

	r.mu.Lock()
	defer r.mu.Unlock()
	r.outage.reopening, f.err = nil, err
	if err != nil {
		r.outage.failures++
		r.outage.lastErr, r.outage.failedAt = err, time.Now()
		if retry.IsMarked(err) && (!r.revive || errors.Is(err, ErrChanged)) {
			r.dead = err
		}
		return
	}
	r.disk, r.outage.failures, r.outage.lastErr = d, 0, nil
	r.generation++
	if u, ok := Ability[Uncached](d.Disk); ok && r.uncached {
		u.ReadUncached()
	}
}

// same returns an error unless d is the disk that was opened first.
func (r *retrying) same(d *openedDisk) error {
	if d.Size() != r.Size() {
		return Changed(fmt.Errorf("it is another disk: it had %d bytes (identity %q) and has %d (identity %q)", r.Size(), r.first.id, d.Size(), d.id))
	}
	if d.id != r.first.id || d.proof != r.first.proof {
		return Changed(fmt.Errorf("it is another disk or was changed: its identity was %q (%s) and is %q (%s)", r.first.id, r.first.proof, d.id, d.proof))
	}
	return nil
}

// compare returns an error unless d holds what was read before. Close ends it, and
// so does the patience.
func (r *retrying) compare(d *openedDisk) error {
	stop := context.AfterFunc(r.ending, func() { d.forget(context.Cause(r.ending)) })
	defer stop()
	late := time.AfterFunc(r.policy.Patience(), func() { d.forget(errNoAnswer) })
	defer late.Stop()
	return r.samples.Check(func(p []byte, off int64) (goOn bool, err error) {
		_, err = readFull(d.Disk, p, off)
		return true, err
	})
}
