package vsphere

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/vmware/govmomi/fault"
	pc "github.com/vmware/govmomi/property"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/internal/sha1"
	"github.com/vddkcp/vddkcp/internal/syncbuffer"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// optionsFor returns the options for a server. Lost calls are repeated up to five times, with pauses in
// which a server that is restarted comes back. Tasks are looked at every millisecond.
func optionsFor(s *vspheretest.Server) Options {
	return Options{
		Server: s.Host, Port: s.Port, User: s.User, Password: secret.New(s.Password), Thumbprint: s.Thumbprint(),
		UserAgent: "vddkcp/test", Poll: time.Millisecond,
		Retry: retry.Policy{Retries: 5, Backoff: func(int) time.Duration { return 10 * time.Millisecond }},
	}
}

// openSession connects to a server. The session is closed at the end of the test.
func openSession(t *testing.T, s *vspheretest.Server, change ...func(*Options)) *Session {
	t.Helper()
	o := optionsFor(s)
	for _, f := range change {
		f(&o)
	}
	session, err := Connect(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { session.Close() })
	return session
}

// names reads the names of the server's VMs.
func (s *Session) names(ctx context.Context, vms ...types.ManagedObjectReference) error {
	var list []mo.VirtualMachine
	err := pc.DefaultCollector(s.client).Retrieve(ctx, vms, []string{"name"}, &list)
	if err == nil && len(list) != len(vms) {
		return errors.New("some VMs are missing")
	}
	return err
}

// snapshot makes the call that must not be repeated.
func (s *Session) snapshot(ctx context.Context, vm types.ManagedObjectReference) error {
	_, err := methods.CreateSnapshot_Task(ctx, s.client, &types.CreateSnapshot_Task{This: vm, Name: "one"})
	return err
}

func exitStatus(err error) int {
	e := (interface{ ExitStatus() int })(nil)
	if errors.As(err, &e) {
		return e.ExitStatus()
	}
	return 1
}

func hint(err error) string {
	h := (interface{ Hint() string })(nil)
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

func TestConnect(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t)
	for name, thumbprint := range map[string]string{
		"SHA-256": s.Thumbprint(),
		"SHA-1":   strings.ToLower(strings.ReplaceAll(s.ThumbprintSHA1(), ":", "")),
	} {
		t.Run(name, func(t *testing.T) {
			session := openSession(t, s, func(o *Options) { o.Thumbprint = thumbprint })
			open := s.Sessions()
			if len(open) != 1 || open[0].Agent != "vddkcp/test" || open[0].User != s.User {
				t.Fatalf("sessions %v", open)
			}
			cookie, err := session.Cookie(t.Context())
			if err != nil || cookie.Reveal() != open[0].Key {
				t.Errorf("cookie %q, %v; want %q", cookie.Reveal(), err, open[0].Key)
			}
			if a := session.About(); !a.VCenter || a.InstanceUUID == "" || a.Version == "" || a.Build == "" || a.Name == "" {
				t.Errorf("%+v", a)
			}
			if by, err := session.ManagedBy(t.Context()); by != "" || err != nil {
				t.Errorf("managed by %q, %v", by, err)
			}
			if err := errors.Join(session.Close(), session.Close()); err != nil {
				t.Error(err)
			}
			if open := s.Sessions(); len(open) != 0 {
				t.Errorf("sessions %v after Close", open)
			}
			if err := session.names(t.Context(), types.ManagedObjectReference{}); !errors.Is(err, errClosed) {
				t.Errorf("%v, want %v", err, errClosed)
			}
		})
	}
}

// inChild runs a test again in a process of its own, with an environment that names a server.
func inChild(t *testing.T, s *vspheretest.Server, environment ...string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^"+t.Name()+"$")
	cmd.Env = append(os.Environ(), "VDDKCP_TEST_PORT="+strconv.FormatUint(uint64(s.Port), 10), "VDDKCP_TEST_THUMBPRINT="+s.Thumbprint())
	cmd.Env = append(cmd.Env, environment...)
	if out, err := cmd.CombinedOutput(); err != nil || s.Calls()["Login"] != 1 || s.Calls()["Logout"] != 1 {
		t.Errorf("%v, calls %v\n%s", err, s.Calls(), out)
	}
}

