package vsphere

import (
	"context"
	"reflect"
	"strings"
	"time"

	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// method describes a method of the vSphere API.
type method struct {
	name       string // such as "RemoveSnapshot_Task"
	words      string // what the method is for, after "the request to"
	repeatable bool   // two calls have the same effect as one
	public     bool   // needs no session, and must not wait for one
	continues  bool   // needs something that an earlier call of the same session has left on the server
}

// The elements of repeatable are the methods that can be called again if the answer was lost. Most
// of them only read. A ticket that nobody uses does no harm.
//
// RemoveSnapshot_Task and PowerOffVM_Task fail without doing anything when they
// find the work done; ConsolidateVMDisks_Task then has nothing to do. A view or a filter that is
// made twice ends with the session.
var repeatable = map[string]string{
	"RetrieveServiceContent": "describe itself",
	"CurrentTime":            "tell the time",
	"Logout":                 "log out",
	"SessionIsActive":        "check the session",
	"TerminateSession":       "end a session that a killed process has left",

	"RetrieveProperties":           "read the inventory",
	"RetrievePropertiesEx":         "read the inventory",
	"ContinueRetrievePropertiesEx": "read the inventory",
	"CancelRetrievePropertiesEx":   "read the inventory",
	"CreateContainerView":          "list the inventory",
	"DestroyView":                  "list the inventory",
	"FindByUuid":                   "search the inventory",
	"FindAllByUuid":                "search the inventory",
	"FindByInventoryPath":          "search the inventory",
	"FindByDatastorePath":          "search the inventory",
	"FindByDnsName":                "search the inventory",
	"FindAllByDnsName":             "search the inventory",
	"FindByIp":                     "search the inventory",
	"FindAllByIp":                  "search the inventory",
	"FindChild":                    "search the inventory",

	"HasPrivilegeOnEntities":       "check privileges",
	"HasPrivilegeOnEntity":         "check privileges",
	"HasUserPrivilegeOnEntities":   "check privileges",
	"FetchUserPrivilegeOnEntities": "check privileges",
	"RetrieveEntityPermissions":    "check privileges",
	"RetrieveRolePermissions":      "check privileges",
	"RetrieveAllPermissions":       "check privileges",
	"QueryOptions":                 "read its settings",
	"QueryChangedDiskAreas":        "list changed blocks",
	"RetrieveInternalContent":      "find the service for NFC",
	"NfcGetVmFiles":                "get a ticket for reading a disk",

	"RemoveSnapshot_Task":     "remove a snapshot",
	"ConsolidateVMDisks_Task": "consolidate disks",
	"PowerOffVM_Task":         "power off a VM",
	"CancelTask":              "cancel a task",
}

// The method reads reports whether a call changes nothing, except views and filters of the session.
func (m *method) reads() bool { return m.repeatable && !strings.HasSuffix(m.name, "_Task") }

// The map once has the words for methods that must not be called twice.
var once = map[string]string{
	"Login":               "log in",
	"CreateSnapshot_Task": "make a snapshot",
	"ReconfigVM_Task":     "change the settings of a VM",
	"ShutdownGuest":       "shut down a guest",
	"PowerOnVM_Task":      "power on a VM",
}

// methodOf returns the method of a request. The type of the request has the name of the method, with
// "Body" at its end. In this package, such a type begins with a small letter.
func methodOf(req soap.HasFault) method {
	name := strings.TrimSuffix(reflect.TypeOf(req).Elem().Name(), "Body")
	name = strings.ToUpper(name[:1]) + name[1:]
	m := method{name: name, public: name == "RetrieveServiceContent", continues: name == "ContinueRetrievePropertiesEx"}
	if m.words, m.repeatable = repeatable[name]; m.repeatable {
		return m
	}
	if m.words = once[name]; m.words == "" {
		m.words = "call " + name
	}
	return m
}

// group is the calls of one run of a function that Session.together has called.
type group struct {
	login   *login
	restart error // why the function must run again; nil if it need not
}

type groupKey struct{}

// groupOf returns the group of the calls that are made with ctx. It is nil if there is none.
func groupOf(ctx context.Context) *group {
	g, _ := ctx.Value(groupKey{}).(*group)
	return g
}

// activeSession returns the session of the server in which the calls of a group are made. If the
// session has ended, the error makes the method together log in again and repeat the calls.
func (s *Session) activeSession(ctx context.Context) (*types.UserSession, error) {
	user, err := session.NewManager(s.client).UserSession(ctx)
	if err == nil && user == nil {
		err = soap.WrapVimFault(new(types.NotAuthenticated))
		groupOf(ctx).restart = err
	}
	return user, err
}

// together calls f, which makes several calls that belong together, because the server keeps
// something between them that ends with the session: a view of the inventory, or the token for the
// next page of an answer. All calls with the context of f use the same session of the server. If
// the session ends meanwhile, or a page is lost, together logs in again and calls f once more, so f
// must begin with an empty result each time. The calls of f must be ones that can be repeated, and
// f must make them one after the other.
func (s *Session) together(ctx context.Context, f func(ctx context.Context) error) error {
	attempts := s.Retry.Start(s.progress)
	var ended *login
	for logins := 0; ; {
		c, err := s.logins.get(ctx, ended)
		if err == nil {
			g := &group{login: c}
			if err = f(context.WithValue(ctx, groupKey{}, g)); err == nil || g.restart == nil {
				return err
			}
			if err = g.restart; !isTransient(err) && logins < maxLogins { // the session has ended
				logins++
				ended = c
				continue
			}
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if !isTransient(err) {
			return err
		}
		wait, gaveUp := attempts.Failed(err)
		if gaveUp != nil {
			return gaveUp
		}
		if err := s.pause(ctx, err, wait); err != nil {
			return err
		}
	}
}

// The method pause waits before a call is repeated that has failed with err. It returns an error if
// ctx ends or the session is closed before that.
func (s *Session) pause(ctx context.Context, err error, wait time.Duration) error {
	switch {
	case s.Retry.Pause(ctx, err, wait, s.logins.ctx.Done()):
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return errClosed
}
