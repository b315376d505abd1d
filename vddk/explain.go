package vddk

import (
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// explainer adds information to the errors of worker processes: the name of the disk, the range of
// bytes that the operation concerns, and what the library logged. It is safe for concurrent use.
type explainer struct {
	at      *atomic.Pointer[destination] // where the disk is now
	log     *logs
	wasOpen atomic.Bool // the disk was opened at least once
	wasRead atomic.Bool // at least one read succeeded
}

// The method explain returns err as the error of an operation on the bytes [off, off+n) of the
// disk. The parameter n is 0 if the operation concerns the whole disk. The parameter mark is a
// result of logs.mark: the position in the log at which the operation began. The lines after this
// position are added to the error. If the worker process crashed or was killed, explain returns a
// *lostError.
func (x *explainer) explain(op string, off, n, mark int64, err error) error {
	var gone *worker.GoneError
	var lost *lostError
	var failed *worker.Error
	var load *worker.LoadError
	var program *worker.ProgramError
	switch {
	case errors.As(err, &lost):
		return err
	case errors.As(err, &gone):
		return &lostError{op: x.rangeOf(op, off, n), err: err}
	case errors.As(err, &load) && load.Temporary():
		return err
	case errors.As(err, &load), errors.As(err, &program):
		return x.openFailed(err)
	case errors.As(err, &failed):
		at := x.at.Load()
		e := &Error{Op: op, Func: failed.Op, Disk: at.params.File, Off: off, Len: n, Code: failed.Code, Text: failed.Text,
			Last: x.log.since(mark), expected: at.thumbprint, first: op == "read" && !x.wasRead.Load(), secret: at.params.oddSecret()}
		if e.permanent() {
			return x.openFailed(e)
		}
		return e
	}
	return fmt.Errorf("VDDK: %s: %w", x.rangeOf(op, off, n), err)
}

// openFailed marks err, an error of opening the disk, as permanent. It returns err as it is if
// the disk could be opened before, because the same opening may then succeed later.
func (x *explainer) openFailed(err error) error {
	if !x.wasOpen.Load() {
		return source.Permanent(err)
	}
	return err
}

// rangeOf returns a text for messages that names the operation, the disk and the bytes [off, off+n)
// of it. If n is 0, the text does not name bytes.
func (x *explainer) rangeOf(op string, off, n int64) string {
	disk := x.at.Load().params.File
	if n == 0 {
		return op + " " + disk
	}
	return fmt.Sprintf("%s %s [%d, %d)", op, disk, off, off+n)
}
