package vsphere

import (
	"errors"
	"strings"
	"sync"
	"testing"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// at calls f in n goroutines at the same time and returns the errors.
func at(n int, f func() error) []error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = f() })
	}
	wg.Wait()
	return errs
}

// together makes the first n calls of a method wait until all of them have arrived.
func together(s *vspheretest.Server, method string, n int) {
	var arrived sync.WaitGroup
	arrived.Add(n)
	s.On(method, vspheretest.Fault{Times: n, Do: func() {
		arrived.Done()
		arrived.Wait()
	}})
}

// When a session has ended, all callers share one login, and their calls are repeated.
func TestSessionEnded(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	old, err := session.Cookie(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	s.EndSessions()
	together(s, "CurrentTime", 20)
	for _, err := range at(20, func() error {
		_, err := methods.GetCurrentTime(t.Context(), session.client)
		return err
	}) {
		if err != nil {
			t.Error(err)
		}
	}
	if logins := s.Calls()["Login"]; logins != 2 {
		t.Errorf("%d logins, want 2", logins)
	}
	s.EndSessions()
	cookie, err := session.Cookie(t.Context())
	if open := s.Sessions(); err != nil || len(open) != 1 || cookie.Reveal() != open[0].Key || cookie == old {
		t.Errorf("cookie %q, %v; sessions %v", cookie.Reveal(), err, open)
	}
	if err := session.Close(); err != nil || len(s.Sessions()) != 0 {
		t.Errorf("%v; sessions %v", err, s.Sessions())
	}
}

// A session that the server only calls ended is logged out of, too.
func TestSessionSeemsEnded(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	s.On("RetrievePropertiesEx", vspheretest.Fault{Soap: new(types.NotAuthenticated), Times: 1})
	s.On("RetrieveProperties", vspheretest.Fault{Soap: new(types.NotAuthenticated), Times: 1})
	logout := s.On("Logout", vspheretest.Fault{Hang: true, Times: 1}) // in the background; Close interrupts it
	if err := session.names(t.Context(), s.Find("web01")); err != nil {
		t.Fatal(err)
	}
	<-logout.Arrived()
	if err := session.Close(); err != nil || len(s.Sessions()) != 0 {
		t.Errorf("%v; sessions %v", err, s.Sessions())
	}
	if logins := s.Calls()["Login"]; logins != 2 {
		t.Errorf("%d logins, want 2", logins)
	}
}

// A server that calls every session ended does not keep a call busy for ever.
func TestEverySessionEnds(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	s.On("CurrentTime", vspheretest.Fault{Soap: new(types.NotAuthenticated)})
	if _, err := methods.GetCurrentTime(t.Context(), session.client); !sessionEnded(err) {
		t.Error(err)
	}
	if logins := s.Calls()["Login"]; logins != 1+maxLogins {
		t.Errorf("%d logins", logins)
	}
	if err := session.Close(); err != nil || len(s.Sessions()) != 0 {
		t.Errorf("%v; sessions %v", err, s.Sessions())
	}
}

// The server sees a wrong password exactly once.
func TestRefusedLogin(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t)
	o := optionsFor(s)
	o.Password = secret.New("wrong\n")
	_, err := Connect(t.Context(), o)
	var refused *LoginError
	if !errors.As(err, &refused) || refused.Opened || refused.Again || exitStatus(err) != 1 || !retry.IsPermanent(err) {
		t.Errorf("%v", err)
	}
	if want := `refused the login of "` + s.User + `": the user name or the password is wrong`; !strings.Contains(err.Error(), want) {
		t.Errorf("%v, want %q", err, want)
	}
	if !strings.Contains(hint(err), "check --user") || !strings.Contains(hint(err), "the password has a newline at its end") {
		t.Errorf("hint %q", hint(err))
	}
	if logins := s.Calls()["Login"]; logins != 1 {
		t.Errorf("%d logins", logins)
	}
}

