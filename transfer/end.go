package transfer

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// ResumableError is a failed copy that can go on where it was.
type ResumableError struct {
	Err    error
	Offset int64 // where it goes on, bytes
}

func (e *ResumableError) Error() string { return e.Err.Error() }

func (e *ResumableError) Unwrap() error { return e.Err }

// end ends the target of a copy that failed with err, if it did. It is the one
// place that decides whether the work is kept or removed: Copy documents the
// rule. A target that is kept gets the latest possible checkpoint.
func (p *pipeline) end(ctx context.Context, err error) error {
	if err == nil || errors.As(err, new(*MismatchError)) {
		return err // published, or suspended by verify
	}
	if p.keeper == nil || p.o.Keep == nil || nothingLeft(err) {
		return aborted(p.dst, err) // which removes no file that has its final name
	}
	existed := p.keeper.exists
	if !existed && !p.stopped(ctx) && !p.mayPass(err) {
		return aborted(p.dst, err)
	}
	kept := p.keepLast(ctx)
	if !existed && kept == nil && p.keeper.last.Offset == 0 && hopeless(err) {
		return aborted(p.dst, err) // nothing was done that could be kept
	}
	if p.stopped(ctx) {
		err = p.stopCause(err)
	}
	if kept != nil {
		err = fmt.Errorf("%w (and no checkpoint can be written, so that a later run starts over: %w)", err, kept)
	}
	if suspended := p.dst.Suspend(); suspended != nil && !errors.Is(suspended, sink.ErrClosed) {
		err = fmt.Errorf("%w (and closing the target: %w)", err, suspended)
	}
	return &ResumableError{Err: err, Offset: p.keeper.last.Offset}
}

// nothingLeft says whether err leaves nothing that a later run could go on with.
func nothingLeft(err error) bool {
	return errors.Is(err, ErrSourceChanged) || errors.Is(err, sink.ErrElsewhere) || errors.Is(err, sink.ErrUnsynced)
}

// keepLast writes a checkpoint of all that is done. A sink that is finished or
// has failed takes none: then the one before serves, or that of the beginning.
// It is an error where the journal holds no checkpoint afterwards.
func (p *pipeline) keepLast(ctx context.Context) error {
	if p.begun && !p.finished && p.keeper.final(ctx) == nil || p.keeper.exists {
		return nil
	}
	return p.keeper.store(*p.keeper.last)
}

// stopped says whether the copy was asked to stop.
func (p *pipeline) stopped(ctx context.Context) bool {
	return ctx.Err() != nil || p.o.stop().Err() != nil
}

// stopCause returns why the copy was asked to stop where err is only its
// consequence, else err.
func (p *pipeline) stopCause(err error) error {
	cause := context.Cause(p.o.stop())
	if cause != nil && (errors.Is(err, errStopped) || errors.Is(err, cause) || errors.As(err, new(*sourceError))) {
		return cause
	}
	return err
}

// mayPass says whether a later run may get over err, so that even a target
// without any checkpoint is worth keeping.
func (p *pipeline) mayPass(err error) bool {
	if errors.Is(err, sink.ErrLost) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return true
	}
	_, repeats := source.Ability[source.Counted](p.src)
	return repeats && errors.As(err, new(*sourceError))
}

// hopeless says whether a later run meets err again at the same place. It does not
// where a disk or a target that was open once can't be opened again.
func hopeless(err error) bool {
	return source.IsPermanent(err) && !errors.Is(err, source.ErrReopen) && !errors.Is(err, sink.ErrLost)
}

// aborted removes what was made for a copy that failed.
func aborted(dst sink.Disk, err error) error {
	if aborted := dst.Abort(); aborted != nil {
		return fmt.Errorf("%w (and cleaning up failed: %w)", err, aborted)
	}
	return err
}
