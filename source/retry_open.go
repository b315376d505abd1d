package source

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
)

// openedDisk is a disk that was opened, with its identity at that time.
type openedDisk struct {
	Disk
	cancel    context.CancelCauseFunc // ends the context of the disk
	id, proof string
}

func (d *openedDisk) Close() error {
	defer d.cancel(os.ErrClosed)
	return d.Disk.Close()
}

// reopening is one attempt to open the disk again. All calls that failed wait for this
// one attempt.
type reopening struct {
	done chan struct{}
	err  error // set before done is closed; nil if the disk is open
}

// openOnce tries once to open the disk, and gets its identity. It is interrupted when
// Close is called, and when the time given as limit is over. If limit is 0, there is no
// time limit.
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
	o := &openedDisk{Disk: d, cancel: cancel}
	if i, ok := Ability[Identified](d); ok {
		if o.id, o.proof, err = i.Identity(ctx); err != nil {
			o.Close()
			return nil, err
		}
	}
	if ctx.Err() != nil { // the limit or Close came while the disk was being opened
		o.Close()
		return nil, context.Cause(ctx)
	}
	return o, nil
}

// The method current returns the open disk and its generation. The generation is 1 for
// the disk that was opened first, and grows by 1 with each successful reopening. If the
// disk is not open, current waits until it is opened again. current returns an error if
// opening the disk again fails, or if the time for the retries of the call is over.
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

// The method discard is called when the opened disk with the given generation has failed.
// It closes this opened disk, unless callers still use its file, and starts to open the
// disk again. If another call has already discarded or abandoned this opened disk, the
// method does nothing.
func (r *retrying) discard(generation int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.disk == nil || r.generation != generation {
		return
	}
	old := r.disk
	if old == r.first && r.inFile {
		old = nil // callers still use its file; retrying.Close closes it
	}
	r.disk = nil
	r.startReopening(old)
}

// The method abandon makes later calls no longer use the opened disk with the given
// generation, because this disk has failed. It does not close this opened disk. The next
// call that needs the disk closes the opened disk, unless callers still use its file, and
// opens the disk again.
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

// abandonIfEnded is called when a failed call of the disk is not retried any more. The
// parameter generation is that of the opened disk that the call used. If this opened disk
// has ended (see Ender) and RetryOptions.Revive is set, abandonIfEnded abandons it, so
// that the next call opens the disk again.
func (r *retrying) abandonIfEnded(generation int) {
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

// startReopening starts a goroutine that first closes old, the disk that has failed, and
// then opens the disk again. If old is nil, the goroutine closes the opened disk for
// which abandon was called, if there is one. The caller holds mu and has checked that
// Close was not called.
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

// delayLocked returns how long to wait before the next attempt to open the disk again.
// Before the first attempt the delay is 0. Before a later attempt it is the delay from
// the RetryOptions, minus the time that has passed since the previous attempt. The
// caller holds mu.
func (r *retrying) delayLocked() time.Duration {
	if r.outage.failures == 0 {
		return 0
	}
	n := r.outage.failures + 2 // the calls waited for delays 1 and 2 before the first reopening
	wait, ok := r.policy.Wait(n, r.progress.Idle(r.outage.since))
	if !ok {
		wait = r.policy.Delay(n) // the calls from before the outage have given up by then
	}
	return max(wait-time.Since(r.outage.failedAt), 0)
}

// The method reopen closes old, the opened disk that has failed, if old is not nil. Then
// it opens the disk again. It closes the old disk first because the remote host that has
// the disk may limit the number of connections.
//
// lastErr is the error of the previous attempt to open the disk again, or nil. If there
// was such an attempt, reopen waits for the given delay before it opens the disk. reopen
// runs in its own goroutine, because each of the calls that wait for the disk may stop
// waiting earlier.
func (r *retrying) reopen(f *reopening, old *openedDisk, delay time.Duration, lastErr error) {
	defer r.work.Done()
	defer close(f.done)
	if old != nil {
		old.Close() // the disk failed already, so that this error is not of interest
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
		if err = r.checkIdentity(d); err == nil && r.samples != nil {
			err = r.compareSamples(d)
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

// checkIdentity returns an error if d is another disk than the one that was opened
// first, or if the state of the disk has changed.
func (r *retrying) checkIdentity(d *openedDisk) error {
	if d.Size() != r.Size() {
		return Changed(fmt.Errorf("the disk was replaced: it had %d bytes (identity %q), and now has %d bytes (identity %q)", r.Size(), r.first.id, d.Size(), d.id))
	}
	if d.id != r.first.id || d.proof != r.first.proof {
		return Changed(fmt.Errorf("the disk was replaced or changed: its identity was %q (proof of unchanged content: %s), and now is %q (proof of unchanged content: %s)", r.first.id, r.first.proof, d.id, d.proof))
	}
	return nil
}

// compareSamples reads some ranges of d that were also read before the disk was opened
// again, and returns an error if their content has changed. It is interrupted when Close
// is called, and when it takes longer than RetryOptions.Timeout.
func (r *retrying) compareSamples(d *openedDisk) error {
	stop := context.AfterFunc(r.ending, func() { d.cancel(context.Cause(r.ending)) })
	defer stop()
	late := time.AfterFunc(r.policy.Patience(), func() { d.cancel(errNoAnswer) })
	defer late.Stop()
	return r.samples.Check(func(p []byte, off int64) (more bool, err error) {
		_, err = readFull(d.Disk, p, off)
		return true, err
	})
}
