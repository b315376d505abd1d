package main

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// passingError is a failure before anything was copied that another try may not
// have.
type passingError struct{ error }

func (e *passingError) Unwrap() error { return e.error }

// ExitStatus implements the interface of package report.
func (*passingError) ExitStatus() int { return exit.Resumable }

// mayPass reports whether a batch tries a job again that failed with err before
// anything was copied. Besides what package report says, a broken connection to an
// NBD server is worth another try.
func (j *job) mayPass(err error) bool {
	if report.Of(err).Transient {
		return true
	}
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

// canGoOn says of a copy that failed before it began to write whether another
// run can go on: with an earlier copy, which this one left as it was, or, in a
// batch, when a server is there again.
func (j *job) canGoOn(err error) error {
	if err == nil || report.Of(err).Exit != exit.Failed {
		return err
	}
	if r := &j.resumption; r.earlier && !r.begun {
		if errors.Is(err, source.ErrGone) || errors.Is(err, sink.ErrUnfit) || errors.Is(err, fs.ErrExist) {
			return j.neverResumed(err)
		}
		offset := int64(0)
		if len(r.entries) > 0 {
			offset = r.entries[0].Offset
		}
		return &transfer.ResumableError{Err: err, Offset: offset}
	}
	if j.retried && j.mayPass(err) {
		return &passingError{err}
	}
	return err
}
