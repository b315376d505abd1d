// Package usage has the error of a mistake in a command line or in a job file.
package usage

import "fmt"

// Error reports an address, an option or a combination of options that makes no
// sense whatever the files hold and whatever the servers answer. Trying again
// does not help: the user has to change the command.
type Error struct {
	message string
	hint    string
}

// New returns an error with a message and, unless it is empty, a hint.
func New(message, hint string) error { return &Error{message, hint} }

// Errorf returns an error without a hint, whose message is formatted as by
// fmt.Sprintf. The verb %w is not supported.
func Errorf(format string, args ...any) error { return &Error{message: fmt.Sprintf(format, args...)} }

func (e *Error) Error() string { return e.message }

// Hint returns what the user can do about the error; it may be empty.
func (e *Error) Hint() string { return e.hint }

// ExitStatus returns the exit status of a program that ends with this error, see
// docs/cli.md.
func (e *Error) ExitStatus() int { return 2 }
