package worker

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
)

// ErrBusy is returned for a slot whose last request has no completion yet. That
// happens only after a call was given up because its context ended.
var ErrBusy = errors.New("the library still has a request in this slot")

// Error is an error of the library.
type Error struct {
	Code uint64 // VixError; the low 16 bits are the code, the others say more of it
	Op   string // the function that returned it: "VixDiskLib_Open"
	Text string // by VixDiskLib_GetErrorText, "" where that was not to be had
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

// Kind is the code without what the upper bits say.
func (e *Error) Kind() uint16 { return uint16(e.Code) }

// Codes of the library that callers decide on, as Kind returns them.
const (
	CodeFail         = 1
	CodeOutOfMemory  = 2
	CodeInvalidArg   = 3
	CodeFileNotFound = 4
	CodeNotSupported = 6
	CodeNoAccess     = 13
	CodeLoginRefused = 3014 // also of a user without permissions
	CodeNoSnapshot   = 13003
	CodeRefused      = 14009
)

// StartError says that the system had no process, descriptor or memory left
// for a worker. The same start may succeed later.
type StartError struct{ Err error }

func (e *StartError) Error() string {
	return "cannot start a worker process for VDDK: " + e.Err.Error()
}
func (e *StartError) Unwrap() error { return e.Err }

// Transient tells transfer/report that a process may start later: this machine may
// be short of processes, file descriptors or memory.
func (*StartError) Transient() bool { return true }

// Hint says what to do.
func (e *StartError) Hint() string {
	switch {
	case errors.Is(e.Err, syscall.EMFILE), errors.Is(e.Err, syscall.ENFILE):
		return "all file descriptors are in use: raise the limit (ulimit -n), or copy fewer disks at a time"
	case errors.Is(e.Err, syscall.EAGAIN):
		return "no process can be created: raise the limit of processes (ulimit -u, TasksMax of the systemd unit, the pids limit of the container), or copy fewer disks at a time"
	}
	return "the system is out of memory: copy fewer disks at a time, or lower --connections and --request-size"
}

// outOf reports whether err is a lack of processes, descriptors or memory.
func outOf(err error) bool {
	for _, errno := range []syscall.Errno{syscall.EAGAIN, syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE} {
		if errors.Is(err, errno) {
			return true
		}
	}
	return false
}

// GoneError says that there is no worker any more, and how it ended. Every
// call in progress and every later one returns it.
type GoneError struct {
	PID    int
	Signal syscall.Signal // that ended it; 0: it exited
	Status int            // with which it exited
	Killed bool           // by Kill, Close or the end of a context
	Closed bool           // orderly, by Close
	Reason string         // what the worker, or whoever ended it, said; "": nothing
	Last   []string       // its last lines on standard error
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
		b.WriteString("was killed by somebody else, or by the kernel for want of memory")
	case e.Signal != 0:
		fmt.Fprintf(&b, "died: %v", e.Signal)
	default:
		fmt.Fprintf(&b, "exited with status %d", e.Status)
	}
	if e.Reason != "" {
		fmt.Fprintf(&b, ": %s", e.Reason)
	}
	if len(e.Last) > 0 && !e.Closed {
		fmt.Fprintf(&b, " (last words: %s)", strings.Join(e.Last, " / "))
	}
	return b.String()
}

// LoadError says why the library can't be used.
type LoadError struct {
	Library   string
	Text      string   // what the dynamic linker said, "" where that is not the reason
	Libraries []string // each library that it needs, directly or not, and that is not found
	Functions []string // each function that must be there and is not
}

func (e *LoadError) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "load %s: ", e.Library)
	if len(e.Functions) > 0 {
		fmt.Fprintf(&b, "it lacks %s", strings.Join(e.Functions, ", "))
		return b.String()
	}
	b.WriteString(e.Text)
	if len(e.Libraries) > 0 {
		fmt.Fprintf(&b, " (not found: %s)", strings.Join(e.Libraries, ", "))
	}
	return b.String()
}

// Temporary reports whether the dynamic linker had no memory or no descriptor
// left, so that loading may succeed later.
func (e *LoadError) Temporary() bool {
	for _, errno := range []syscall.Errno{syscall.ENOMEM, syscall.EMFILE, syscall.ENFILE} {
		if strings.HasSuffix(strings.ToLower(e.Text), errno.Error()) {
			return true
		}
	}
	return strings.HasSuffix(e.Text, "failed to map segment from shared object")
}

// Transient tells transfer/report that the library may load later. The caller marks
// a LoadError that is not Temporary as permanent, and then this does not count.
func (*LoadError) Transient() bool { return true }

// Hint says what to do.
func (e *LoadError) Hint() string {
	if e.Temporary() {
		return "this process or the system has no memory or file descriptors left (ulimit -n, ulimit -v): copy fewer disks at a time"
	}
	if len(e.Functions) > 0 {
		return "this is no VDDK library of version 5.5.5 or later"
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

// ProgramError says that there is no worker program to run.
type ProgramError struct {
	Tried []error // each place, and why not
}

func (e *ProgramError) Error() string {
	return "no vddkcp-vddk-worker to load VDDK with: " + join(e.Tried)
}

// Unwrap returns what was tried.
func (e *ProgramError) Unwrap() []error { return e.Tried }

// Hint says what to do.
func (e *ProgramError) Hint() string {
	return "build vddkcp with make (it needs gcc), or put vddkcp-vddk-worker beside the vddkcp executable or into ../libexec/vddkcp"
}

func join(list []error) string {
	texts := make([]string, len(list))
	for i, err := range list {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}
