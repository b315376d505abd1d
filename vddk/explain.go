package vddk

import (
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

// explain makes an error of a worker one that names what failed and where. The
// mark is where the library's log was at the beginning of the call.
func (d *Disk) explain(op string, off, n, mark int64, err error) error {
	var gone *worker.GoneError
	var lost *lostError
	var failed *worker.Error
	var load *worker.LoadError
	var program *worker.ProgramError
	switch {
	case errors.As(err, &lost):
		return err
	case errors.As(err, &gone):
		return &lostError{op: d.rangeOf(op, off, n), err: err}
	case errors.As(err, &load) && load.Temporary():
		return err
	case errors.As(err, &load), errors.As(err, &program):
		return d.failed(err)
	case errors.As(err, &failed):
		e := &Error{Op: op, Func: failed.Op, Disk: d.params.File, Off: off, Len: n, Code: failed.Code, Text: failed.Text,
			Last: d.log.since(mark), expected: d.request.Thumbprint, first: op == "read" && !d.anyRead.Load(), secret: d.params.oddSecret()}
		if e.permanent() {
			return d.failed(e)
		}
		return e
	}
	return fmt.Errorf("VDDK: %s: %w", d.rangeOf(op, off, n), err)
}

// rangeOf names what is done, to which disk and where.
func (d *Disk) rangeOf(op string, off, n int64) string {
	if n == 0 {
		return op + " " + d.params.File
	}
	return fmt.Sprintf("%s %s [%d, %d)", op, d.params.File, off, off+n)
}
