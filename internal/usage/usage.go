// Package usage defines the error for a mistake in a command line or in a job file.
package usage

import (
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/exit"
)

// Error reports an address, an option or a combination of options that is invalid,
// whatever files and servers contain. Trying again does not help: the user has to
// change the command.
type Error struct {
	err  error
	hint string
}

// New returns an error with a message and a hint, which may be empty.
func New(message, hint string) error { return &Error{errors.New(message), hint} }

// Errorf returns an error without a hint. It formats the message as fmt.Errorf
// does.
func Errorf(format string, args ...any) error { return &Error{err: fmt.Errorf(format, args...)} }

// Wrap returns err as a usage error, with the hint of err if it has one.
func Wrap(err error) error {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return &Error{err, h.Hint()}
	}
	return &Error{err: err}
}

// WithHint returns err as a usage error with the given hint, which replaces the hint of
// err.
func WithHint(err error, hint string) error { return &Error{err, hint} }

func (e *Error) Error() string { return e.err.Error() }

func (e *Error) Unwrap() error { return e.err }

// Hint returns what the user can do about the error; it may be empty.
func (e *Error) Hint() string { return e.hint }

// ExitStatus returns the exit status of a program that ends with this error, see
// docs/cli.md.
func (e *Error) ExitStatus() int { return exit.Usage }
