package vsphere

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http/httptrace"
	"net/url"
	"reflect"
	"strings"
	"sync/atomic"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
	"github.com/vmware/govmomi/vim25/xml"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/retry"
)

// maxLogins is how often one call may be made again because its session has ended.
const maxLogins = 3

// maxInternal is how often a call that only reads is repeated because something has failed inside the
// server. Such a failure often passes. A copy of many hours must not fail because of one.
const maxInternal = 2

// roundTripper makes the calls of a Session. It implements soap.RoundTripper.
//
// It repeats a call that a lost connection has interrupted, as Options.Retry says. If the session
// has ended, it logs in again and then repeats the call. It repeats only calls of which two have the
// same effect as one. The error of another call is an *UncertainError if the server may have carried
// it out.
type roundTripper struct {
	*Session
	login *login // the session to use; nil: the current one, or a new one if that has ended
}

// RoundTrip implements soap.RoundTripper.
func (r roundTripper) RoundTrip(ctx context.Context, req, res soap.HasFault) error {
	m := methodOf(req)
	answer := reflect.ValueOf(res).Elem()
	empty := reflect.New(answer.Type()).Elem()
	empty.Set(answer) // a failed call may leave a part of its answer in res
	attempts := r.Retry.Start(r.progress)
	var ended *login
	for logins := 0; ; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		c, err := r.loggedIn(ctx, m, ended)
		if err == nil {
			answer.Set(empty)
			if err = r.call(ctx, c, m, req, res); err == nil {
				r.progress.Mark()
				return nil
			}
			if r.mayLogIn(ctx, m) && sessionEnded(err) && logins < maxLogins {
				logins++
				ended = c
				if m.repeatable {
					continue
				}
				if _, failed := r.logins.get(ctx, c); failed != nil {
					err = failed
				}
				return &UncertainError{Server: r.address(), request: m.words, Denied: true, Err: err}
			}
		}
		wait, gaveUp := r.failed(ctx, m, &attempts, err)
		if gaveUp != nil {
			return gaveUp
		}
		if err := r.pause(ctx, err, wait); err != nil {
			return err
		}
	}
}

// mayLogIn reports whether a call may log in if there is no session.
func (r roundTripper) mayLogIn(ctx context.Context, m method) bool {
	return r.login == nil && !m.public && groupOf(ctx) == nil
}

// loggedIn returns the login with which a call is made.
func (r roundTripper) loggedIn(ctx context.Context, m method, ended *login) (*login, error) {
	g := groupOf(ctx)
	switch {
	case r.login != nil:
		return r.login, nil
	case m.public:
		return &login{Client: r.client.Client}, nil
	case g != nil:
		return g.login, nil
	}
	return r.logins.get(ctx, ended)
}

// failed decides what happens after a failed attempt: either the call is repeated after a time, or
// it fails with the error gaveUp.
func (r roundTripper) failed(ctx context.Context, m method, attempts *retry.Attempts, err error) (wait time.Duration, gaveUp error) {
	lost := (*lostError)(nil)
	uncertain := errors.As(err, &lost) && lost.sent && lost.method == m.name && !m.repeatable
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	switch g := groupOf(ctx); {
	case r.login != nil: // a call that belongs to a login or a logout, which its caller repeats
		return 0, err
	case uncertain:
		return 0, &UncertainError{Server: r.address(), request: m.words, Err: err}
	case ctx.Err() != nil:
		return 0, err
	case g != nil && (r.endedGroup(ctx, g, m, err) || m.continues && isTransient(err)):
		g.restart = err
		return 0, err
	case !m.repeatable && hostUnreachable(err):
		return 0, &UncertainError{Server: r.address(), request: m.words, Err: err}
	case !r.connected.Load():
		return 0, err
	case isTransient(err), m.reads() && isInternal(err) && attempts.Failures() < maxInternal:
		return attempts.Failed(err)
	}
	return 0, err
}