// childOptions returns the options for the server that the environment names. The result is nil in
// the process in which the test begins.
func childOptions(t *testing.T) *Options {
	t.Helper()
	port := os.Getenv("VDDKCP_TEST_PORT")
	if port == "" {
		return nil
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	return &Options{
		Server: "127.0.0.1", Port: uint32(n), User: vspheretest.DefaultUser, Password: secret.New(vspheretest.DefaultPassword),
		Thumbprint: os.Getenv("VDDKCP_TEST_THUMBPRINT"),
	}
}

// Where SHA-1 is not allowed, a SHA-256 thumbprint is enough for the calls of the API.
func TestNoSHA1(t *testing.T) {
	o := childOptions(t)
	if o == nil {
		inChild(t, vspheretest.New(t), "GODEBUG=fips140=only")
		return
	}
	session, err := Connect(t.Context(), *o)
	if err != nil {
		t.Fatal(err)
	}
	if err := session.Close(); err != nil {
		t.Error(err)
	}
	o.Thumbprint = strings.Repeat("ab", 20)
	if _, err := Connect(t.Context(), *o); !errors.As(err, new(*sha1.NotAllowedError)) {
		t.Errorf("%v", err)
	}
}

// Without a thumbprint, the authorities of the system must verify the certificate. Go reads them
// once in each process.
func TestSystemAuthorities(t *testing.T) {
	o := childOptions(t)
	if o == nil {
		s := vspheretest.New(t)
		roots := filepath.Join(t.TempDir(), "roots.pem")
		if err := os.WriteFile(roots, s.CertificatePEM(), 0o600); err != nil {
			t.Fatal(err)
		}
		inChild(t, s, "SSL_CERT_FILE="+roots, "SSL_CERT_DIR=/nowhere", "VDDKCP_TEST_THUMBPRINT=")
		return
	}
	session, err := Connect(t.Context(), *o)
	if err != nil {
		t.Fatal(err)
	}
	if err := session.Close(); err != nil {
		t.Error(err)
	}
}

func TestManagedBy(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.Configure(func(o *vspheretest.Options) { o.ESXi, o.ManagedBy = true, "192.0.2.1" }))
	session := openSession(t, s)
	if by, err := session.ManagedBy(t.Context()); by != "192.0.2.1" || err != nil || session.About().VCenter {
		t.Errorf("managed by %q, %v", by, err)
	}
}

func TestOptions(t *testing.T) {
	t.Parallel()
	full := Options{Server: "vc", User: "u", Password: secret.New("p")}
	for name, c := range map[string]struct {
		change func(*Options)
		fails  string
	}{
		"no server":           {func(o *Options) { o.Server = "" }, "missing: --server"},
		"nothing":             {func(o *Options) { *o = Options{} }, "missing: --server, --user, --password or --cookie"},
		"a URL":               {func(o *Options) { o.Server = "https://vc" }, `"https://vc": expected only the name`},
		"a port":              {func(o *Options) { o.Server = "vc:444" }, `"vc:444": expected only the name`},
		"a user":              {func(o *Options) { o.Server = "u@vc" }, "expected only the name"},
		"a big port":          {func(o *Options) { o.Port = 70000 }, "70000 is not a port"},
		"no thumbprint":       {func(o *Options) { o.Thumbprint = "xx" }, "not a thumbprint"},
		"a strange cookie":    {func(o *Options) { o.Cookie = secret.New("a\nb") }, "--cookie is not the value of a cookie"},
		"an empty cookie":     {func(o *Options) { o.Cookie = secret.New(`""`) }, "--cookie is not the value of a cookie"},
		"an IPv6 address [ ]": {func(o *Options) { o.Server = "[::1]" }, "expected only the name"},
	} {
		t.Run(name, func(t *testing.T) {
			o := full
			c.change(&o)
			_, err := Connect(t.Context(), o)
			if !errors.As(err, new(*usage.Error)) || !strings.Contains(err.Error(), c.fails) || exitStatus(err) != 2 {
				t.Errorf("%v, want a usage.Error with %q", err, c.fails)
			}
		})
	}
	for server, want := range map[string]string{
		"vc": "https://vc:444/sdk", "::1": "https://[::1]:444/sdk", "fe80::1%eth0": "https://[fe80::1%25eth0]:444/sdk",
	} {
		o, err := Options{Server: server, Port: 444, User: "u", Password: secret.New("p")}.withDefaults()
		if err != nil {
			t.Fatal(err)
		}
		certs, err := newCertificates(&o)
		if err != nil {
			t.Fatal(err)
		}
		if got := newTransport(&o, certs).newClient().URL().String(); got != want {
			t.Errorf("%s, want %s", got, want)
		}
	}
}

