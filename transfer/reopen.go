package transfer

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/sink"
)

// errNoAnswer ends the opening of a target that hangs.
var errNoAnswer = errors.New("no answer from the target")

// reopener opens a target again after its connection was lost.
type reopener struct {
	policy retry.Policy                                                             // of Options.Lost
	open   func(ctx context.Context, state []byte, resume int64) (sink.Disk, error) // Options.Reopen
	stop   context.Context                                                          // Options.Stop
	origin []byte                                                                   // the state of the target before the first write; nil: an earlier run made that write
}

// reopen opens the target as of the last checkpoint of k, and retries as the policy
// says. cause is the loss of the target; it is retried even if it is permanent for the
// connection that it ended. failures counts the failures since the copy last made
// progress, and since is when the first of them was. The error is an ErrLost, unless
// the copy was stopped: a target that was open once is worth another run, whatever
// refuses to open it now.
func (r *reopener) reopen(ctx context.Context, k *keeper, cause error, failures int, since time.Time) (dst sink.Disk, err error) {
	for {
		failures++
		idle := time.Since(since)
		wait, patient := r.policy.Wait(failures, idle)
		switch {
		case r.policy.Retries >= 0 && failures > r.policy.Retries:
			return nil, fmt.Errorf("gave up after %d retries: %w", r.policy.Retries, cause)
		case !patient:
			return nil, r.policy.TimedOut(cause, idle)
		}
		if !r.policy.Pause(ctx, cause, wait, r.stop.Done()) {
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			return nil, errStopped
		}
		if dst, err = r.openProven(ctx, k, r.policy.Patience()-time.Since(since)); err == nil {
			return dst, nil
		}
		cause = fmt.Errorf("open the target again: %w (%w)", err, sink.ErrLost)
		if retry.IsPermanent(err) || errors.Is(err, ErrTail) || errors.As(err, new(*sink.OtherError)) {
			return nil, cause
		}
	}
}

// openProven opens the target and checks that it has the tail of the checkpoint: a
// server that was restarted may serve another disk by the same name. If only zeros
// were written so far, which are on every new disk too, the copy restarts from the
// beginning. The limit is how long the opening may take.
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

// openWithin opens the target as of a checkpoint. After the limit the opening ends
// with errNoAnswer, and when the copy is to stop, with errStopped. The target
// lives under the context that it is opened with.
func (r *reopener) openWithin(ctx context.Context, limit time.Duration, at *Checkpoint) (sink.Disk, error) {
	opening, cancel := context.WithCancelCause(ctx)
	late := time.AfterFunc(limit, func() { cancel(errNoAnswer) })
	stopping := context.AfterFunc(r.stop, func() { cancel(errStopped) })
	dst, err := r.open(opening, at.State, at.Offset)
	// If the timer has fired or the stop has come, its function may still be about
	// to cancel the context: the target would be returned as open and then fail.
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
