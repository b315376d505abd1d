package job

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"syscall"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// end completes the report of a copy that ended with err. It returns the error for the
// user, which names the source, and which has a hint if --resume helps.
func (j *job) end(err error) error {
	err = j.mayContinue(err)
	j.countSource(err != nil)
	err = j.explain(err)
	j.count()
	if d := j.result.Digest; err == nil && d != nil {
		j.Log.Info("digest", d.Algorithm, d.Value)
	}
	return err
}

// count copies the counts, the digest and the result of verifying into the report.
func (j *job) count() {
	counts := j.result.Counts
	if counts == (progress.Snapshot{}) {
		counts = j.Counters.Snapshot()
	}
	j.report.Count(counts)
	if j.result.Verify.Status != "" {
		j.report.Verify = j.result.Verify
	}
	j.report.Digest = j.result.Digest
}

// explain adds to an error the address of the source, unless the error has it, and a hint
// if a later run can continue the copy.
func (j *job) explain(err error) error {
	if err == nil {
		return nil
	}
	var resumable *transfer.ResumableError
	if errors.As(err, &resumable) {
		advice := fmt.Sprintf("run again with --resume to continue the copy at byte %d", resumable.Offset)
		if why := report.Of(err).Hint; why != "" {
			advice = why + "; then " + advice
		}
		err = &hintedError{err, advice}
	}
	if !strings.Contains(err.Error(), j.Source) {
		err = fmt.Errorf("copy %s: %w", j.Source, err)
	}
	return err
}

// mayContinue decides what a later run can do after an error that happened before this copy
// began to write. If there is an earlier copy, a later run can still continue it, because this
// copy has changed nothing. In a batch, a copy with a transient error is tried again.
func (j *job) mayContinue(err error) error {
	if err == nil || report.Of(err).Exit != exit.Failed {
		return err
	}
	if j.earlier && !j.begun {
		if errors.Is(err, source.ErrGone) || errors.Is(err, sink.ErrUnfit) || errors.Is(err, fs.ErrExist) {
			return j.neverResumed(err)
		}
		offset := int64(0)
		if len(j.entries) > 0 {
			offset = j.entries[0].Offset
		}
		return &transfer.ResumableError{Err: err, Offset: offset}
	}
	if j.Batch && (report.Of(err).Transient || j.lostServer(err)) {
		return &retriedError{err}
	}
	return err
}

// lostServer reports whether err is a broken connection to an NBD server. Such an error is
// transient, although the error itself does not say so.
func (j *job) lostServer(err error) bool {
	_, from := j.at.source.(address.NBD)
	if _, to := j.at.target.(address.NBD); !from && !to || retry.IsPermanent(err) {
		return false
	}
	for _, broken := range []error{io.EOF, io.ErrUnexpectedEOF, os.ErrDeadlineExceeded, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, broken) {
			return true
		}
	}
	return false
}

// retriedError is a transient error of a copy that has no checkpoint. The batch tries the
// copy again from the beginning.
type retriedError struct{ error }

func (e *retriedError) Unwrap() error { return e.error }

// ExitStatus returns the exit status of a copy that can be resumed. report.Of calls it.
func (*retriedError) ExitStatus() int { return exit.Resumable }

// hintedError is an error and what the user can do about it.
type hintedError struct {
	error
	hint string
}

func (e *hintedError) Unwrap() error { return e.error }

// Hint returns what the user can do.
func (e *hintedError) Hint() string { return e.hint }
