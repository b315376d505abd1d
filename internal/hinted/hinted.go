// Package hinted adds hints to errors. A hint says what the user can do about an error. The
// command shows it on a line of its own, after the message.
package hinted

import "errors"

// Error returns an error that wraps err and has the given hint. The text of err does not change.
func Error(err error, hint string) error { return &hintedError{err, hint} }

// Of returns the hint of err. Every error that has a method Hint() string has a hint. If several
// of the errors that err wraps have one, the first in the order of errors.As counts. If there is
// none, Of returns "".
func Of(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

type hintedError struct {
	error
	hint string
}

func (e *hintedError) Unwrap() error { return e.error }
func (e *hintedError) Hint() string  { return e.hint }
