package transfer

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// ErrSourceChanged says that the source, or the backing image of the target, has changed since it
// was opened or since the copy was planned. The target may then be a mixture of two states. In the
// middle of a copy, this is the only error after which copied data is removed although a checkpoint
// exists.
var ErrSourceChanged = source.ErrChanged

// ResumableError is the error of a failed copy that a later run can continue. Its text is the
// text of Err.
type ResumableError struct {
	Err    error
	Offset int64 // where the later run continues, in bytes
}

func (e *ResumableError) Error() string { return e.Err.Error() }
func (e *ResumableError) Unwrap() error { return e.Err }

// ExitStatus returns the exit status for a copy that can be resumed. It is called by report.Of.
func (*ResumableError) ExitStatus() int { return exit.Resumable }

// Resumable returns true: the copy can be resumed. It is called by report.Of.
func (*ResumableError) Resumable() bool { return true }

// leavesNothing reports whether err means that nothing is left for a later run to continue.
func leavesNothing(err error) bool {
	return errors.Is(err, ErrSourceChanged) || errors.Is(err, sink.ErrElsewhere) || errors.Is(err, sink.ErrUnsynced)
}

// isTemporary reports whether a later run may succeed after a copy failed with err. After such an
// error the target is kept even if the copy has no checkpoint yet. An error of the source counts as
// temporary only if the source implements source.Counted, because such a source has already
// repeated the failed read in vain.
func isTemporary(err error, src source.Disk) bool {
	if errors.Is(err, sink.ErrLost) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return true
	}
	_, repeats := source.Ability[source.Counted](src)
	return repeats && errors.As(err, new(*sourceError))
}

// isHopeless reports whether every later run will fail with err again. An error while reopening
// a disk or a target is not hopeless, because opening it has succeeded before.
func isHopeless(err error) bool {
	return source.IsPermanent(err) && !errors.Is(err, source.ErrReopen) && !errors.Is(err, sink.ErrLost)
}

// The function abort calls dst.Abort for the target dst of a copy that failed with err. It returns
// err. If Abort fails too, the result wraps both errors.
func abort(dst sink.Disk, err error) error {
	if aborted := dst.Abort(); aborted != nil {
		return fmt.Errorf("%w (and cleaning up failed: %w)", err, aborted)
	}
	return err
}

// The function suspend calls dst.Suspend for the target dst of a copy that failed with err. It
// returns err. If Suspend fails too, the result wraps both errors.
func suspend(dst sink.Disk, err error) error {
	if suspended := dst.Suspend(); suspended != nil && !errors.Is(suspended, sink.ErrClosed) {
		return fmt.Errorf("%w (and closing the target failed: %w)", err, suspended)
	}
	return err
}
