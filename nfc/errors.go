package nfc

import (
	"errors"
	"fmt"
	"strings"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/nfc/wire"
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
	var about []string
	if e.Host != "" {
		about = append(about, "host "+printable.Name(e.Host))
	}
	if e.Version != "" {
		about = append(about, "NFC version "+e.Version)
	}
	if e.Banner != "" && errors.As(e.Err, new(*wire.ProtocolError)) {
		about = append(about, "banner "+printable.Name(e.Banner))
	}
	if len(about) > 0 {
		text += " (" + strings.Join(about, ", ") + ")"
	}
	return text
}

func (e *Error) Unwrap() error { return e.Err }

// Transient reports whether a later attempt may succeed, for errors that are not marked with
// source.Permanent. It is called by report.Of.
func (e *Error) Transient() bool {
	if t := (interface{ Transient() bool })(nil); errors.As(e.Err, &t) {
		return t.Transient()
	}
	return !errors.As(e.Err, new(*wire.ProtocolError))
}

// Hint tells the user what to do about the error.
func (e *Error) Hint() string {
	if e.hint == "" && errors.As(e.Err, new(*wire.ProtocolError)) {
		return "run again with --nfc-trace FILE, and report the error with this file: docs/guide/nfc.md says how"
	}
	if e.hint == "" {
		return hinted.Of(e.Err)
	}
	return e.hint
}

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

// These are the codes of errors whose meaning is known.
const (
	codeMemory = 5  // the host has no memory left for NFC
	codeDenied = 11 // the file may not be opened in this way
)

// The method isMemory reports whether the memory of the host for NFC is used up.
func (e *hostError) isMemory() bool {
	return e.code == codeMemory || strings.Contains(e.text, "Failed to allocate")
}

// isMemory reports whether a host has refused a request because its memory for NFC is used up.
func isMemory(err error) bool {
	var e *hostError
	return errors.As(err, &e) && e.isMemory()
}

// isRefusal reports whether a host does not let the file be opened, or does not find it.
func isRefusal(err error) bool {
	var e *hostError
	return errors.As(err, &e) && (e.code == codeDenied || strings.Contains(e.text, "not find") || strings.Contains(e.text, "not found"))
}

// lostError says that a connection was lost.
type lostError struct{ err error }

func (e *lostError) Error() string { return "connection lost: " + e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// maxShown is the number of bytes of a text of a host that messages show.
const maxShown = 500

// printableText returns a text of a host in a form that can be shown: without control characters, and
// shortened if it is long.
func printableText(text string) string {
	text = strings.TrimRight(text, "\x00\r\n ")
	if len(text) > maxShown {
		text = text[:maxShown] + "..."
	}
	return printable.Line(text)
}
