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

// Error is a call to the library that failed. Its message holds no secrets.
type Error struct {
	Op       string   // "open", "read", "write", "flush", "query"
	Func     string   // of the library
	Disk     string   // Params.File
	Off, Len int64    // bytes; of a read or write or query
	Code     uint64   // VixError as it came
	Text     string   // the library's, of the code
	Last     []string // what the library logged during the call, the newest last
	first    bool     // no read succeeded before
	expected string   // the thumbprint that was handed to it
	secret   string   // what is odd about the password
}

func (e *Error) code() int { return int(e.Code & 0xffff) }

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
		fmt.Fprintf(&s, "; its last words: %q", e.Last[n-1])
	}
	return s.String()
}

// Hint says what to do about it, or nothing.
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

// meaning is what is known of an error by its code, text and log lines.
type meaning struct {
	op    string         // of which call alone; "": of any
	first bool           // of the first read alone
	code  int            // of which code alone; 0: of any
	line  *regexp.Regexp // found in the text or in a line; nil: the code is enough
	times int            // in how many lines at least
	say   func(*Error) string
	hint  string
}

const hintMemory = "the ESXi host has no NFC memory left for more or larger connections: lower --connections, --request-size or --nfc-buffers, " +
	"copy fewer disks at a time, or give the host more: in /etc/vmware/hostd/config.xml raise <nfcsvc><maxMemory> (bytes; 50331648 is the default), " +
	"then run /etc/init.d/hostd restart there"

const hintLogin = "the server refused the login: check --user (user@domain or DOMAIN\\user) and the password"

var loginWords = regexp.MustCompile(`(?i)incorrect user name or password|incorrect login|invalid login|login failed|cannot complete login|authentication fail|not authenticated|InvalidLogin`)

var thumbprints = regexp.MustCompile(`(?i)actual thumbprint\s*=\s*([0-9A-F:]+).{0,20}expected\s*=\s*([0-9A-F:]+)`)

// meanings are looked through in order; the first one that fits counts.
var meanings = []meaning{
	// A wrong certificate is error 1. Another code has a reason of its own.
	{code: worker.CodeFail, line: regexp.MustCompile(`(?i)actual thumbprint\s*=`), say: (*Error).sayThumbprint,
		hint: "the certificate is another one: compare the real thumbprint with what the host itself shows, and give it with --thumbprint"},
	{code: worker.CodeFail, line: regexp.MustCompile(`(?i)(thumbprint|certificate|ssl verification).{0,60}(mismatch|invalid|fail|not match|error)`),
		hint: "the server's certificate is not the one of --thumbprint; vddkcp thumbprint HOST shows it"},
	{line: loginWords, hint: hintLogin},
	{line: regexp.MustCompile(`(?i)failed to allocate the requested|nfc error:? 5\b`), hint: hintMemory},
	{code: worker.CodeOutOfMemory, hint: hintMemory},
	{line: regexp.MustCompile(`libssl\.so\.3: cannot open`),
		hint: "VDDK 8.0.2 and later need a newer system than this one: use VDDK 8.0.1, or a newer system"},
	{line: regexp.MustCompile(`GetFileName: Cannot create disk spec`),
		hint: "this is an independent disk, which no snapshot holds: copy it while the VM is off"},
	{line: regexp.MustCompile(`(?i)FileLockCreateEntryDirectory.*Permission denied|read-only file ?system|EROFS`),
		hint: "the disk lies in a place that can't be written: open it read-only, or copy it elsewhere first"},
	{line: regexp.MustCompile(`(?i)host address lookup.*failed|name or service not known`),
		hint: "the name of the ESXi host must resolve here: check DNS or /etc/hosts"},
	{op: "open", line: regexp.MustCompile(`NBD_ClientOpen: attempting to create connection`), times: 3,
		hint: "the ESXi host's port 902 is not reached, or VDDK 6.7 has its known defect: open port 902 from here to the ESXi host, or use a newer VDDK"},
	{op: "open", code: worker.CodeRefused,
		hint: "nothing answers there: is the server up, are --server and --port right, and can its port 443 be reached from here?"},
	{op: "open", code: worker.CodeLoginRefused, hint: hintLogin},
	{op: "open", code: worker.CodeNoAccess,
		hint: "the disk is locked, most often by its running VM: name a snapshot with --snapshot"},
	{op: "open", code: worker.CodeFileNotFound,
		hint: "there is no such disk: the name is '[DATASTORE] FOLDER/DISK.vmdk' as the VM's settings show it"},
	{op: "open", code: worker.CodeNotSupported,
		hint: "this VDDK can't open such a disk: it supports the version of vSphere of its own number, the two before and one after it"},
	{op: "read", first: true,
		hint: "the disk opened and its first read failed, as it does when VDDK is too new or too old for the host: VDDK supports the two versions of vSphere before it and one after"},
}

