package worker

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
)

// ErrBusy says that the previous request with the same slot is still in progress in the library.
// That happens if the context of the previous call ended before the library had completed the
// request.
var ErrBusy = errors.New("no request can be made with this slot of shared memory, because the library has not completed the previous request with it")

// Error is an error that a function of the library returned.
type Error struct {
	Code uint64 // VixError: the low 16 bits are the code, the others additional information
	Op   string // function that returned the error, such as "VixDiskLib_Open"
	Text string // text of VixDiskLib_GetErrorText; "" if there is none
}

func (e *Error) Error() string {
	text := e.Text
	if text == "" {
		text = "no text"
	}
	if e.Code > 0xffff {
		return fmt.Sprintf("%s: error %d (%#x): %s", e.Op, e.Kind(), e.Code, text)
	}
	return fmt.Sprintf("%s: error %d: %s", e.Op, e.Code, text)
}

// Kind returns the low 16 bits of Code, which identify the error.
func (e *Error) Kind() uint16 { return uint16(e.Code) }

// These are the error codes of the library that callers must tell apart. Error.Kind returns such
// a code.
const (
	CodeFail         = 1
	CodeOutOfMemory  = 2
	CodeInvalidArg   = 3
	CodeFileNotFound = 4
	CodeNotSupported = 6
	CodeNoAccess     = 13
	CodeLoginRefused = 3014 // also if the user lacks a permission
	CodeNoSnapshot   = 13003
	CodeRefused      = 14009
)

// StartError says that a worker process could not be started, because the system had no more
// processes, file descriptors or memory. The same start may succeed later.
type StartError struct{ Err error }

func (e *StartError) Error() string {
	return "cannot start a worker process for VDDK: " + e.Err.Error()
}
func (e *StartError) Unwrap() error { return e.Err }

// Transient tells package transfer/report that the same start may succeed later.
func (*StartError) Transient() bool { return true }

// Hint tells the user what to do about the error.
func (e *StartError) Hint() string {
	switch {
	case errors.Is(e.Err, syscall.EMFILE), errors.Is(e.Err, syscall.ENFILE):
		return "all file descriptors are in use: raise the limit (ulimit -n), or copy fewer disks at a time"
	case errors.Is(e.Err, syscall.EAGAIN):
		return "no process can be created: raise the limit of processes (ulimit -u, TasksMax of the systemd unit, the pids limit of the container), or copy fewer disks at a time"
	}
	return "the system is out of memory: copy fewer disks at a time, or lower --connections and --request-size"
}

// outOf reports whether err says that the system has no more processes, file descriptors or memory.
func outOf(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// GoneError says that the worker process has ended, and how. It is returned by all calls that
// were in progress at that time, and by all later calls.
type GoneError struct {
	PID    int
	Signal syscall.Signal // the signal that ended the process; 0 if it exited
	Status int            // the exit status
	Killed bool           // this package killed the process
	Closed bool           // the process ended after Close had closed the disk
	Reason string         // why the worker ended itself, or why it was killed; "" if it is not known
	Last   []string       // the last lines that it wrote to standard output and error
}

func (e *GoneError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "vddk worker %d ", e.PID)
	switch {
	case e.Closed:
		b.WriteString("was closed")
	case e.Killed:
		b.WriteString("was killed")
	case e.Signal == syscall.SIGKILL:
		b.WriteString("was killed by another process, or by the kernel because the system was out of memory")
	case e.Signal != 0:
		fmt.Fprintf(&b, "died: %v", e.Signal)
	default:
		fmt.Fprintf(&b, "exited with status %d", e.Status)
	}
	if e.Reason != "" {
		fmt.Fprintf(&b, ": %s", e.Reason)
	}
	if len(e.Last) > 0 && !e.Closed {
		fmt.Fprintf(&b, " (last output: %s)", strings.Join(e.Last, " / "))
	}
	return b.String()
}

// LoadError says why the library could not be loaded into the worker process.
type LoadError struct {
	Library   string
	Text      string   // message of the dynamic linker; "" if functions are missing
	Libraries []string // libraries that Library needs, directly or through others, and that were not found
	Functions []string // required functions that Library does not have
}

func (e *LoadError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "load %s: ", e.Library)
	if len(e.Functions) > 0 {
		fmt.Fprintf(&b, "the library lacks the functions %s", strings.Join(e.Functions, ", "))
		return b.String()
	}
	b.WriteString(e.Text)
	if len(e.Libraries) > 0 {
		fmt.Fprintf(&b, " (libraries that were not found: %s)", strings.Join(e.Libraries, ", "))
	}
	return b.String()
}

// Temporary reports whether the library may load later, because the dynamic linker only lacked
// memory or file descriptors.
func (e *LoadError) Temporary() bool {
	for _, errno := range []syscall.Errno{syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE} {
		if strings.HasSuffix(strings.ToLower(e.Text), errno.Error()) {
			return true
		}
	}
	return strings.HasSuffix(e.Text, "failed to map segment from shared object")
}

// Transient tells package transfer/report that the library may load later. If the LoadError is
// not Temporary, package vddk marks it as permanent, and transfer/report then ignores this
// method.
func (*LoadError) Transient() bool { return true }

// Hint tells the user what to do about the error. It is "" if nothing is known.
func (e *LoadError) Hint() string {
	if e.Temporary() {
		return "this process or the system has no memory or file descriptors left (ulimit -n, ulimit -v): copy fewer disks at a time"
	}
	if len(e.Functions) > 0 {
		return "the file is not a VDDK library of version 5.5.5 or later"
	}
	for _, name := range e.Libraries {
		if strings.HasPrefix(name, "libssl.so.3") || strings.HasPrefix(name, "libcrypto.so.3") {
			return "VDDK 8.0.2 and later need OpenSSL 3: use VDDK 8.0.1, or a newer system"
		}
	}
	if len(e.Libraries) > 0 {
		return "install " + strings.Join(e.Libraries, ", ") + ", or use a VDDK made for this system"
	}
	return ""
}

// ProgramError says that the worker program, which loads the library, could not be started. If
// Config.Program does not name the program, several places were tried.
type ProgramError struct {
	Tried []error // why the program of each place could not be started
}

func (e *ProgramError) Error() string {
	return "cannot start vddkcp-vddk-worker, which loads VDDK: " + join(e.Tried)
}

// Unwrap returns one error for each place in which the program was looked for. errors.Is and
// errors.As examine all of them.
func (e *ProgramError) Unwrap() []error { return e.Tried }

// Hint tells the user what to do about the error.
func (e *ProgramError) Hint() string {
	return "build vddkcp with make (it needs gcc), or put vddkcp-vddk-worker into the folder of the vddkcp executable or into ../libexec/vddkcp"
}

// The function join returns the texts of the errors, separated by semicolons.
func join(list []error) string {
	texts := make([]string, len(list))
	for i, err := range list {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}