// After a password has been changed, the server sees the old one exactly once, however many calls
// need a login at the same time and later.
func TestRefusedLoginLater(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]types.BaseMethodFault{
		"wrong password": new(types.InvalidLogin), "expired": new(types.PasswordExpired), "no role": new(types.NoPermission),
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
			session := openSession(t, s)
			s.EndSessions()
			rule := s.On("Login", vspheretest.Fault{Soap: f})
			vm := s.Find("web01")
			together(s, "CurrentTime", 20)
			errs := at(20, func() error {
				_, err := methods.GetCurrentTime(t.Context(), session.client)
				return err
			})
			rule.Remove()
			errs = append(errs, at(3, func() error { return session.snapshot(t.Context(), vm) })...)
			_, err := session.Cookie(t.Context())
			for _, err := range append(errs, err) {
				var refused *LoginError
				if !errors.As(err, &refused) || !refused.Opened || exitStatus(err) != 75 || hint(err) == "" {
					t.Errorf("%v", err)
				}
			}
			if logins := s.Calls()["Login"]; logins != 2 {
				t.Errorf("%d logins, want 2", logins)
			}
			if !strings.Contains(err.Error(), "no login was attempted") {
				t.Errorf("%v", err)
			}
			if err := session.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// A login that a lost connection has interrupted is made again.
func TestLoginLost(t *testing.T) {
	t.Parallel()
	for name, f := range map[string]vspheretest.Fault{
		"cut":      {Cut: vspheretest.Before, Times: 2},
		"starting": {Status: 503, Times: 2},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
			session := openSession(t, s)
			s.EndSessions()
			s.On("Login", f)
			if err := session.names(t.Context(), s.Find("web01")); err != nil {
				t.Error(err)
			}
			if logins := s.Calls()["Login"]; logins != 4 {
				t.Errorf("%d logins, want 4", logins)
			}
		})
	}
}

func TestCookie(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	vm := s.Find("web01")
	owner := openSession(t, s)
	cookie, err := owner.Cookie(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	withCookie := func(text string) Options {
		o := optionsFor(s)
		o.User, o.Password, o.Cookie = "", secret.Secret{}, secret.New(text)
		return o
	}
	for _, form := range []string{
		"%", `"%"`, "vmware_soap_session=%", `vmware_soap_session="%"`, ` vmware_soap_session="%"; Path=/; HttpOnly; Secure; ` + "\n",
	} {
		session, err := Connect(t.Context(), withCookie(strings.ReplaceAll(form, "%", cookie.Reveal())))
		if err != nil {
			t.Errorf("%s: %v", form, err)
			continue
		}
		same, err := session.Cookie(t.Context())
		if err != nil || same != cookie {
			t.Errorf("%s: another cookie, %v", form, err)
		}
		if err := errors.Join(session.names(t.Context(), vm), session.Close()); err != nil {
			t.Errorf("%s: %v", form, err)
		}
	}
	if open := s.Sessions(); len(open) != 1 || s.Calls()["Login"] != 1 || s.Calls()["Logout"] != 0 {
		t.Errorf("sessions %v, calls %v", open, s.Calls())
	}

	session, err := Connect(t.Context(), withCookie(cookie.Reveal()))
	if err != nil {
		t.Fatal(err)
	}
	defer session.Close()
	s.EndSessions()
	_, later := session.Cookie(t.Context())
	_, dead := Connect(t.Context(), withCookie(cookie.Reveal()))
	for _, c := range []struct {
		err  error
		text string
		exit int
	}{
		{session.names(t.Context(), vm), "the session that the cookie names has ended", 75},
		{later, "the session that the cookie names has ended", 75},
		{dead, "the cookie names no open session", 1},
	} {
		if c.err == nil || !strings.Contains(c.err.Error(), c.text) || exitStatus(c.err) != c.exit || hint(c.err) == "" || !errors.As(c.err, new(*LoginError)) {
			t.Errorf("%v, exit %d; want %q, exit %d", c.err, exitStatus(c.err), c.text, c.exit)
		}
	}

	// With a password, too, a new session takes the place of the one that has ended.
	both := optionsFor(s)
	both.Cookie = cookie
	session, err = Connect(t.Context(), both)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(session.names(t.Context(), vm), session.Close()); err != nil || len(s.Sessions()) != 0 {
		t.Errorf("%v, sessions %v", err, s.Sessions())
	}
}