// Close logs out although the context of the last call has ended, and does not wait for a server
// that does not answer.
func TestCloseIsBounded(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t)
	session := openSession(t, s)
	session.closeTimeout = 50 * time.Millisecond
	logout := s.On("Logout", vspheretest.Fault{Hang: true})
	err := session.Close()
	if err == nil || !strings.Contains(err.Error(), "cannot log out") || !strings.Contains(err.Error(), "did not answer within 50ms") {
		t.Errorf("%v", err)
	}
	if again := session.Close(); again == nil || again.Error() != err.Error() {
		t.Errorf("%v, then %v", err, again)
	}
	<-logout.Arrived()
}

// A lost connection does not keep Close from logging out.
func TestCloseLogsOut(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t)
	for _, f := range []vspheretest.Fault{{Cut: vspheretest.Before, Times: 1}, {Cut: vspheretest.After, Times: 1}, {Status: 503, Times: 1}} {
		session := openSession(t, s)
		s.On("Logout", f)
		if err := session.Close(); err != nil || len(s.Sessions()) != 0 {
			t.Errorf("%+v: %v; sessions %v", f, err, s.Sessions())
		}
	}
}

// If Connect is interrupted during the login, or fails after it, no session stays.
func TestConnectLeavesNoSession(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t)
	login := s.On("Login", vspheretest.Fault{Late: true})
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("enough")
	go func() {
		<-login.Arrived()
		cancel(stop)
		login.Release()
	}()
	if _, err := Connect(ctx, optionsFor(s)); !errors.Is(err, stop) {
		t.Errorf("%v, want %v", err, stop)
	}
	if open := s.Sessions(); len(open) != 0 || s.Calls()["Logout"] != 1 {
		t.Errorf("sessions %v, calls %v", open, s.Calls())
	}
}

// A server that hangs while Connect is interrupted does not keep Connect for long.
func TestConnectIsInterrupted(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t)
	call := s.On("RetrieveServiceContent", vspheretest.Fault{Hang: true})
	ctx, cancel := context.WithCancelCause(t.Context())
	stop := errors.New("enough")
	go func() {
		<-call.Arrived()
		cancel(stop)
	}()
	if _, err := Connect(ctx, optionsFor(s)); !errors.Is(err, stop) {
		t.Errorf("%v, want %v", err, stop)
	}
}

// The session is called again and again, also after errors, which are logged once.
func TestKeepAlive(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t)
	later := s.On("CurrentTime", vspheretest.Fault{Skip: 5})
	s.On("CurrentTime", vspheretest.Fault{Soap: new(types.InvalidState), Times: 3}) // the first calls
	var log syncbuffer.Buffer
	session := openSession(t, s, func(o *Options) {
		o.KeepAlive = time.Millisecond
		o.Log = slog.New(slog.NewTextHandler(&log, nil))
	})
	<-later.Arrived()
	if err := session.Close(); err != nil {
		t.Error(err)
	}
	if n := strings.Count(log.String(), "cannot keep the session open"); n != 1 {
		t.Errorf("%d warnings, want one:\n%s", n, &log)
	}
	if open := s.Sessions(); len(open) != 0 {
		t.Errorf("sessions %v", open)
	}
}

// No password and no cookie is in an error or in the log, whatever happens.
func TestSecretsStaySecret(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	var log syncbuffer.Buffer
	var errs []error
	debug := func(o *Options) {
		o.Log = slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	}
	session := openSession(t, s, debug)
	session.Log.Debug("all of it", "options", session.Options, "session", session.About())
	first, err := session.Cookie(t.Context())
	errs = append(errs, err)
	for _, f := range []vspheretest.Fault{
		{Cut: vspheretest.After}, {Truncate: true}, {Status: 503}, {Status: 302}, {Soap: new(types.NotAuthenticated)}, {Soap: new(types.NoPermission)},
	} {
		rule := s.On("", f)
		errs = append(errs, session.names(t.Context(), s.Find("web01")), session.snapshot(t.Context(), s.Find("web01")))
		_, err := session.Cookie(t.Context())
		errs = append(errs, err)
		_, err = Connect(t.Context(), session.Options)
		errs = append(errs, err)
		rule.Remove()
	}
	refused := optionsFor(s)
	debug(&refused)
	refused.Password = secret.New("wrong " + s.Password)
	_, err = Connect(t.Context(), refused)
	errs = append(errs, err)
	refused.Cookie = secret.New("dead-" + first.Reveal())
	_, err = Connect(t.Context(), refused)
	errs = append(errs, err, session.Close())
	text := log.String()
	for _, err := range errs {
		if err != nil {
			text += err.Error() + " " + hint(err) + "\n"
		}
	}
	for what, secret := range map[string]string{"password": s.Password, "cookie": first.Reveal()} {
		if i := strings.Index(text, secret); i >= 0 {
			t.Errorf("the %s is in:\n%s", what, text[max(i-300, 0):i])
		}
	}
	if len(text) < 1000 || !strings.Contains(text, "refused the login") {
		t.Errorf("the log is not there:\n%s", text)
	}
}

