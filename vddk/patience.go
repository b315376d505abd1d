package vddk

import (
	"context"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/source"
)

// patience decides how often and how long a failed request or opening is repeated.
// It is safe for concurrent use.
type patience struct {
	source.RetryOptions
	started     time.Time
	lastSuccess atomic.Int64 // time of the last request that succeeded, in ns since started
}

// succeeded records that a request has just succeeded. It returns the time since
// the disk was opened.
func (p *patience) succeeded() time.Duration {
	now := time.Since(p.started)
	p.lastSuccess.Store(int64(now))
	return now
}

// idle returns the time since the last request that succeeded, but not more than the
// time that has passed after since.
func (p *patience) idle(since time.Time) time.Duration {
	if last := p.started.Add(time.Duration(p.lastSuccess.Load())); last.After(since) {
		since = last
	}
	return time.Since(since)
}

// timeout returns how long the next attempt may take: most, or less if
// RetryOptions.Timeout is over sooner. since is when the call began.
func (p *patience) timeout(most time.Duration, since time.Time) time.Duration {
	return min(most, max(p.Patience()-p.idle(since), time.Millisecond))
}

// exhausted returns nil if a call may be repeated after n failures in a row, else
// the error to give up with. The first failure was at since; err is the last one.
func (p *patience) exhausted(err error, n int, since time.Time) error {
	idle := p.idle(since)
	_, patient := p.Wait(n, idle)
	switch {
	case source.IsPermanent(err), isRefusedLogin(err), p.Permanent != nil && p.Permanent(err), p.Retries == 0:
		return err
	case p.Retries > 0 && n > p.Retries:
		return fmt.Errorf("given up after %d retries: %w", p.Retries, err)
	case !patient:
		return fmt.Errorf("given up after %v without a read that succeeded: %w", idle.Round(time.Second), err)
	}
	return nil
}

// announce calls RetryOptions.OnRetry before a wait, which follows the error err.
func (p *patience) announce(err error, wait time.Duration) {
	if p.OnRetry != nil {
		p.OnRetry(err, wait)
	}
}

// sleep waits for d. It returns false if ctx ended or stop was closed before that.
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
