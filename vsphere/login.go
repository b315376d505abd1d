package vsphere

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"strings"
	"sync"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/session"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/internal/usage"
)

// login is one session of the server, with its cookie.
type login struct {
	*soap.Client
	ours bool   // Session has logged in; false for the session of Options.Cookie
	key  string // names the session in lists of sessions; "" if ours is false
}

// cookie returns the value of the session's cookie.
func (l *login) cookie() secret.Secret {
	if c := l.SessionCookie(); c != nil {
		return secret.New(c.Value)
	}
	return secret.Secret{}
}

// logins makes the logins of a Session. At most one login is in progress at a time, and all callers
// that need one wait for its result. After a refused login, it makes no other one.
//
// A login runs in the background. If its caller is interrupted, the login goes on, so that its
// answer can be used to log out. If the answer is lost, the server may have opened a session of
// which nobody knows the cookie. Nobody can log out of that session; the server ends it after its
// idle time, which is 30 minutes by default.
type logins struct {
	session *Session
	ctx     context.Context // of logins in progress
	cancel  context.CancelFunc

	background sync.WaitGroup

	mu       sync.Mutex
	current  *login   // nil before the first login
	old      []*login // sessions that the server has called ended, but that may still be open
	progress *attempt // the login in progress; nil if there is none
	refused  error    // the error of the login that the server refused
	opened   bool     // a login has succeeded
	closed   bool
}

// attempt is a login in progress. The fields login and err are valid when done is closed.
type attempt struct {
	done  chan struct{}
	login *login
	err   error
}

func newLogins(s *Session) *logins {
	l := &logins{session: s}
	l.ctx, l.cancel = context.WithCancel(context.Background())
	return l
}

// The method get returns the current session of the server. If there is none, or if that is the
// session ended, get logs in first. The parameter ended is nil, or a session that has ended.
//
// The error is a *LoginError if the server refuses the login now or has refused it before.
func (l *logins) get(ctx context.Context, ended *login) (*login, error) {
	l.mu.Lock()
	if l.closed {
		l.mu.Unlock()
		return nil, errClosed
	}
	if l.refused != nil {
		defer l.mu.Unlock()
		return nil, l.refused
	}
	if l.current != nil && l.current != ended {
		defer l.mu.Unlock()
		return l.current, nil
	}
	if l.progress == nil {
		l.progress = &attempt{done: make(chan struct{})}
		a, ended := l.progress, l.current
		l.background.Go(func() { l.run(a, ended) })
	}
	a := l.progress
	l.mu.Unlock()
	select {
	case <-a.done:
		return a.login, a.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// The method run makes a login and records its result. The parameter ended is the session before,
// or nil. If the server has not really ended it, run logs out of it.
func (l *logins) run(a *attempt, ended *login) {
	a.login, a.err = l.open(ended)
	l.finish(a)
	if a.err != nil || ended == nil || !ended.ours {
		return
	}
	ctx, cancel := context.WithTimeout(l.ctx, l.session.closeTimeout)
	defer cancel()
	if l.session.logout(ctx, ended) != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.old = append(l.old, ended) // the method close tries again
	}
}

// The method finish records the result of a login and wakes the callers that wait for it.
func (l *logins) finish(a *attempt) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.progress = nil
	if a.login != nil {
		l.current, l.opened = a.login, true
	}
	if refused := (*LoginError)(nil); errors.As(a.err, &refused) {
		refused.Opened = l.opened
		again := *refused
		again.Again = true
		l.refused = retry.Permanent(&again)
	}
	close(a.done)
}

