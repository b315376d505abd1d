package vddk

import (
	"context"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/source"
)

// gaveUp returns the error with which to give up after n failures in a row,
// the first one at since and the last one err, or nil.
func (d *Disk) gaveUp(err error, n int, since time.Time) error {
	r, idle := &d.o.Retry, d.idle(since)
	_, patient := r.Wait(n, idle)
	switch {
	case source.IsPermanent(err), isRefusedLogin(err), r.Permanent != nil && r.Permanent(err), r.Retries == 0:
		return err
	case r.Retries > 0 && n > r.Retries:
		return fmt.Errorf("given up after %d retries: %w", r.Retries, err)
	case !patient:
		return fmt.Errorf("given up after %v without a read that succeeded: %w", idle.Round(time.Second), err)
	}
	return nil
}

// idle is how long there has been no request that succeeded, at most since a time.
func (d *Disk) idle(since time.Time) time.Duration {
	if last := d.started.Add(time.Duration(d.lastSuccess.Load())); last.After(since) {
		since = last
	}
	return time.Since(since)
}

// timeout is how long one attempt may take of what has made no progress since a
// time: no longer than the patience lasts.
func (d *Disk) timeout(most time.Duration, since time.Time) time.Duration {
	return min(most, max(d.o.Retry.Patience()-d.idle(since), time.Millisecond))
}

// sleep waits, and says whether it was for so long.
func sleep(ctx context.Context, stop <-chan struct{}, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
	case <-stop:
	}
	return false
}

// attempts are those of one request.
type attempts struct {
	d        *Disk
	failures int
	denied   int       // of them for memory, which don't count as long as less can be asked
	since    time.Time // when the request was made
}

// again is told of a failure in a seat that was given back. It waits and
// returns nil when the request is to be made once more.
func (a *attempts) again(t seat, err error) error {
	d := a.d
	if ended := d.ended(); ended != nil {
		return ended
	}
	if e := asError(err); e != nil && e.noMemory() && d.pace.Denied(t.asked) {
		d.debug("", "the host has no memory for a request; asking for less", "error", err)
		a.denied++
		d.retries.Add(1)
		d.pause(min(time.Duration(a.denied)*5*time.Millisecond, 100*time.Millisecond))
		return nil
	}
	a.failures++
	if err := d.gaveUp(err, a.failures, a.since); err != nil {
		return err
	}
	d.retries.Add(1)
	if isLost(err) {
		return nil // the handle that opens it again waits
	}
	wait, _ := d.o.Retry.Wait(a.failures, d.idle(a.since))
	if d.o.Retry.OnRetry != nil {
		d.o.Retry.OnRetry(err, wait)
	}
	if !d.pause(wait) {
		return d.ended()
	}
	if e := asError(err); a.failures > 1 && (e == nil || !e.noMemory()) && d.expendable() {
		// It may be the connection.
		t.s.kill(fmt.Errorf("replaced after errors: %w", err))
		d.lose(t.h, t.s, d.rangeOf("requests to", 0, 0), a.since)
	}
	return nil
}

// expendable says whether a worker may be given up that still answers: one with
// writes that were not flushed would take them along.
func (d *Disk) expendable() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.written == d.flushed
}

// pause waits, unless the disk ends.
func (d *Disk) pause(wait time.Duration) bool {
	return sleep(d.ctx, d.closed, wait)
}
