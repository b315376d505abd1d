package vsphere

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"net"
	"reflect"
	"strings"
	"sync"
	"testing"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/retry"
)

func sha256Hex(b []byte) string { return fmt.Sprintf("%x", sha256.Sum256(b)) }

// join copies both ways between two connections until one ends, and closes them.
func join(a, b net.Conn) {
	var once sync.Once
	end := func() {
		once.Do(func() {
			a.Close()
			b.Close()
		})
	}
	var wg sync.WaitGroup
	wg.Go(func() { io.Copy(a, b); end() })
	wg.Go(func() { io.Copy(b, a); end() })
	wg.Wait()
}

func soapFault(text string, f types.BaseMethodFault) error {
	s := &soap.Fault{Code: "ServerFaultCode", String: text}
	if f != nil {
		s.Detail.Fault = reflect.ValueOf(f).Elem().Interface() // as the decoder of answers leaves it
	}
	return soap.WrapSoapFault(s)
}

func TestExplain(t *testing.T) {
	t.Parallel()
	vm := types.ManagedObjectReference{Type: "VirtualMachine", Value: "vm-16"}
	for _, c := range []struct {
		fault     types.BaseMethodFault
		want      string
		hint      string // part of it
		transient bool
		permanent bool
	}{
		{&types.NoPermission{Object: &vm, PrivilegeId: "VirtualMachine.State.CreateSnapshot"},
			"the user lacks the privilege VirtualMachine.State.CreateSnapshot on VirtualMachine vm-16", "vddkcp check --role", false, true},
		{&types.NoPermission{MissingPrivileges: []types.NoPermissionEntityPrivileges{{Entity: vm, PrivilegeIds: []string{"A.B", "C.D"}}}},
			"the user lacks the privilege A.B, C.D on VirtualMachine vm-16", "vddkcp check --role", false, true},
		{&types.NoPermission{}, "the user lacks a privilege", "vddkcp check --role", false, true},
		{&types.RestrictedVersion{}, "the license of the host allows programs only to read", "free license", false, true},
		{&types.ApplicationQuiesceFault{}, "quiescing the guest failed", "--quiesce=try", false, false},
		{&types.FilesystemQuiesceFault{}, "quiescing the file systems", "--quiesce=try", false, false},
		{&types.SnapshotFault{}, "the snapshot failed: SnapshotFault", "", false, false},
		{&types.SnapshotLocked{}, "the snapshot failed: SnapshotLocked", "", false, false},
		{&types.TooManySnapshotLevels{}, "too many snapshots", "32", false, false},
		{&types.InsufficientResourcesFault{}, "the server lacks resources: InsufficientResourcesFault", "make room", false, false},
		{&types.NoDiskSpace{Datastore: "ds\x1b1"}, `no space is left on the datastore "ds\x1b1"`, "make room", false, false},
		{&types.HostNotConnected{}, "the host of the VM is not connected", "", true, false},
		{&types.HostCommunication{}, "vCenter cannot reach the host", "", true, false},
		{&types.HostNotReachable{}, "vCenter cannot reach the host", "", true, false},
		{&types.InvalidState{}, "the state of the VM does not allow this: InvalidState", "", false, false},
		{&types.InvalidPowerState{ExistingState: "suspended"}, "the power state of the VM is suspended", "", false, false},
		{&types.MethodDisabled{Source: "Backup 9"}, `disabled for the VM by "Backup 9"`, "another backup program", false, false},
		{&types.TaskInProgress{Task: types.ManagedObjectReference{Type: "Task", Value: "task-1"}}, "another task is in progress: Task task-1", "", true, false},
		{&types.ManagedObjectNotFound{Obj: vm}, "VirtualMachine vm-16 does not exist any more", "", false, false},
		{&types.FileLocked{FileFault: types.FileFault{File: "[ds] a/a.vmdk"}}, `locked: "[ds] a/a.vmdk"`, "another program", true, false},
		{&types.InvalidLogin{}, "the user name or the password is wrong", "", false, false},
		{&types.CannotAccessFile{}, "CannotAccessFile", "", false, false},
	} {
		said := "Der Server\n sagt \x1b[31m" + strings.Repeat("ü", 1000)
		for name, err := range map[string]error{
			"call": soapFault(said, c.fault),
			"task": taskFault(&types.LocalizedMethodFault{Fault: c.fault, LocalizedMessage: said}),
		} {
			err := explain("cannot do it", err)
			text := err.Error()
			if !strings.HasPrefix(text, "cannot do it: ") || !strings.Contains(text, c.want) || !strings.Contains(text, `Der Server\n sagt \x1b[31mü`) {
				t.Errorf("%s: %q, want %q", name, text, c.want)
			}
			if len(text) > 900 || strings.ContainsAny(text, "\n\x1b") {
				t.Errorf("%s: %d bytes: %q", name, len(text), text)
			}
			transient := (interface{ Transient() bool })(nil)
			if !errors.As(err, &transient) || transient.Transient() != c.transient || retry.IsPermanent(err) != c.permanent {
				t.Errorf("%s: %q: wrong kind", name, text)
			}
			if want := map[bool]int{true: 75, false: 1}[c.transient]; exitStatus(err) != want {
				t.Errorf("%s: %q: exit %d, want %d", name, text, exitStatus(err), want)
			}
			if h := hint(err); !strings.Contains(h, c.hint) || (h == "") != (c.hint == "") {
				t.Errorf("%s: %q: hint %q, want %q", name, text, h, c.hint)
			}
			if !fault.Is(err, c.fault) {
				t.Errorf("%s: %q does not wrap the fault", name, text)
			}
		}
	}
}

func TestExplainOthers(t *testing.T) {
	t.Parallel()
	inner := explain("vc refused the request to x", soapFault("no", &types.InvalidState{}))
	cause := &types.SystemError{}
	cause.FaultCause = &types.LocalizedMethodFault{Fault: &types.NoDiskSpace{}, LocalizedMessage: "datastore full"}
	cause.FaultMessage = []types.LocalizableMessage{{Key: "k", Message: "msg one"}, {Key: "k", Message: "no"}}
	for _, c := range []struct {
		err  error
		want string
	}{
		{nil, "<nil>"},
		{inner, `cannot do it: vc refused the request to x: the state of the VM does not allow this: InvalidState (the server says: "no")`},
		{errors.New("other"), "cannot do it: other"},
		{soapFault("wrong\nversion", nil), `cannot do it: wrong\nversion`},
		{soapFault("", nil), "cannot do it: the server gives no reason"},
		{soapFault("", &types.InvalidState{}), "cannot do it: the state of the VM does not allow this: InvalidState"},
		{soapFault("not now", cause), `cannot do it: SystemError (the server says: "not now; msg one; datastore full")`},
		{taskFault(nil), "cannot do it: the server gives no reason"},
	} {
		if got := fmt.Sprint(explain("cannot do it", c.err)); got != c.want {
			t.Errorf("%s\nwant %s", got, c.want)
		}
	}
}

// Every method has words, and the two lists have nothing in common.
func TestMethods(t *testing.T) {
	t.Parallel()
	for name, words := range once {
		if _, both := repeatable[name]; both || words == "" {
			t.Errorf("%s: %q", name, words)
		}
	}
}