// meaning returns what is known of e, or nil.
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
		for _, line := range append([]string{e.Text}, e.Last...) {
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

// permanent reports whether opening the disk with the same parameters would fail
// again. The library's code decides that, with its text, and no line of the log:
// lines come from every thread and connection of the library, many of them while
// all is well. No other call fails for good, because the disk was opened before.
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

// loginRefused reports whether the server refused the user or the password.
func (e *Error) loginRefused() bool {
	if strings.HasSuffix(e.Func, "Access") || strings.HasSuffix(e.Func, "_Cleanup") {
		return e.refusedByLog()
	}
	return e.Op == "open" && (e.code() == worker.CodeLoginRefused || loginWords.MatchString(e.Text))
}

// refusedByLog is loginRefused for calls that need permissions of their own
// (PrepareForAccess, EndAccess, Cleanup): the code of a login that was refused is
// also that of a permission that is missing, and only the log tells them apart.
func (e *Error) refusedByLog() bool {
	return e.code() == worker.CodeLoginRefused && slices.ContainsFunc(append([]string{e.Text}, e.Last...), loginWords.MatchString)
}

func isRefusedLogin(err error) bool {
	e := asError(err)
	return e != nil && e.loginRefused()
}

// noMemory says whether the host or the library had no memory for the call.
func (e *Error) noMemory() bool {
	m := e.meaning()
	return m != nil && m.hint == hintMemory
}

// sayThumbprint tells both thumbprints, which the library only logs.
func (e *Error) sayThumbprint() string {
	for _, line := range e.Last {
		if m := thumbprints.FindStringSubmatch(line); m != nil {
			return fmt.Sprintf("the server's certificate has the thumbprint %s, expected was %s", m[1], m[2])
		}
	}
	return "the server's certificate has another thumbprint than " + e.expected
}

// lostError says that a worker process is gone or was killed. What was on the
// way may be done or not.
type lostError struct {
	op   string // and the disk, the range
	err  error
	late bool // it was given up while it was opening the disk
}

func (e *lostError) Error() string {
	return "the VDDK worker was lost during " + e.op + ": " + e.err.Error()
}
func (e *lostError) Unwrap() error { return e.err }

// reopeningError is the failure to open a disk again, a source.ErrReopen. It passes
// on what is known of err except that it could be permanent: whatever refuses the
// disk now, it was there, so that the copy may go on when somebody has mended it.
type reopeningError struct{ err error }

// Is implements the interface of errors.Is.
func (e *reopeningError) Is(target error) bool {
	return target == source.ErrReopen || target != fs.ErrNotExist && target != fs.ErrPermission && errors.Is(e.err, target)
}

// As implements the interface of errors.As.
func (e *reopeningError) Error() string      { return e.err.Error() }
func (e *reopeningError) As(target any) bool { return errors.As(e.err, target) }

// Transient tells transfer/report that the failure may be over later: of the
// library, of the server or of this system. An error marked as permanent is not
// transient even if it wraps one of these.
func (e *Error) Transient() bool          { return true }
func (e *LoginError) Transient() bool     { return true }
func (e *lostError) Transient() bool      { return true }
func (e *reopeningError) Transient() bool { return true }

func isLost(err error) bool {
	var lost *lostError
	return errors.As(err, &lost)
}

// Is makes a snapshot that does not exist a source.ErrGone: the same parameters
// never open the disk again.
func (e *Error) Is(target error) bool {
	return target == source.ErrGone && e.code() == worker.CodeNoSnapshot
}

// asError returns the error of the library in err, or nil.
func asError(err error) *Error {
	var e *Error
	errors.As(err, &e)
	return e
}
