// Package usage defines the error for a mistake in a command line or in a job file.
package usage

import (
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/hinted"
)

// Error reports an invalid address or option, or options that exclude each other. The command is
// wrong in any case, regardless of the content of files and servers. It makes no sense to run it
// again before the user has changed it.
type Error struct {
	err  error
	hint string
}

// New returns an Error with a message and a hint. The hint may be empty.
func New(message, hint string) error { return &Error{errors.New(message), hint} }

// Errorf returns an Error without a hint. It formats the message as fmt.Errorf does.
func Errorf(format string, args ...any) error { return &Error{err: fmt.Errorf(format, args...)} }

// Wrap returns an Error that wraps err. It has the hint of err, if err has one.
func Wrap(err error) error { return &Error{err, hinted.Of(err)} }

// WithHint returns an Error that wraps err and has the given hint. If err has a hint of its
// own, that hint is not used.
func WithHint(err error, hint string) error { return &Error{err, hint} }

func (e *Error) Error() string { return e.err.Error() }

func (e *Error) Unwrap() error { return e.err }

// Hint tells the user what to do about the error. It may be empty.
func (e *Error) Hint() string { return e.hint }

// ExitStatus returns the exit status of a program that ends because of this error. docs/cli.md
// lists the exit statuses.
func (e *Error) ExitStatus() int { return exit.Usage }
