package report_test

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"syscall"
	"testing"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// status is an error that stands for an exit status and wraps another one.
type status struct {
	exit  int
	inner error
}

func (e *status) Error() string   { return fmt.Sprintf("status %d", e.exit) }
func (e *status) Unwrap() error   { return e.inner }
func (e *status) ExitStatus() int { return e.exit }

// leftover is the error of work that was done and left something behind.
type leftover struct{ status }

func (*leftover) Done() bool   { return true }
func (*leftover) Hint() string { return "remove it" }

type resumable struct{ error }

func (resumable) Resumable() bool { return true }
func (resumable) ExitStatus() int { return 75 }
func (e resumable) Unwrap() error { return e.error }

type transient struct{ error }

func (transient) Transient() bool { return true }

// standIn passes another error on by its method As alone.
type standIn struct{ error }

func (e standIn) As(target any) bool { return errors.As(e.error, target) }

func TestOutcome(t *testing.T) {
	boom := errors.New("boom")
	at := func(exit int, inner ...error) error { return &status{exit, errors.Join(inner...)} }
	left := &leftover{status{5, boom}}
	for name, c := range map[string]struct {
		err  error
		want report.Outcome
	}{
		"success":                        {nil, report.Outcome{Status: report.StatusOK}},
		"any error":                      {boom, report.Outcome{Status: report.StatusFailed, Exit: 1}},
		"wrapped":                        {fmt.Errorf("copy: %w", at(2)), report.Outcome{Status: report.StatusFailed, Exit: 2}},
		"difference before signal":       {errors.Join(at(143), at(3)), report.Outcome{Status: report.StatusMismatch, Exit: 3}},
		"signal before resumable":        {resumable{at(130)}, report.Outcome{Status: report.StatusInterrupted, Exit: 130, Resumable: true}},
		"resumable before usage":         {resumable{at(2)}, report.Outcome{Status: report.StatusFailed, Exit: 75, Resumable: true}},
		"usage before others":            {errors.Join(at(4), at(2), boom), report.Outcome{Status: report.StatusFailed, Exit: 2}},
		"others before failed":           {errors.Join(boom, at(7)), report.Outcome{Status: report.StatusFailed, Exit: 7}},
		"by As":                          {standIn{at(2)}, report.Outcome{Status: report.StatusFailed, Exit: 2}},
		"done, and exit 5":               {left, report.Outcome{Status: report.StatusOK, Exit: 5, Hint: "remove it"}},
		"done, and exit 5, with context": {fmt.Errorf("machine web01: %w", left), report.Outcome{Status: report.StatusOK, Exit: 5, Hint: "remove it"}},
		"done, whatever the cause":       {&leftover{status{5, transient{at(130)}}}, report.Outcome{Status: report.StatusOK, Exit: 5, Hint: "remove it"}},
		"a failure beside what is done":  {errors.Join(left, boom), report.Outcome{Status: report.StatusFailed, Exit: 1, Hint: "remove it"}},
		"transient":                      {fmt.Errorf("open: %w", transient{boom}), report.Outcome{Status: report.StatusFailed, Exit: 1, Transient: true}},
		"permanent, though transient":    {retry.Permanent(transient{boom}), report.Outcome{Status: report.StatusFailed, Exit: 1}},
		"network":                        {&net.OpError{Op: "dial", Err: boom}, report.Outcome{Status: report.StatusFailed, Exit: 1, Transient: true}},
		"unknown host":                   {&net.OpError{Op: "dial", Err: &net.DNSError{IsNotFound: true}}, report.Outcome{Status: report.StatusFailed, Exit: 1}},
		"no descriptors":                 {&fs.PathError{Err: syscall.EMFILE}, report.Outcome{Status: report.StatusFailed, Exit: 1, Transient: true}},
		"no such file":                   {&fs.PathError{Err: syscall.ENOENT}, report.Outcome{Status: report.StatusFailed, Exit: 1}},
	} {
		if got := report.Of(c.err); got != c.want {
			t.Errorf("%s: %+v, want %+v", name, got, c.want)
		}
		if got := report.Of(c.err).Done(); got != (c.want.Status == report.StatusOK) {
			t.Errorf("%s: done %v", name, got)
		}
	}
}

// TestDoneWithExitStatus checks the report of a copy that succeeded while something else needs
// attention.
func TestDoneWithExitStatus(t *testing.T) {
	r := report.New("src", "dst")
	o := r.EndWith(&leftover{status{5, errors.New("the snapshot was not removed")}})
	if !o.Done() || r.Status != report.StatusOK || r.Exit != 5 || r.Error != "status 5" || r.Hint != "remove it" || r.Finished.IsZero() {
		t.Errorf("outcome %+v, report %+v", o, r)
	}
}
