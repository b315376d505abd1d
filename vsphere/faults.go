package vsphere

import (
	"errors"
	"fmt"
	"reflect"
	"strings"
	"unicode/utf8"

	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/retry"
)

// maxServerText is how much of the server's own text an error shows, in bytes.
const maxServerText = 500

// faultError is a fault that a server has answered, or with which a task has ended. It wraps an
// error of govmomi, so that the functions of package fault find the fault.
type faultError struct {
	operation string
	meaning   meaning
	name      string // type of the fault; "" if the server gives none
	said      string // the server's own text, safe to show; may be ""
	err       error
}

func (e *faultError) Error() string {
	what := e.meaning.say
	if what == "" {
		what = e.name
	}
	switch {
	case what == "" && e.said == "":
		return e.operation + ": the server gives no reason"
	case what == "":
		return e.operation + ": " + e.said
	case e.said == "":
		return e.operation + ": " + what
	}
	return fmt.Sprintf(`%s: %s (the server says: "%s")`, e.operation, what, e.said)
}

func (e *faultError) Unwrap() error { return e.err }

// Hint tells the user what to do about the error. It is "" if nothing is known.
func (e *faultError) Hint() string { return e.meaning.hint }

// Transient tells transfer/report and this package whether the same call may succeed later.
func (e *faultError) Transient() bool { return e.meaning.transient }

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (e *faultError) ExitStatus() int {
	if e.meaning.transient {
		return exit.Resumable
	}
	return exit.Failed
}

// explain returns err, a fault of the server, as an error that says in words what it means. The
// parameter operation says what has failed; it is the beginning of the message, before a colon. The
// error may be one of a call or, from taskFault, one of a task.
//
// If err is an error of a call that Session has made, it is explained already, and explain only
// puts operation before it.
func explain(operation string, err error) error {
	if err == nil {
		return nil
	}
	f := faultOf(err)
	if f == nil && !soap.IsSoapFault(err) || errors.As(err, new(*faultError)) {
		return fmt.Errorf("%s: %w", operation, err)
	}
	e := &faultError{operation: operation, said: serverText(err, f), err: err}
	if f != nil {
		e.meaning, e.name = meaningOf(f), faultName(f)
	}
	if e.meaning.permanent {
		return retry.Permanent(e)
	}
	return e
}

// faultOf returns the fault in err, or nil if there is none.
func faultOf(err error) types.BaseMethodFault {
	h := (interface{ Fault() types.BaseMethodFault })(nil)
	if errors.As(err, &h) {
		return h.Fault()
	}
	return nil
}

// taskFault returns the fault with which a task has ended as an error for explain.
func taskFault(f *types.LocalizedMethodFault) error {
	if f == nil || f.Fault == nil {
		return errors.New("the server gives no reason")
	}
	return &taskError{f}
}

// hostUnreachable reports whether err says that vCenter could not reach the host of a VM. It is the
// only fault after which a call is repeated, as after a lost connection.
func hostUnreachable(err error) bool {
	_, ok := faultOf(err).(types.BaseHostCommunication)
	return ok
}

type taskError struct{ localized *types.LocalizedMethodFault }

func (e *taskError) Error() string {
	return printable.Line(e.localized.LocalizedMessage)
}

// Fault is the interface that package fault uses.
func (e *taskError) Fault() types.BaseMethodFault { return e.localized.Fault }

func faultName(f types.BaseMethodFault) string {
	return reflect.Indirect(reflect.ValueOf(f)).Type().Name()
}

// serverText returns what the server itself says about a fault: the text of the fault and its
// details, in one line.
func serverText(err error, f types.BaseMethodFault) string {
	var parts []string
	add := func(text string) {
		text = strings.TrimSpace(text)
		for _, p := range parts {
			if text == "" || strings.Contains(p, text) {
				return
			}
		}
		if text != "" {
			parts = append(parts, text)
		}
	}
	var t *taskError
	if errors.As(err, &t) {
		add(t.localized.LocalizedMessage)
	} else if soap.IsSoapFault(err) {
		add(soap.ToSoapFault(err).String)
	}
	for range 5 { // how deep faults are followed that have other faults as their causes
		if f == nil || f.GetMethodFault() == nil {
			break
		}
		base := f.GetMethodFault()
		for i := range base.FaultMessage {
			add(base.FaultMessage[i].Message)
		}
		if base.FaultCause == nil {
			break
		}
		add(base.FaultCause.LocalizedMessage)
		f = base.FaultCause.Fault
	}
	return printable.Line(shortened(strings.Join(parts, "; ")))
}

// shortened returns at most about maxServerText bytes of a text of the server.
func shortened(text string) string {
	text = strings.ToValidUTF8(text, "?")
	if len(text) > maxServerText {
		n := maxServerText
		for !utf8.RuneStart(text[n]) {
			n--
		}
		text = text[:n] + "..."
	}
	return text
}

// meaning explains a fault.
type meaning struct {
	say       string // "": the name of the fault is all that is known
	hint      string
	transient bool // the same call may succeed later
	permanent bool // the same call always fails
}

const (
	hintPrivileges = "give the user a role with this privilege; vddkcp check --role prints a role with all that vddkcp needs"
	hintQuiesce    = "the guest could not flush its file systems: look for the reason in the log of the guest, or make the snapshot without --quiesce, or with --quiesce=try"
	hintSpace      = "a snapshot needs space on the datastores of the VM for what the VM writes while the snapshot exists: make room there"
	hintAnother    = "another backup program works with this VM, or has stopped without finishing its work: wait for it, or repair this with its own tools"
)