// The method open opens a session: the one of the cookie at first, and otherwise by a login.
func (l *logins) open(ended *login) (*login, error) {
	s := l.session
	c := &login{Client: s.transport.newClient()}
	if s.Options.Cookie.IsSet() && ended == nil {
		u := c.URL()
		u.Path = "/"
		c.Jar.SetCookies(u, []*http.Cookie{{
			Name: soap.SessionCookieName, Value: s.Options.Cookie.Reveal(), Path: "/", Secure: true,
		}})
		user, err := s.userSession(l.ctx, c)
		if err != nil || user != nil {
			return orNil(c, err)
		}
	}
	if !s.Password.IsSet() || s.User == "" {
		return nil, retry.Permanent(&LoginError{Server: s.address(), odd: oddSecret("cookie", s.Options.Cookie)})
	}
	c = &login{Client: s.transport.newClient(), ours: true}
	answer, err := methods.Login(l.ctx, roundTripper{Session: s, login: c}, &types.Login{
		This:     *s.client.ServiceContent.SessionManager,
		UserName: s.User, Password: s.Password.Reveal(), Locale: "en_US",
	})
	if err == nil {
		c.key = answer.Returnval.Key
	}
	if lost := (*UncertainError)(nil); errors.As(err, &lost) {
		err = lost.Err
	}
	if isRefusedLogin(err) {
		err = retry.Permanent(&LoginError{Server: s.address(), User: s.User, Err: err, odd: oddSecret("password", s.Password)})
	}
	return orNil(c, err)
}

func orNil(c *login, err error) (*login, error) {
	if err != nil {
		return nil, err
	}
	return c, nil
}

