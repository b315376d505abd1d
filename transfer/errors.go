package transfer

import (
	"errors"
	"fmt"
	"syscall"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// ErrSourceChanged says that the source, or the backing of the target, has changed
// since it was planned or opened, so that the target may be a mixture of two states.
// It is the only error in the middle of a copy that removes work which a checkpoint
// covers.
var ErrSourceChanged = source.ErrChanged

// ResumableError is the error of a failed copy that a later run can continue. It
// has the text of Err.
type ResumableError struct {
	Err    error
	Offset int64 // where the later run continues, in bytes
}

func (e *ResumableError) Error() string { return e.Err.Error() }
func (e *ResumableError) Unwrap() error { return e.Err }

// ExitStatus returns the exit status of a copy that can be resumed. report.Of calls it.
func (*ResumableError) ExitStatus() int { return exit.Resumable }

// Resumable returns true. report.Of calls it.
func (*ResumableError) Resumable() bool { return true }

// leavesNothing reports whether no later run can continue a copy that failed with err.
func leavesNothing(err error) bool {
	return errors.Is(err, ErrSourceChanged) || errors.Is(err, sink.ErrElsewhere) || errors.Is(err, sink.ErrUnsynced)
}

// isTemporary reports whether err may not occur in a later run, so that the target of
// a copy is kept even if it has no checkpoint yet.
func isTemporary(err error, src source.Disk) bool {
	if errors.Is(err, sink.ErrLost) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) {
		return true
	}
	_, repeats := source.Ability[source.Counted](src)
	return repeats && errors.As(err, new(*sourceError))
}

// isHopeless reports whether err will occur again in every later run. Failing to reopen a
// disk or a target that was open before is not hopeless.
func isHopeless(err error) bool {
	return source.IsPermanent(err) && !errors.Is(err, source.ErrReopen) && !errors.Is(err, sink.ErrLost)
}

// abort aborts the target of a copy that failed with err. It returns err, and adds the
// error of Abort if that fails too.
func abort(dst sink.Disk, err error) error {
	if aborted := dst.Abort(); aborted != nil {
		return fmt.Errorf("%w (and cleaning up failed: %w)", err, aborted)
	}
	return err
}
