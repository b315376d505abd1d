package transfer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/sink"
)

// errNoAnswer says that opening a target again has reached its time limit.
var errNoAnswer = errors.New("the target did not answer in time")

// reopener opens a target again after its connection was lost.
type reopener struct {
	policy retry.Policy                                                             // of Options.Lost
	open   func(ctx context.Context, state []byte, resume int64) (sink.Disk, error) // Options.Reopen
	stop   context.Context                                                          // Options.Stop
	origin []byte                                                                   // the state of the target before the first write; nil: an earlier run made that write
}

// The method reopen opens the target at the last checkpoint of the keeper k, after the connection
// to the target ended with the error cause. Even if the error cause is permanent, reopen tries a
// new connection, which may succeed. The retry policy r.policy limits the number of tries and the
// time for them. The parameter failures is the number of earlier failures since the copy last made
// progress, and lostAt is the time of the first of these failures.
//
// If the copy was stopped, the error of reopen is errStopped or the cause of ctx. In other cases
// the error is an ErrLost, so that a later run can continue.
func (r *reopener) reopen(ctx context.Context, k *keeper, cause error, failures int, lostAt time.Time) (dst sink.Disk, err error) {
	for {
		failures++
		idle := time.Since(lostAt)
		wait, patient := r.policy.Wait(failures, idle)
		switch {
		case r.policy.Retries >= 0 && failures > r.policy.Retries:
			return nil, fmt.Errorf("the connection to the target has failed %d times without progress, and at most %d retries are allowed: %w", failures, r.policy.Retries, cause)
		case !patient:
			return nil, r.policy.TimedOut(cause, idle)
		}
		if !r.policy.Pause(ctx, cause, wait, r.stop.Done()) {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			return nil, errStopped
		}
		if dst, err = r.openProven(ctx, k, r.policy.Patience()-time.Since(lostAt)); err == nil {
			return dst, nil
		}
		cause = fmt.Errorf("cannot open the target again: %w (the reason for opening it again: %w)", err, sink.ErrLost)
		if retry.IsPermanent(err) || errors.Is(err, ErrTail) || errors.As(err, new(*sink.OtherError)) {
			return nil, cause
		}
	}
}

// openProven opens the target at the last checkpoint. It checks that the target has the content
// that the tail of this checkpoint describes, because a restarted server may serve another disk by
// the same name. If only zeros were written so far, they prove nothing, and the copy restarts from
// the beginning. The parameter limit is how long the opening may take.
func (r *reopener) openProven(ctx context.Context, k *keeper, limit time.Duration) (sink.Disk, error) {
	last := k.restartUnproven(r.origin)
	dst, err := r.openWithin(ctx, limit, last)
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

// openWithin opens the target at a checkpoint. It returns errNoAnswer if that takes longer than the
// given limit, and errStopped if the copy is stopped. The open target keeps using the context with
// which it was opened, so openWithin cancels this context only after an error.
func (r *reopener) openWithin(ctx context.Context, limit time.Duration, checkpoint *Checkpoint) (sink.Disk, error) {
	opening, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(limit, func() { cancel(errNoAnswer) })
	stopping := context.AfterFunc(r.stop, func() { cancel(errStopped) })
	dst, err := r.open(opening, checkpoint.State, checkpoint.Offset)
	// If the time is over or the copy was stopped, another goroutine is about to cancel the
	// context. openWithin waits for that, because it must not return a target that fails right
	// afterwards.
	inTime, running := late.Stop(), stopping()
	if !inTime || !running {
		<-opening.Done()
	}
	if err == nil && opening.Err() != nil { // it was opened too late
		err = errors.Join(context.Cause(opening), dst.Suspend())
	}
	if err != nil {
		cancel(nil)
		return nil, err
	}
	return dst, nil
}