// meaningOf returns what a fault means. The types of faults form a hierarchy, so that the cases for
// single types come before those for families.
func meaningOf(f types.BaseMethodFault) meaning {
	switch f := f.(type) {
	case *types.NotAuthenticated:
		return meaning{say: "the session has ended"}
	case *types.InvalidLogin:
		return meaning{say: "the user name or the password is wrong, or the account is locked"}
	case *types.PasswordExpired:
		return meaning{say: "the password of the user has expired"}
	case *types.NoPermission:
		return meaning{say: missingPrivileges(f), hint: hintPrivileges, permanent: true}
	case *types.RestrictedVersion:
		return meaning{say: "the license of the host allows programs only to read", permanent: true,
			hint: "the free license of ESXi does not allow snapshots to be made by programs: use another license, or make the copy with other means while the VM is powered off"}
	case *types.LicenseRestricted, *types.NotEnoughLicenses:
		return meaning{say: "the license does not allow this", permanent: true}
	case *types.ManagedObjectNotFound:
		return meaning{say: fmt.Sprintf("%s does not exist any more", objectName(f.Obj))}
	case *types.MethodDisabled:
		say := "this operation is disabled for the VM"
		if f.Source != "" {
			say += fmt.Sprintf(" by %q", shortened(f.Source))
		}
		return meaning{say: say, hint: hintAnother}
	case *types.TaskInProgress:
		return meaning{say: "another task is in progress: " + objectName(f.Task), transient: true}
	case *types.InvalidPowerState:
		return meaning{say: fmt.Sprintf("the power state of the VM is %s, which does not allow this", printable.Line(shortened(string(f.ExistingState))))}
	case *types.ToolsUnavailable:
		return meaning{say: "VMware Tools do not run in the guest"}
	case *types.FileLocked:
		return meaning{say: "a file of the VM is locked" + fileName(f.File), hint: "another program has the file open; if nothing does, the lock of a host that is gone ends by itself after some time", transient: true}
	case *types.NoDiskSpace:
		return meaning{say: "no space is left on the datastore" + in(f.Datastore) + fileName(f.File), hint: hintSpace}
	case *types.NotSupported:
		return meaning{say: "the server does not support this for the VM"}
	case *types.RequestCanceled:
		return meaning{say: "somebody has cancelled the task"}
	case *types.Timedout, *types.ConcurrentAccess:
		return meaning{transient: true}
	}
	return familyMeaning(f)
}

// familyMeaning returns the meaning of a fault of which only the family is known.
func familyMeaning(f types.BaseMethodFault) meaning {
	switch f.(type) {
	case *types.ApplicationQuiesceFault:
		return meaning{say: "quiescing the guest failed", hint: hintQuiesce}
	case *types.FilesystemQuiesceFault:
		return meaning{say: "quiescing the file systems of the guest failed", hint: hintQuiesce}
	case *types.TooManySnapshotLevels:
		return meaning{say: "the VM has too many snapshots, one above the other", hint: "a VM can have at most 32 levels of snapshots: remove some"}
	case *types.MultipleSnapshotsNotSupported:
		return meaning{say: "the VM can have only one snapshot, and has one", hint: "remove the other snapshot"}
	case *types.SnapshotDisabled:
		return meaning{say: "snapshots are disabled for the VM"}
	case *types.SnapshotIncompatibleDeviceInVm:
		return meaning{say: "the VM has a device that prevents snapshots", hint: "disks with a shared SCSI bus and some passthrough devices prevent snapshots: copy the VM while it is powered off"}
	case types.BaseSnapshotFault:
		return meaning{say: "the snapshot failed: " + faultName(f)}
	case types.BaseInsufficientResourcesFault:
		return meaning{say: "the server lacks resources: " + faultName(f), hint: hintSpace}
	case *types.HostNotConnected:
		return meaning{say: "the host of the VM is not connected to vCenter", transient: true}
	case types.BaseHostCommunication:
		return meaning{say: "vCenter cannot reach the host of the VM", transient: true}
	case types.BaseInvalidState:
		return meaning{say: "the state of the VM does not allow this: " + faultName(f)}
	}
	return meaning{}
}

// missingPrivileges returns which privileges a user lacks on which objects.
func missingPrivileges(f *types.NoPermission) string {
	what := func(ids []string, object *types.ManagedObjectReference) string {
		text := strings.Join(ids, ", ")
		if object != nil {
			text += " on " + objectName(*object)
		}
		return text
	}
	var list []string
	for _, m := range f.MissingPrivileges {
		list = append(list, what(m.PrivilegeIds, &m.Entity))
	}
	if len(list) == 0 && f.PrivilegeId != "" {
		list = []string{what([]string{f.PrivilegeId}, f.Object)}
	}
	if len(list) == 0 {
		return "the user lacks a privilege"
	}
	return "the user lacks the privilege " + printable.Line(shortened(strings.Join(list, "; ")))
}

// objectName returns a managed object as messages show it, such as "VirtualMachine vm-16".
func objectName(o types.ManagedObjectReference) string {
	return printable.Line(shortened(o.Type + " " + o.Value))
}

func in(datastore string) string {
	if datastore == "" {
		return ""
	}
	return fmt.Sprintf(" %q", shortened(datastore))
}

func fileName(file string) string {
	if file == "" {
		return ""
	}
	return fmt.Sprintf(": %q", shortened(file))
}