// endedGroup reports whether a call of a group has failed because the session has ended. With the
// session, the objects end that belong to it. If the call needs one of them, the server may answer
// that the object does not exist, instead of that there is no session.
func (r roundTripper) endedGroup(ctx context.Context, g *group, m method, err error) bool {
	if sessionEnded(err) {
		return true
	}
	if !fault.Is(err, &types.ManagedObjectNotFound{}) && !(m.continues && faultOf(err) != nil) {
		return false
	}
	user, err := r.userSession(ctx, g.login)
	return err == nil && user == nil
}

// The method call makes one attempt of a call.
func (s *Session) call(ctx context.Context, c *login, m method, req, res soap.HasFault) error {
	limited, cancel := context.WithTimeoutCause(ctx, s.Timeout, errNoAnswer)
	defer cancel()
	var sent atomic.Bool
	limited = httptrace.WithClientTrace(limited, &httptrace.ClientTrace{
		GotConn: func(httptrace.GotConnInfo) { sent.Store(true) },
	})
	if !m.repeatable {
		s.transport.dialAgain()
	}
	begun := time.Now()
	err := c.RoundTrip(limited, req, res)
	if err == nil {
		err = missingLogin(res)
	}
	if err != nil {
		err = s.describe(limited, m, sent.Load(), err)
	}
	args := []any{"method", m.name, "time", time.Since(begun).Round(time.Millisecond)}
	if err != nil {
		args = append(args, "error", err)
	}
	s.Log.Debug("vsphere: request", args...)
	return err
}

var errNoAnswer = errors.New("no answer in time")

// describe returns the error of a call as its caller gets it. The parameter sent says that a
// connection to the server was there, so that the server may have got the request.
func (s *Session) describe(ctx context.Context, m method, sent bool, err error) error {
	if soap.IsSoapFault(err) || soap.IsVimFault(err) {
		operation := fmt.Sprintf("%s refused the request to %s", s.address(), m.words)
		if m.name == "Login" {
			operation = fmt.Sprintf("%s refused the login of %q", s.address(), s.User)
		}
		return explain(operation, err)
	}
	if outer := (*url.Error)(nil); errors.As(err, &outer) {
		err = outer.Err // without the URL of the request
	}
	if errors.As(err, new(*certificate.Error)) {
		return err
	}
	if status := (*statusError)(nil); errors.As(err, &status) && !status.passing() {
		sent = false // the server has refused the request
	}
	lost := &lostError{server: s.address(), method: m.name, request: m.words, sent: sent, err: err, known: s.connected.Load()}
	if context.Cause(ctx) == errNoAnswer {
		lost.late = s.Timeout
	}
	if proxy := s.transport.proxy(); proxy != nil && !sent {
		lost.proxy = proxy.Redacted()
	}
	return lost
}

// missingLogin returns a NotAuthenticated fault if some properties are missing in an answer because
// there is no session. Servers give such an answer to some calls instead of the fault itself.
func missingLogin(res soap.HasFault) error {
	var objects []types.ObjectContent
	switch res := res.(type) {
	case *methods.RetrievePropertiesExBody:
		if res.Res != nil && res.Res.Returnval != nil {
			objects = res.Res.Returnval.Objects
		}
	case *methods.RetrievePropertiesBody:
		if res.Res != nil {
			objects = res.Res.Returnval
		}
	}
	if len(objects) == 0 {
		return nil
	}
	for _, missing := range objects[0].MissingSet {
		if ended, ok := missing.Fault.Fault.(*types.NotAuthenticated); ok {
			return soap.WrapVimFault(ended)
		}
	}
	return nil
}

// isInternal reports whether err says that something has failed inside the server.
func isInternal(err error) bool { return fault.Is(err, &types.SystemError{}) }

func sessionEnded(err error) bool { return fault.Is(err, &types.NotAuthenticated{}) }

// isTransient reports whether a call is repeated after the error err. Faults such as TaskInProgress
// are temporary, too, but the callers know better what to wait for.
func isTransient(err error) bool {
	if retry.IsMarked(err) {
		return false
	}
	lost := (*lostError)(nil)
	return errors.As(err, &lost) && lost.Transient() || hostUnreachable(err)
}

// lostError is a call without an answer, or with one that says that the server cannot be reached.
type lostError struct {
	server  string
	method  string        // of the API
	request string        // what the call asks for, in words
	sent    bool          // the server may have got the request
	late    time.Duration // there was no answer within this time; 0: another reason
	known   bool          // an earlier call was successful
	proxy   string        // the connection was to go through this proxy; "": a direct one
	err     error
}

