package nfc

import (
	"errors"
	"fmt"
)

// Step is a step of reading a disk from a host. Errors name the step that has failed.
type Step string

// The steps, in the order in which they happen.
const (
	StepTicket       Step = "ticket"
	StepConnect      Step = "connect"
	StepBanner       Step = "banner"
	StepTLS          Step = "tls"
	StepSession      Step = "session"
	StepThumbprint   Step = "thumbprint"
	StepProxy        Step = "proxy"
	StepSecondTLS    Step = "second tls"
	StepHello        Step = "handshake 36"
	StepVersion      Step = "handshake 51"
	StepFrames       Step = "handshake 52"
	StepOpenSession  Step = "open session"
	StepSockOpts     Step = "socket options"
	StepResourcePool Step = "resource pool"
	StepOpenFile     Step = "open file"
	StepDDB          Step = "disk database"
	StepRead         Step = "read"
	StepClose        Step = "close"
)

// Error is the error of a step of reading a disk from a host.
type Error struct {
	Step Step
	Err  error
	// Host, Banner and Version describe the host. They are empty if the connection has not come that
	// far. Version is the version of the host's NFC service, such as "11.0".
	Host, Banner, Version string

	hint string
}

func (e *Error) Error() string {
	text := fmt.Sprintf("nfc: %s: %v", e.Step, e.Err)
	if e.Host != "" {
		text += " (host " + e.Host
		if e.Version != "" {
			text += ", NFC version " + e.Version
		}
		text += ")"
	}
	return text
}

func (e *Error) Unwrap() error { return e.Err }

// Hint tells the user what to do about the error.
func (e *Error) Hint() string { return e.hint }

// hostError is an error that a host has sent in a frame.
type hostError struct {
	code uint64
	text string // printable; may be empty
}

func (e *hostError) Error() string {
	if e.text == "" {
		return fmt.Sprintf("the host reports error %d", e.code)
	}
	return fmt.Sprintf("the host reports error %d: %s", e.code, e.text)
}

// lostError says that a connection was lost.
type lostError struct{ err error }

func (e *lostError) Error() string { return "connection lost: " + e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

var errNotYet = errors.New("not implemented")