// A retrieval in several pages begins again when its session has ended or a page was lost.
func TestTogether(t *testing.T) {
	t.Parallel()
	for name, disturb := range map[string]func(s *vspheretest.Server, page int){
		"nothing": func(*vspheretest.Server, int) {},
		"session ended": func(s *vspheretest.Server, page int) {
			if page == 2 {
				s.EndSessions()
			}
		},
		"session ended early": func(s *vspheretest.Server, page int) {
			if page == 0 {
				s.EndSessions()
			}
		},
		"page lost": func(s *vspheretest.Server, page int) {
			if page == 2 {
				s.On("ContinueRetrievePropertiesEx", vspheretest.Fault{Cut: vspheretest.After, Times: 1})
			}
		},
		"server restarted": func(s *vspheretest.Server, page int) {
			if page == 1 {
				s.Restart()
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := vspheretest.New(t, vspheretest.VM{Name: "a"}, vspheretest.VM{Name: "b"}, vspheretest.VM{Name: "c"}, vspheretest.VM{Name: "d"})
			session := openSession(t, s)
			runs := 0
			var found []string
			err := session.together(t.Context(), func(ctx context.Context) error {
				found = nil
				runs++
				return session.nameOnEachPage(ctx, func(page int, name string) {
					if page > 0 {
						found = append(found, name)
					}
					if runs == 1 {
						disturb(s, page)
					}
				})
			})
			want := 2
			if name == "nothing" {
				want = 1
			}
			slices.Sort(found)
			if err != nil || strings.Join(found, "") != "abcd" || runs != want {
				t.Errorf("found %v in %d runs, %v", found, runs, err)
			}
			if logins := s.Calls()["Login"]; logins > 2 {
				t.Errorf("%d logins", logins)
			}
		})
	}
}

// nameOnEachPage reads the names of all VMs through a view, one VM on each page. At
// first it calls f with page 0 and no name.
func (s *Session) nameOnEachPage(ctx context.Context, f func(page int, name string)) error {
	view, err := methods.CreateContainerView(ctx, s.client, &types.CreateContainerView{
		This: *s.client.ServiceContent.ViewManager, Container: s.client.ServiceContent.RootFolder, Type: []string{"VirtualMachine"}, Recursive: true,
	})
	if err != nil {
		return err
	}
	f(0, "")
	collector := s.client.ServiceContent.PropertyCollector
	first, err := methods.RetrievePropertiesEx(ctx, s.client, &types.RetrievePropertiesEx{
		This: collector, Options: types.RetrieveOptions{MaxObjects: 1},
		SpecSet: []types.PropertyFilterSpec{{
			PropSet:   []types.PropertySpec{{Type: "VirtualMachine", PathSet: []string{"name"}}},
			ObjectSet: []types.ObjectSpec{{Obj: view.Returnval, Skip: types.NewBool(true), SelectSet: []types.BaseSelectionSpec{&types.TraversalSpec{Type: "ContainerView", Path: "view"}}}},
		}},
	})
	if err != nil {
		return err
	}
	result := first.Returnval
	for page := 1; ; page++ {
		if result == nil {
			return errors.New("no page")
		}
		for _, o := range result.Objects {
			f(page, o.PropSet[0].Val.(string))
		}
		if result.Token == "" {
			_, err := methods.DestroyView(ctx, s.client, &types.DestroyView{This: view.Returnval})
			return err
		}
		next, err := methods.ContinueRetrievePropertiesEx(ctx, s.client, &types.ContinueRetrievePropertiesEx{This: collector, Token: result.Token})
		if err != nil {
			return err
		}
		result = &next.Returnval
	}
}

// A function that fails by itself is not called again.
func TestTogetherFails(t *testing.T) {
	t.Parallel()
	session := openSession(t, vspheretest.New(t))
	runs := 0
	own := errors.New("own error")
	err := session.together(t.Context(), func(ctx context.Context) error {
		runs++
		gone := types.ManagedObjectReference{Type: "VirtualMachine", Value: "vm-9999"}
		if err := session.names(ctx, gone); !fault.Is(err, &types.ManagedObjectNotFound{}) {
			t.Errorf("%v", err)
		}
		return own
	})
	if !errors.Is(err, own) || runs != 1 {
		t.Errorf("%v after %d runs", err, runs)
	}
}
