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

// end fills in the report of a copy that ended with err. It returns the error to be
// shown: with the source's address, and with a hint at --resume if that helps.
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

// count fills in what the copy counted and found out.
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

// explain adds to an error what a user needs: the hint at --resume, and the source
// unless the error names it.
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

// mayContinue decides whether another run may continue after an error that happened
// before this copy began to write. It may continue an earlier copy, which this one
// left as it was. In a batch it may try again when a server has recovered.
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

// lostServer reports whether err is a broken connection to an NBD server, which is
// worth another try although no error says so.
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

// retriedError is the error of a copy that the batch tries again, although there is
// no checkpoint to continue at.
type retriedError struct{ error }

func (e *retriedError) Unwrap() error { return e.error }

// ExitStatus implements the interface of package report.
func (*retriedError) ExitStatus() int { return exit.Resumable }

// hintedError is an error and what the user can do about it.
type hintedError struct {
	error
	hint string
}

func (e *hintedError) Unwrap() error { return e.error }

// Hint returns what the user can do.
func (e *hintedError) Hint() string { return e.hint }
