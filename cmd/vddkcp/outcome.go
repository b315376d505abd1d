package main

import (
	"errors"
	"io"
	"net"
	"os"
	"syscall"

	"github.com/vddkcp/vddkcp/cmd/vddkcp/internal/export"
	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vddk"
)

// Exit statuses, by docs/cli.md.
const (
	exitFailed     = 1
	exitUsage      = 2
	exitDifference = 3
	exitCanResume  = 75
)

// outcome is how a run ends that ended with an error, or with none.
type outcome struct {
	status report.Status
	exit   int // by docs/cli.md, "Exit status"
}

// outcomeOf says what err means. It is the one place that decides so. Whether
// work was kept has been decided before: a *transfer.ResumableError says so.
func outcomeOf(err error) outcome {
	var stopped *signalError
	var command *export.CommandStatus
	var batch *batchError
	switch {
	case err == nil:
		return outcome{report.StatusOK, 0}
	case errors.As(err, &command):
		return outcome{report.StatusFailed, command.Status}
	case errors.As(err, &batch):
		return outcome{report.StatusFailed, batch.exit}
	case errors.As(err, new(*differenceError)), errors.As(err, new(*transfer.MismatchError)), errors.As(err, new(*sourceopen.ManifestError)):
		return outcome{report.StatusMismatch, exitDifference}
	case errors.As(err, &stopped):
		return outcome{report.StatusInterrupted, 128 + int(stopped.signal)}
	case errors.As(err, new(*transfer.ResumableError)):
		// Before usage: a disk or a target that was open once may be refused by
		// an error that would be a mistake of the user's at the beginning.
		return outcome{report.StatusFailed, exitCanResume}
	case isUsage(err):
		return outcome{report.StatusFailed, exitUsage}
	case errors.As(err, new(*passingError)):
		return outcome{report.StatusFailed, exitCanResume}
	}
	return outcome{report.StatusFailed, exitFailed}
}

// isUsage says whether err is a mistake in the command line or the job file.
func isUsage(err error) bool {
	return errors.As(err, new(*usageError)) ||
		errors.As(err, new(*sinkopen.UsageError)) || errors.As(err, new(*sourceopen.UsageError)) ||
		errors.As(err, new(*sourceopen.ChoiceError)) || errors.Is(err, sourceopen.ErrNotRead) ||
		errors.As(err, new(*vddk.ParamsError)) || errors.As(err, new(*vddk.CertificateError))
}

// exitStatus is the exit status that err stands for.
func exitStatus(err error) int { return outcomeOf(err).exit }

// hint is what the user can do about err, or empty.
func hint(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

// passingError is a failure before anything was copied that another try may not
// have.
type passingError struct{ error }

func (e *passingError) Unwrap() error { return e.error }

// mayPass says whether a batch tries a job again that failed with err before
// anything was copied: a server was away or refused the disk, a program that
// opens disks was lost, or this machine was short of processes, descriptors or
// memory. An error that is permanent does not pass by itself.
func (j *job) mayPass(err error) bool {
	if unknown := (*net.DNSError)(nil); errors.As(err, &unknown) && unknown.IsNotFound {
		return false
	}
	if source.IsPermanent(err) {
		return false
	}
	for _, short := range []error{syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE} {
		if errors.Is(err, short) {
			return true
		}
	}
	if vddk.MayPass(err) || errors.As(err, new(*net.OpError)) || errors.Is(err, sink.ErrLost) {
		return true
	}
	_, from := j.at.source.(address.NBD)
	if _, to := j.at.target.(address.NBD); !from && !to {
		return false
	}
	for _, broken := range []error{io.EOF, io.ErrUnexpectedEOF, os.ErrDeadlineExceeded, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, broken) {
			return true
		}
	}
	return false
}
