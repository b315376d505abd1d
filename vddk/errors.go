package vddk

import (
	"errors"
	"fmt"
	"io/fs"
	"regexp"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// Error is a failed call to the library. Its message contains no secrets.
type Error struct {
	Op       string   // "open", "read", "write", "flush", "query", or a call that concerns the VM
	Func     string   // the function of the library
	Disk     string   // Params.File
	Off, Len int64    // the range of a read, write or query, in bytes
	Code     uint64   // the VixError that the library returned
	Text     string   // the library's text for the code
	Last     []string // lines that the library logged during the call, the newest last
	first    bool     // no read had succeeded before
	expected string   // the SHA-1 thumbprint that the library was told to expect
	secret   string   // see Params.oddSecret
}

// The method code returns the error code of the library. It is in the low 16 bits of Code; the
// upper bits hold additional information.
func (e *Error) code() int { return int(e.Code & 0xffff) }

// The method lines returns the text of the error and the lines that the library logged during the
// call.
func (e *Error) lines() []string { return append([]string{e.Text}, e.Last...) }

func (e *Error) Error() string {
	var s strings.Builder
	fmt.Fprintf(&s, "VDDK: %s %s", e.Op, e.Disk)
	if e.Len > 0 {
		fmt.Fprintf(&s, " [%d, %d)", e.Off, e.Off+e.Len)
	}
	s.WriteString(": ")
	if e.Func != "" {
		s.WriteString(e.Func + ": ")
	}
	fmt.Fprintf(&s, "error %d", e.code())
	if more := e.Code >> 16; more != 0 {
		fmt.Fprintf(&s, " (%#x)", e.Code)
	}
	if e.Text != "" {
		s.WriteString(": " + e.Text)
	}
	if m := e.meaning(); m != nil && m.say != nil {
		s.WriteString(": " + m.say(e))
	} else if n := len(e.Last); n > 0 {
		fmt.Fprintf(&s, "; last log line: %q", e.Last[n-1])
	}
	return s.String()
}

// Hint tells the user what to do about the error. It is "" if nothing is known.
func (e *Error) Hint() string {
	m := e.meaning()
	switch {
	case m == nil:
		return ""
	case m.hint == hintLogin && e.secret != "":
		return m.hint + "; " + e.secret
	}
	return m.hint
}

// A meaning explains some errors of the library. The fields op, first, code, line and times are
// conditions. The explanation is used for an Error that meets all of them.
type meaning struct {
	op    string              // the operation; "": any
	first bool                // only reads before the first successful read
	code  int                 // the code of the library; 0: any
	line  *regexp.Regexp      // matches the text or a log line; nil: any
	times int                 // the number of log lines that must match; 0: one
	say   func(*Error) string // an explanation for the message; nil: none
	hint  string
}

const hintMemory = "the ESXi host has no NFC memory left for more or larger connections: lower --connections, --request-size or --nfc-buffers, " +
	"copy fewer disks at a time, or allow more NFC memory on the host; to do so, raise <nfcsvc><maxMemory> (in bytes, 50331648 by default) " +
	"in the host's file /etc/vmware/hostd/config.xml, and run /etc/init.d/hostd restart on the host"

const hintLogin = "the server refused the login: check --user (user@domain or DOMAIN\\user) and the password"

var loginWords = regexp.MustCompile(`(?i)incorrect user name or password|incorrect login|invalid login|login failed|cannot complete login|authentication fail|not authenticated|InvalidLogin`)

var thumbprints = regexp.MustCompile(`(?i)actual thumbprint\s*=\s*([0-9A-F:]+).{0,20}expected\s*=\s*([0-9A-F:]+)`)

// The elements of meanings are tried in order. The first one that applies to an error explains it.
var meanings = []meaning{
	// CodeFail is a general error code, which the library also returns for a wrong certificate. An
	// error with another code has another cause, even if the log mentions the certificate.
	{code: worker.CodeFail, line: regexp.MustCompile(`(?i)actual thumbprint\s*=`), say: (*Error).sayThumbprint,
		hint: "the server's certificate does not have the expected thumbprint: run vddkcp thumbprint HOST, and compare the thumbprint that it prints with the thumbprint that the host itself shows; if the two are equal, pass this thumbprint with --thumbprint"},
	{code: worker.CodeFail, line: regexp.MustCompile(`(?i)(thumbprint|certificate|ssl verification).{0,60}(mismatch|invalid|fail|not match|error)`),
		hint: "VDDK does not accept the server's certificate: run vddkcp thumbprint HOST, and compare the thumbprint that it prints with the thumbprint that the host itself shows; if the two are equal, pass this thumbprint with --thumbprint"},
	{line: loginWords, hint: hintLogin},
	{line: regexp.MustCompile(`(?i)failed to allocate the requested|nfc error:? 5\b`), hint: hintMemory},
	{code: worker.CodeOutOfMemory, hint: hintMemory},
	{line: regexp.MustCompile(`libssl\.so\.3: cannot open`),
		hint: "VDDK 8.0.2 and later need a newer system than this one: use VDDK 8.0.1, or a newer system"},
	{line: regexp.MustCompile(`GetFileName: Cannot create disk spec`),
		hint: "this is an independent disk, which snapshots do not include: copy it while the VM is off"},
	{line: regexp.MustCompile(`(?i)FileLockCreateEntryDirectory.*Permission denied|read-only file ?system|EROFS`),
		hint: "the folder of the disk is not writable: open the disk read-only, or copy it elsewhere first"},
	{line: regexp.MustCompile(`(?i)host address lookup.*failed|name or service not known`),
		hint: "this machine cannot resolve the name of the ESXi host: check DNS or /etc/hosts"},
	{op: "open", line: regexp.MustCompile(`NBD_ClientOpen: attempting to create connection`), times: 3,
		hint: "port 902 of the ESXi host cannot be reached, or this is a known defect of VDDK 6.7: open port 902 from this machine to the ESXi host, or use a newer VDDK"},
	{op: "open", code: worker.CodeRefused,
		hint: "the server does not answer: check that it is running, that --server and --port are right, and that this machine can reach its port 443"},
	{op: "open", code: worker.CodeLoginRefused, hint: hintLogin},
	{op: "open", code: worker.CodeNoAccess,
		hint: "the disk is locked, most often by its running VM: name a snapshot with --snapshot"},
	{op: "open", code: worker.CodeFileNotFound,
		hint: "the disk does not exist: give its name as the settings of the VM show it, '[DATASTORE] FOLDER/DISK.vmdk'"},
	{op: "open", code: worker.CodeNotSupported,
		hint: "this VDDK cannot open the disk: a VDDK release supports the vSphere release with the same number, the two vSphere releases before that one, and the one after it"},
	{op: "read", first: true,
		hint: "the disk was opened and its first read failed, which happens when VDDK is too new or too old for the host: a VDDK release supports the vSphere release with the same number, the two vSphere releases before that one, and the one after it"},
}

// The method meaning returns the explanation of e. It is nil if there is none.
func (e *Error) meaning() *meaning {
	for i := range meanings {
		m := &meanings[i]
		if m.op != "" && m.op != e.Op || m.first && !e.first || m.code != 0 && m.code != e.code() {
			continue
		}
		if m.line == nil {
			return m
		}
		found := 0
		for _, line := range e.lines() {
			if m.line.MatchString(line) {
				found++
			}
		}
		if found >= max(m.times, 1) {
			return m
		}
	}
	return nil
}

// The method permanent reports whether opening the disk with the same parameters would fail again.
//
// Only the code and the text of the library decide that. Log lines do not count, because the
// library logs errors of all its threads and connections, many of them harmless. Only errors of
// the operation "open" can be permanent. When any other operation fails, the disk was already
// open, so these parameters can open it.
func (e *Error) permanent() bool {
	if e.Op != "open" {
		return false
	}
	switch e.code() {
	case worker.CodeInvalidArg, worker.CodeFileNotFound, worker.CodeNotSupported:
		return true
	}
	return e.loginRefused()
}

// loginRefused reports whether the server refused the login, because the user or the password is
// wrong.
func (e *Error) loginRefused() bool {
	if strings.HasSuffix(e.Func, "Access") || strings.HasSuffix(e.Func, "_Cleanup") {
		return e.refusedByLog()
	}
	return e.Op == "open" && (e.code() == worker.CodeLoginRefused || loginWords.MatchString(e.Text))
}

// refusedByLog implements loginRefused for the calls PrepareForAccess, EndAccess and Cleanup.
// They return the same code for a refused login and for a missing permission. Only the log lines
// tell the two apart.
func (e *Error) refusedByLog() bool {
	return e.code() == worker.CodeLoginRefused && slices.ContainsFunc(e.lines(), loginWords.MatchString)
}

// isRefusedLogin reports whether err contains an Error that says that the server refused the
// login.
func isRefusedLogin(err error) bool {
	e := asError(err)
	return e != nil && e.loginRefused()
}

// noMemory reports whether the call failed because the ESXi host or the library had too little
// memory.
func (e *Error) noMemory() bool {
	m := e.meaning()
	return m != nil && m.hint == hintMemory
}

// sayThumbprint returns a sentence with the thumbprint that the server's certificate has, and
// the one that was expected. Both are in a log line of the library, and not in the text of its
// error.
func (e *Error) sayThumbprint() string {
	for _, line := range e.Last {
		if m := thumbprints.FindStringSubmatch(line); m != nil {
			return fmt.Sprintf("the server's certificate has the thumbprint %s, expected %s", m[1], m[2])
		}
	}
	return "the server's certificate has another thumbprint than " + e.expected
}

// lostError says that a worker process crashed or was killed. The library may or may not have
// carried out the requests that were in flight.
type lostError struct {
	op   string // the operation, the disk and the range
	err  error
	late bool // the worker was killed because it took too long to open the disk
}

func (e *lostError) Error() string {
	return "the VDDK worker was lost during " + e.op + ": " + e.err.Error()
}
func (e *lostError) Unwrap() error { return e.err }

// reopeningError says that a disk could not be opened again after a connection was lost. The field
// err is the cause. For errors.Is, a reopeningError contains source.ErrReopen and all errors that
// err contains, except fs.ErrNotExist and fs.ErrPermission. An error that contains one of these two
// would count as permanent. But the disk was open before, so the copy can be resumed when the cause
// has been removed.
type reopeningError struct{ err error }

// Is implements the interface that errors.Is uses.
func (e *reopeningError) Is(target error) bool {
	return target == source.ErrReopen || target != fs.ErrNotExist && target != fs.ErrPermission && errors.Is(e.err, target)
}

// As implements the interface that errors.As uses.
func (e *reopeningError) As(target any) bool { return errors.As(e.err, target) }
func (e *reopeningError) Error() string      { return e.err.Error() }

// Transient tells transfer/report that the error may be temporary: it is a failure of the library,
// the server or this system. If source.Permanent has marked an error that wraps one of the four
// types below, the marked error is not transient.
func (e *Error) Transient() bool          { return true }
func (e *LoginError) Transient() bool     { return true }
func (e *lostError) Transient() bool      { return true }
func (e *reopeningError) Transient() bool { return true }

// isLost reports whether err contains a lostError: a worker process crashed or was killed.
func isLost(err error) bool {
	var lost *lostError
	return errors.As(err, &lost)
}

// Is makes errors.Is find source.ErrGone in e if the snapshot does not exist, because the same
// parameters can never open the disk again.
func (e *Error) Is(target error) bool {
	return target == source.ErrGone && e.code() == worker.CodeNoSnapshot
}

// asError returns the Error of the library in the chain of err. It is nil if there is none.
func asError(err error) *Error {
	var e *Error
	errors.As(err, &e)
	return e
}