func (e *lostError) Error() string {
	var status *statusError
	switch {
	case errors.As(e.err, &status):
		return fmt.Sprintf("%s answered the request to %s with %v", e.server, e.request, status)
	case e.late > 0 && e.sent:
		return fmt.Sprintf("%s did not answer the request to %s within %v", e.server, e.request, e.late)
	case e.sent && isMalformed(e.err):
		return fmt.Sprintf("%s gave an answer to the request to %s that is not one of the vSphere API: %v", e.server, e.request, e.err)
	case e.sent:
		return fmt.Sprintf("%s did not answer the request to %s: the connection was lost: %v", e.server, e.request, e.err)
	case e.proxy != "":
		return fmt.Sprintf("cannot connect to %s through the proxy %s: %v", e.server, e.proxy, e.cause())
	}
	return fmt.Sprintf("cannot connect to %s: %v", e.server, e.cause())
}

// The method cause returns why there is no connection.
func (e *lostError) cause() any {
	if e.late > 0 {
		return fmt.Sprintf("no answer within %v", e.late)
	}
	if e.speaksNoTLS() {
		return "the server does not speak TLS"
	}
	return e.err
}

func (e *lostError) Unwrap() error { return e.err }

// Hint tells the user what to do about the error.
func (e *lostError) Hint() string {
	switch {
	case isMalformed(e.err) || errors.As(e.err, new(*statusError)) && !e.Transient():
		return "check that --server and --port are those of a vCenter server or an ESXi host"
	case e.sent:
		return ""
	case e.proxy != "":
		return "the environment variable HTTPS_PROXY names this proxy; if the server can be reached without it, add the server to the variable NO_PROXY"
	}
	return "check that the server is running, that --server and --port are right, and that this machine can reach the port"
}

// Transient tells transfer/report and this package whether the same call may succeed later. If the
// name of the server was not found, or another service answers, that is a mistake of the user,
// unless an earlier call was successful.
func (e *lostError) Transient() bool {
	if status := (*statusError)(nil); errors.As(e.err, &status) {
		return status.passing() || e.known && status.starting()
	}
	if isMalformed(e.err) {
		return false
	}
	unknown := (*net.DNSError)(nil)
	return e.known || !e.speaksNoTLS() && !(errors.As(e.err, &unknown) && unknown.IsNotFound)
}

// ExitStatus is the exit status of the command; package transfer/report uses it. If the server
// could not be reached at all, there is nothing to resume.
func (e *lostError) ExitStatus() int {
	if e.known && e.Transient() {
		return exit.Resumable
	}
	return exit.Failed
}

func (e *lostError) speaksNoTLS() bool {
	return errors.As(e.err, new(tls.RecordHeaderError)) || strings.Contains(e.err.Error(), "server gave HTTP response to HTTPS client")
}

// isMalformed reports whether err says that an answer is not the expected XML. An answer that ends
// too early is not meant: the connection was lost.
func isMalformed(err error) bool {
	syntax := (*xml.SyntaxError)(nil)
	if errors.As(err, &syntax) {
		return syntax.Msg != "unexpected EOF"
	}
	unmarshal := xml.UnmarshalError("")
	return errors.As(err, &unmarshal)
}

// UncertainError says that it is not known whether the server has carried out a request, and that
// carrying it out twice would do harm. The caller must find out what the server has done before it
// makes the request again.
type UncertainError struct {
	Server  string
	request string
	// Denied says that the server has answered that the session had ended. Then it is nearly
	// certain that the request was not carried out. Session has logged in again, if that was
	// possible.
	Denied bool
	Err    error
}

func (e *UncertainError) Error() string {
	return fmt.Sprintf("it is unknown whether %s has carried out the request to %s: %v", e.Server, e.request, e.Err)
}

func (e *UncertainError) Unwrap() error { return e.Err }

// Transient tells transfer/report that the request may succeed later.
func (e *UncertainError) Transient() bool { return !errors.As(e.Err, new(*LoginError)) }

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (e *UncertainError) ExitStatus() int { return exit.Resumable }
