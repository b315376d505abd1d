package report

import (
	"errors"
	"net"
	"slices"
	"syscall"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/retry"
)

// Outcome says how a run ended and what can be done next. [Of] derives it from the error that
// the run returned.
type Outcome struct {
	Status Status
	Exit   int    // exit status of the process; 0 if nothing needs attention
	Hint   string // what the user can do; "" if nothing is known
	// Resumable says that a later run with --resume continues where this one
	// stopped.
	Resumable bool
	// Transient says that the cause of the failure may disappear, so that it is worth trying
	// the same run again later. It is false for an error that package internal/retry treats as
	// permanent.
	Transient bool
}

// Done reports whether the target is complete. Even then Exit may be other than 0, if something
// else needs attention.
func (o Outcome) Done() bool { return o.Status == StatusOK }

// Of returns the outcome of a run that returned err; nil stands for success. No other code decides
// what an error means. Of uses these methods of err and of the errors that it wraps:
//
//   - ExitStatus() int: the exit status for the error. If no error has this method, the status
//     is [exit.Failed].
//   - Done() bool, of an error with ExitStatus: if it returns true, the work was done
//     although there is an error, and the errors that this one wraps are ignored.
//   - Hint() string: what the user can do. The first one found counts.
//   - Resumable() bool and Transient() bool: see the fields of Outcome.
//
// If the errors have several exit statuses, the first in this order counts: a difference, a
// signal, a copy that can be resumed, wrong usage, any other status. A copy that can be resumed
// comes before wrong usage for this reason: a disk that was open may be refused when it is opened
// again, with an error that would mean wrong usage at the beginning.
func Of(err error) Outcome {
	if err == nil {
		return Outcome{Status: StatusOK}
	}
	m := meaningOf(err)
	o := Outcome{Status: StatusFailed, Exit: m.exit, Hint: hinted.Of(err)}
	switch {
	case m.done:
		o.Status = StatusOK
	case m.exit == exit.Difference:
		o.Status = StatusMismatch
	case m.exit > exit.Signal:
		o.Status = StatusInterrupted
	}
	if r := (interface{ Resumable() bool })(nil); errors.As(err, &r) {
		o.Resumable = r.Resumable()
	}
	o.Transient = !m.done && isTransient(err)
	return o
}

// meaning is what an error means for the run: its exit status, and whether the work was done
// nevertheless.
type meaning struct {
	exit int
	done bool
}

// meaningOf returns the meaning of the most important error among err and the errors that it
// wraps.
func meaningOf(err error) meaning {
	var found []meaning
	if s := (interface{ ExitStatus() int })(nil); itself(err, &s) {
		d, _ := s.(interface{ Done() bool })
		m := meaning{exit: s.ExitStatus(), done: d != nil && d.Done()}
		if m.done {
			return m
		}
		found = append(found, m)
	}
	switch e := err.(type) {
	case interface{ Unwrap() error }:
		if inner := e.Unwrap(); inner != nil {
			found = append(found, meaningOf(inner))
		}
	case interface{ Unwrap() []error }:
		for _, inner := range e.Unwrap() {
			found = append(found, meaningOf(inner))
		}
	}
	if len(found) == 0 {
		return meaning{exit: exit.Failed}
	}
	return slices.MaxFunc(found, func(a, b meaning) int { return a.weight() - b.weight() })
}

// The function itself reports whether err itself has the type T, and if so sets target to it. It
// works like errors.As, but does not look at the errors that err wraps. Like errors.As, it calls
// the method As of err if there is one.
func itself[T any](err error, target *T) bool {
	if t, ok := err.(T); ok {
		*target = t
		return true
	}
	as, ok := err.(interface{ As(any) bool })
	return ok && as.As(target)
}

// weight says how important a meaning is. If an error wraps others, the meaning with the
// greatest weight counts.
func (m meaning) weight() int {
	switch {
	case m.done:
		return 0
	case m.exit == exit.Failed:
		return 1
	case m.exit == exit.Usage:
		return 3
	case m.exit == exit.Resumable:
		return 4
	case m.exit > exit.Signal:
		return 5
	case m.exit == exit.Difference:
		return 6
	}
	return 2
}

// isTransient reports whether the cause of err may disappear. The method Transient of err, or of an
// error that it wraps, decides this. If there is no such method, the cause may disappear if the
// network failed, or if this machine had too few processes, file descriptors or memory. An error
// that is marked as permanent is never transient.
func isTransient(err error) bool {
	if retry.IsPermanent(err) {
		return false
	}
	if unknown := (*net.DNSError)(nil); errors.As(err, &unknown) && unknown.IsNotFound {
		return false
	}
	if t := (interface{ Transient() bool })(nil); errors.As(err, &t) {
		return t.Transient()
	}
	for _, shortage := range []error{syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE} {
		if errors.Is(err, shortage) {
			return true
		}
	}
	return errors.As(err, new(*net.OpError))
}
