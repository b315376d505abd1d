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
	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// The method end completes the report of a copy. The parameter err is the error of the copy, or
// nil. The result is the error for the user, which names the source. If the user can continue the
// copy with --resume, the error has a hint that says so.
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

// count copies the counters, the digest and the result of --verify into the report.
func (j *job) count() {
	counts := j.result.Counts
	if counts == (progress.Snapshot{}) {
		counts = j.Counters.Snapshot()
	}
	counts.Waits = j.Counters.Snapshot().Waits // with those after the last write
	j.report.Count(counts)
	if j.result.Verify.Status != "" {
		j.report.Verify = j.result.Verify
	}
	j.report.Digest, j.report.PlacesAgain = j.result.Digest, j.result.Reread
}

// The method explain makes the error for the user from err. It adds the address of the source if
// the text of err does not contain it. If a later run can continue the copy, explain adds a hint.
func (j *job) explain(err error) error {
	if err == nil {
		return nil
	}
	var resumable *transfer.ResumableError
	if errors.As(err, &resumable) {
		advice := fmt.Sprintf("run again with --resume to continue the copy at byte %d", resumable.Offset)
		if why := hinted.Of(err); why != "" {
			advice = why + "; then " + advice
		}
		err = hinted.Error(err, advice)
	}
	if !strings.Contains(err.Error(), j.Source) {
		err = fmt.Errorf("copy %s: %w", j.Source, err)
	}
	return err
}

// mayContinue changes err, the error of a copy, in two cases. It returns any other error unchanged,
// in particular an error that already has an exit status of its own.
//
// First case: there is an earlier copy to continue, and this copy failed before it changed
// anything. A later run can still continue the earlier copy, and the result is a ResumableError.
// But if err shows that no run can ever continue the earlier copy, the result is the usage error
// that neverResumed returns.
//
// Second case: this copy is a job of a batch, and err is transient. The result is a retriedError,
// after which the batch tries the copy again.
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

// lostServer reports whether err says that a connection to an NBD server, to the server of a disk
// that Spec.OpenDisk has opened, or to the NFC service of a host was lost. Such an error is
// transient, although it has no method Transient that says so.
func (j *job) lostServer(err error) bool {
	_, from := j.at.source.(address.NBD)
	from = from || j.OpenDisk != nil || j.Way.Via == "nfc"
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

// retriedError is the transient error of a copy that has no checkpoint. A batch tries such a
// copy again from the beginning.
type retriedError struct{ error }

func (e *retriedError) Unwrap() error { return e.error }

// ExitStatus returns the exit status of a copy that can be resumed, so that the batch tries this
// copy again. It is called by report.Of.
func (*retriedError) ExitStatus() int { return exit.Resumable }
