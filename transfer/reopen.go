package transfer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// reopen opens a target again whose connection was lost, as of the last
// checkpoint. The failures are those since the last progress, and since is when
// the first of them was. An error of it is a sink.ErrLost, unless the copy was
// stopped: whatever refused the target, it was there before.
func (p *pipeline) reopen(ctx context.Context, cause error, failures int, since time.Time) (dst sink.Disk, err error) {
	o := p.o.Lost
	for {
		failures++
		wait, patient := o.Wait(failures, time.Since(since))
		if o.Retries >= 0 && failures > o.Retries || !patient {
			return nil, fmt.Errorf("given up after %d retries: %w", failures-1, cause)
		}
		if o.OnRetry != nil {
			o.OnRetry(cause, wait)
		}
		select {
		case <-time.After(wait):
		case <-p.o.stop().Done():
			return nil, errStopped
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
		if dst, err = p.reopenOnce(ctx, o.Patience()-time.Since(since)); err == nil {
			return dst, nil
		}
		cause = fmt.Errorf("open the target again: %w (%w)", err, sink.ErrLost)
		if source.IsPermanent(err) || errors.Is(err, ErrTail) || errors.As(err, new(*sink.OtherError)) {
			return nil, cause
		}
	}
}

// reopenOnce opens the target as of the last checkpoint and compares what was
// written last: a server that started again may serve another disk by the same
// name. Where only zeros were written so far, which proves nothing, it makes the
// copy go on from the start. The limit is how long the opening may take.
func (p *pipeline) reopenOnce(ctx context.Context, limit time.Duration) (sink.Disk, error) {
	last := p.keeper.last
	if last.Offset > 0 && !last.Proves() {
		state := last.State
		if p.origin != nil {
			state = p.origin
		}
		last = &Checkpoint{State: state}
		p.keeper.last, p.keeper.done = last, 0
	}
	dst, err := p.openWithin(ctx, limit, last)
	if err != nil {
		return nil, err
	}
	back, ok := sink.Ability[sink.Readback](dst)
	if !ok {
		return dst, nil
	}
	if err := last.CheckTail(ctx, back); err != nil {
		return nil, errors.Join(err, dst.Suspend())
	}
	return dst, nil
}

// errNoAnswer ends the opening of a target that hangs.
var errNoAnswer = errors.New("no answer")

// openWithin opens the target as of a checkpoint. That ends with the limit, and
// when the copy is to stop. The target lives under the context that it is opened
// with.
func (p *pipeline) openWithin(ctx context.Context, limit time.Duration, at *Checkpoint) (sink.Disk, error) {
	opening, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(limit, func() { cancel(errNoAnswer) })
	stopping := context.AfterFunc(p.o.stop(), func() { cancel(errStopped) })
	dst, err := p.o.Reopen(opening, at.State, at.Offset)
	// If the timer has fired or the stop has come, its function may still be about to
	// cancel the context: the target would be returned as open and then fail.
	inTime, running := late.Stop(), stopping()
	if !inTime || !running {
		<-opening.Done()
	}
	if err == nil && opening.Err() != nil { // it came too late
		err = errors.Join(context.Cause(opening), dst.Suspend())
	}
	if err != nil {
		cancel(nil)
		return nil, err
	}
	return dst, nil
}
