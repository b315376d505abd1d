// Package hinted adds hints to errors. A hint says what the user can do about an error. The
// command shows it on a line of its own, after the message.
package hinted

import "errors"

// Error returns an error that wraps err and has the given hint. The text of err does not change.
func Error(err error, hint string) error { return &hintedError{err, hint} }

// Of returns the hint of err. Every error that has a method Hint() string has a hint. err may wrap
// several errors that have hints. Then Of returns the hint that errors.As finds first. If neither
// err nor an error that it wraps has a hint, Of returns "".
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