// The method close logs out of all sessions that a login of ours has opened. A login in progress
// gets the time until ctx ends. After close, get returns errClosed.
func (l *logins) close(ctx context.Context) error {
	l.mu.Lock()
	l.closed = true
	a := l.progress
	l.mu.Unlock()
	if a != nil {
		select {
		case <-a.done:
		case <-ctx.Done():
		}
	}
	l.cancel()
	l.background.Wait()
	l.mu.Lock()
	sessions := l.old
	if l.current != nil && l.current.ours {
		sessions = append(sessions, l.current)
	}
	l.mu.Unlock()
	l.session.transport.dialAgain() // the connections may have been idle for hours
	errs := make([]error, len(sessions))
	var wg sync.WaitGroup
	for i, c := range sessions {
		wg.Go(func() { errs[i] = l.session.logout(ctx, c) })
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Key returns the key that names the present session of the server in its list of sessions. Nobody
// can use the session with it. It is "" if the session is that of Options.Cookie.
func (s *Session) Key() string {
	s.logins.mu.Lock()
	defer s.logins.mu.Unlock()
	if s.logins.current == nil {
		return ""
	}
	return s.logins.current.key
}

// EndSession ends another session of the server, which a process that was killed has left. The
// parameter key is what Key returned in that process. EndSession returns nil if there is no such
// session any more. The user needs a privilege for it (Sessions.TerminateSession).
func (s *Session) EndSession(ctx context.Context, key string) error {
	_, err := methods.TerminateSession(ctx, s.client, &types.TerminateSession{This: *s.client.ServiceContent.SessionManager, SessionId: []string{key}})
	if fault.Is(err, &types.NotFound{}) {
		return nil
	}
	return err
}

// logout ends a session of the server. It makes a second attempt if the connection is lost.
func (s *Session) logout(ctx context.Context, c *login) error {
	var err error
	for range 2 {
		_, err = methods.Logout(ctx, roundTripper{Session: s, login: c}, &types.Logout{This: *s.client.ServiceContent.SessionManager})
		if err == nil || sessionEnded(err) {
			return nil
		}
		if ctx.Err() != nil {
			err = fmt.Errorf("%s did not answer within %v", s.address(), s.closeTimeout)
			break
		}
		if !isTransient(err) {
			break
		}
	}
	return fmt.Errorf("cannot log out; the server ends the session when it has been idle for some time: %w", err)
}

// userSession returns the session of the server with the cookie of c. It returns nil if there is
// none.
func (s *Session) userSession(ctx context.Context, c *login) (*types.UserSession, error) {
	return session.NewManager(&vim25.Client{
		Client: c.Client, ServiceContent: s.client.ServiceContent, RoundTripper: roundTripper{Session: s, login: c},
	}).UserSession(ctx)
}

// isRefusedLogin reports whether err, an error of the call Login, says that the server refused the
// user and the password. Other errors, such as those of a server that is starting, may pass.
func isRefusedLogin(err error) bool {
	return fault.Is(err, &types.InvalidLogin{}) || fault.Is(err, &types.PasswordExpired{}) || fault.Is(err, &types.NoPermission{})
}

// LoginError says that a server has refused a login, or that a session has ended and its cookie is
// all that is known. A Session makes no login after one that was refused, because servers lock
// accounts after a few refused logins.
type LoginError struct {
	Server string
	User   string // "" if there is only a cookie
	Err    error  // the answer of the server; nil if the session of the cookie has ended
	Again  bool   // no login was attempted now, because the server has refused one before
	Opened bool   // the session was open before
	odd    string // see oddSecret
}

func (e *LoginError) Error() string {
	switch {
	case e.Err == nil && e.Opened:
		return fmt.Sprintf("%s: the session that the cookie names has ended", e.Server)
	case e.Err == nil:
		return fmt.Sprintf("%s: the cookie names no open session: the session has ended, or the cookie is wrong", e.Server)
	case e.Again:
		return fmt.Sprintf("no login was attempted, because the server has refused it before: %v", e.Err)
	}
	return e.Err.Error()
}

func (e *LoginError) Unwrap() error { return e.Err }

// Hint tells the user what to do about the error.
func (e *LoginError) Hint() string {
	hint := "check --user (user@domain or DOMAIN\\user) and the password"
	switch {
	case e.Err == nil:
		hint = "log in anew and pass the cookie of the new session, or pass --user and --password: then vddkcp can log in by itself"
	case fault.Is(e.Err, &types.PasswordExpired{}):
		return "set a new password for the user"
	case fault.Is(e.Err, &types.NoPermission{}):
		return "give the user a role on the server"
	}
	if e.odd != "" {
		hint += "; " + e.odd
	}
	return hint
}

// ExitStatus is the exit status of the command. A run that was interrupted because the session
// ended can be resumed with another login.
func (e *LoginError) ExitStatus() int {
	if e.Opened {
		return exit.Resumable
	}
	return exit.Failed
}

// Transient tells transfer/report that the same login would be refused again.
func (e *LoginError) Transient() bool { return false }

// oddSecret describes a likely typing error in a password or a cookie, without showing it. It is ""
// if nothing looks wrong.
func oddSecret(kind string, s secret.Secret) string {
	if odd := s.Odd(); odd != "" {
		return "the " + kind + " has " + odd
	}
	return ""
}

// The value of a cookie has only these characters. RFC 6265 excludes the blank, which old servers use.
var cookieValue = regexp.MustCompile(`^[ !#-+\--:<-\[\]-~]+$`)

// parseCookie returns the value of a cookie, without quotes, from one of the forms in which users
// find it: "VALUE" with or without quotes, and vmware_soap_session="VALUE", perhaps with the
// attributes of the header Set-Cookie after it.
func parseCookie(s secret.Secret) (secret.Secret, error) {
	text := strings.TrimSpace(s.Reveal())
	text = strings.TrimSpace(strings.TrimPrefix(text, soap.SessionCookieName+"="))
	text, _, _ = strings.Cut(text, ";")
	text = strings.TrimSpace(text)
	if unquoted, ok := strings.CutPrefix(text, `"`); ok {
		text = strings.TrimSuffix(unquoted, `"`)
	}
	if !cookieValue.MatchString(text) {
		return s, usage.New("--cookie is not the value of a cookie", "pass the value of vmware_soap_session, as the server has sent it in the header Set-Cookie")
	}
	return secret.New(text), nil
}
