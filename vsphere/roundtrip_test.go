package vsphere

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// Calls that can be repeated survive lost connections. The others are made once, and their error
// says that nobody knows what has happened.
func TestLostCalls(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		fault vspheretest.Fault
		done  bool // the server has carried out the call
	}{
		"cut before":    {vspheretest.Fault{Cut: vspheretest.Before}, false},
		"cut after":     {vspheretest.Fault{Cut: vspheretest.After}, true},
		"truncated":     {vspheretest.Fault{Truncate: true}, true},
		"502":           {vspheretest.Fault{Status: 502}, false},
		"503":           {vspheretest.Fault{Status: 503}, false},
		"504":           {vspheretest.Fault{Status: 504}, false},
		"lost the host": {vspheretest.Fault{Soap: new(types.HostCommunication)}, false},
		"not connected": {vspheretest.Fault{Soap: new(types.HostNotConnected)}, false},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
			session := openSession(t, s)
			vm := s.Find("web01")
			twice := c.fault
			twice.Times = 2
			s.On("CurrentTime", twice)
			if now, err := methods.GetCurrentTime(t.Context(), session.client); err != nil || now.IsZero() {
				t.Errorf("%v, %v", now, err)
			}
			s.On("RetrievePropertiesEx", twice)
			s.On("RetrieveProperties", twice)
			if err := session.names(t.Context(), vm); err != nil {
				t.Error(err)
			}
			s.On("CreateSnapshot_Task", c.fault)
			err := session.snapshot(t.Context(), vm)
			var uncertain *UncertainError
			if !errors.As(err, &uncertain) || uncertain.Denied || exitStatus(err) != 75 {
				t.Errorf("%v, want an UncertainError", err)
			}
			s.Settle()
			if got := len(s.Snapshots("web01")); got != map[bool]int{true: 1}[c.done] || s.Calls()["CreateSnapshot_Task"] != 1 {
				t.Errorf("%d snapshots after %d calls", got, s.Calls()["CreateSnapshot_Task"])
			}
			if logins := s.Calls()["Login"]; logins != 1 {
				t.Errorf("%d logins", logins)
			}
		})
	}
}

// A call that always fails is given up as Options.Retry says.
func TestGivesUp(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	s.On("CurrentTime", vspheretest.Fault{Status: 503})
	_, err := methods.GetCurrentTime(t.Context(), session.client)
	if err == nil || !strings.Contains(err.Error(), "gave up after 5 retries") || !strings.Contains(err.Error(), "503") ||
		!strings.Contains(err.Error(), "the request to tell the time") || exitStatus(err) != 75 || !isTransient(err) {
		t.Errorf("%v", err)
	}
	if calls := s.Calls()["CurrentTime"]; calls != 6 {
		t.Errorf("%d calls", calls)
	}
}

// A call that reads survives two failures inside the server. No other call is repeated after one.
func TestInternalFailures(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	vm := s.Find("web01")
	reads := s.On("RetrievePropertiesEx", vspheretest.Fault{Soap: new(types.SystemError), Times: 2})
	if err := session.names(t.Context(), vm); err != nil || reads.Hits() != 2 {
		t.Errorf("%v after %d failures", err, reads.Hits())
	}
	reads = s.On("RetrievePropertiesEx", vspheretest.Fault{Soap: new(types.SystemError)})
	if err := session.names(t.Context(), vm); err == nil || exitStatus(err) != 1 || reads.Hits() != 3 {
		t.Errorf("%v after %d failures", err, reads.Hits())
	}
	makes := s.On("CreateSnapshot_Task", vspheretest.Fault{Soap: new(types.SystemError), Times: 1})
	if err := session.snapshot(t.Context(), vm); err == nil || makes.Hits() != 1 || s.Calls()["CreateSnapshot_Task"] != 1 {
		t.Errorf("%v after %d calls", err, s.Calls()["CreateSnapshot_Task"])
	}
}

// If the session has ended, the call that must not be repeated is left to its caller, after a login.
func TestDeniedSnapshot(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	vm := s.Find("web01")
	s.EndSessions()
	err := session.snapshot(t.Context(), vm)
	var uncertain *UncertainError
	if !errors.As(err, &uncertain) || !uncertain.Denied {
		t.Errorf("%v, want a denied UncertainError", err)
	}
	if logins := s.Calls()["Login"]; logins != 2 {
		t.Errorf("%d logins", logins)
	}
	if err := session.snapshot(t.Context(), vm); err != nil {
		t.Error(err)
	}
}

// A server that is starting answers with 404 for the services that are not there yet.
func TestServerStarts(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	s.On("CreateSnapshot_Task", vspheretest.Fault{Status: 404, Times: 2})
	if err := session.snapshot(t.Context(), s.Find("web01")); err != nil || s.Calls()["CreateSnapshot_Task"] != 3 {
		t.Errorf("%v after %d calls", err, s.Calls()["CreateSnapshot_Task"])
	}
}

// A server that refuses a request has not carried it out.
func TestRefusedSnapshot(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	for _, f := range []vspheretest.Fault{{Status: 403}, {Soap: new(types.NoPermission)}, {Soap: new(types.TaskInProgress)}} {
		rule := s.On("CreateSnapshot_Task", f)
		err := session.snapshot(t.Context(), s.Find("web01"))
		if err == nil || errors.As(err, new(*UncertainError)) || rule.Hits() != 1 {
			t.Errorf("%v after %d calls", err, rule.Hits())
		}
	}
}

// A call that has not reached the server at all is repeated, whatever it does.
func TestServerAway(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	var lost atomic.Value
	session := openSession(t, s, func(o *Options) {
		o.Retry.OnRetry = func(err error, _ time.Duration) {
			lost.Store(err)
			s.Resume()
		}
	})
	s.Stop()
	if err := session.snapshot(t.Context(), s.Find("web01")); err != nil {
		t.Error(err)
	}
	if err, ok := lost.Load().(error); !ok || !strings.Contains(err.Error(), "cannot connect to 127.0.0.1:") || exitStatus(err) != 75 {
		t.Errorf("%v", err)
	}
	if calls := s.Calls()["CreateSnapshot_Task"]; calls != 1 {
		t.Errorf("%d calls", calls)
	}
}

// A call without an answer ends after Options.Timeout.
func TestTimeout(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	vm := s.Find("web01")
	s.On("CreateSnapshot_Task", vspheretest.Fault{Hang: true})
	s.On("CurrentTime", vspheretest.Fault{Hang: true, Times: 1})
	// On a slow machine, connecting alone may take longer than the first timeout.
	session.Timeout = 50 * time.Millisecond
	session.Retry.Retries = -1
	session.Retry.OnRetry = func(error, time.Duration) { session.Timeout *= 2 }
	err := session.snapshot(t.Context(), vm)
	if !errors.As(err, new(*UncertainError)) || !strings.Contains(err.Error(), "did not answer the request to make a snapshot within") {
		t.Errorf("%v", err)
	}
	if _, err := methods.GetCurrentTime(t.Context(), session.client); err != nil {
		t.Error(err)
	}
	if calls := s.Calls()["CreateSnapshot_Task"]; calls != 1 {
		t.Errorf("%d calls", calls)
	}
}

// A call ends with its context.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	vm := s.Find("web01")
	stop := errors.New("enough")
	for method, call := range map[string]func(ctx context.Context) error{
		"CurrentTime": func(ctx context.Context) error {
			_, err := methods.GetCurrentTime(ctx, session.client)
			return err
		},
		"CreateSnapshot_Task": func(ctx context.Context) error { return session.snapshot(ctx, vm) },
	} {
		ctx, cancel := context.WithCancelCause(t.Context())
		rule := s.On(method, vspheretest.Fault{Hang: true})
		go func() {
			<-rule.Arrived()
			cancel(stop)
		}()
		err := call(ctx)
		if uncertain := errors.As(err, new(*UncertainError)); !errors.Is(err, stop) || uncertain != (method == "CreateSnapshot_Task") {
			t.Errorf("%s: %v", method, err)
		}
		if err := call(ctx); !errors.Is(err, stop) || errors.As(err, new(*UncertainError)) {
			t.Errorf("%s, not begun: %v", method, err)
		}
	}
}

// A certificate that changes during the work is an error that shows both thumbprints.
func TestCertificateChanges(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	old := s.Thumbprint()
	session := openSession(t, s)
	s.RenewCertificate()
	_, err := methods.GetCurrentTime(t.Context(), session.client)
	var changed *ChangedError
	if !errors.As(err, &changed) || exitStatus(err) != 75 || hint(err) == "" || isTransient(err) {
		t.Fatalf("%v", err)
	}
	for _, want := range []string{old, s.Thumbprint()} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%v, want %s", err, want)
		}
	}
	if err := session.snapshot(t.Context(), s.Find("web01")); !errors.As(err, new(*ChangedError)) || errors.As(err, new(*UncertainError)) {
		t.Errorf("%v", err)
	}
	if err := session.Close(); !errors.As(err, new(*ChangedError)) {
		t.Errorf("%v", err)
	}
}

func TestChangedErrorWithoutThumbprint(t *testing.T) {
	t.Parallel()
	c := certificates{server: "vc"}
	now := certificate.Certificate{SHA256: "NEW", Trust: errors.New("signed by nobody")}
	if err := c.explain(&certificate.Error{Server: "vc", Got: now}); errors.As(err, new(*ChangedError)) || exitStatus(err) != 2 {
		t.Errorf("%v at the first connection", err)
	}
	c.accepted(&certificate.Certificate{SHA256: "OLD"})
	c.accepted(&certificate.Certificate{SHA256: "RENEWED"})
	err := c.explain(&certificate.Error{Server: "vc", Got: now})
	const want = "vc: the certificate has changed: its SHA-256 thumbprint was RENEWED and is now NEW, and it does not verify: signed by nobody"
	if err.Error() != want {
		t.Errorf("%v\nwant %s", err, want)
	}
}

// Nothing is sent to a server whose certificate is not accepted.
func TestCertificateRefused(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t)
	for name, thumbprint := range map[string]string{
		"another SHA-256": strings.Repeat("ab", 32), "another SHA-1": strings.Repeat("ab", 20), "nobody vouches": "",
	} {
		o := optionsFor(s)
		o.Thumbprint = thumbprint
		_, err := Connect(t.Context(), o)
		if !errors.As(err, new(*certificate.Error)) || errors.As(err, new(*ChangedError)) || exitStatus(err) != 2 || hint(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
		if err != nil && strings.Contains(err.Error(), "Post") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if calls := s.Calls(); len(calls) != 0 {
		t.Errorf("calls %v", calls)
	}
}

// foreign returns the options for a server that is not one of vSphere.
func foreign(t *testing.T, handler http.HandlerFunc) Options {
	t.Helper()
	s := httptest.NewTLSServer(handler)
	t.Cleanup(s.Close)
	return optionsOf(t, s.Listener.Addr(), s.Certificate().Raw)
}

func optionsOf(t *testing.T, address net.Addr, leaf []byte) Options {
	t.Helper()
	host, port, err := net.SplitHostPort(address.String())
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		t.Fatal(err)
	}
	return Options{
		Server: host, Port: uint32(n), User: "u", Password: secret.New("p"), Thumbprint: sha256Hex(leaf),
	}
}

func TestForeignServers(t *testing.T) {
	t.Parallel()
	elsewhere := httptest.NewTLSServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { t.Error("a redirection was followed") }))
	t.Cleanup(elsewhere.Close)
	for name, c := range map[string]struct {
		answer    http.HandlerFunc
		want      string
		transient bool
	}{
		"a redirection": {func(w http.ResponseWriter, r *http.Request) {
			http.Redirect(w, r, elsewhere.URL+"/sdk", http.StatusTemporaryRedirect)
		}, `"307 Temporary Redirect" (a redirection to "` + elsewhere.URL, false},
		"not found": {http.NotFound, `HTTP status "404 Not Found"`, false},
		"a page": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html; charset=utf-8")
			fmt.Fprint(w, "<html>Welcome</html>")
		}, `HTTP status "200 OK" and the media type "text/html`, false},
		"no SOAP": {func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/xml")
			fmt.Fprint(w, "<hello/>")
		}, "not one of the vSphere API", false},
		"overloaded": {func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusServiceUnavailable) }, "503 Service Unavailable", true},
		"nothing":    {func(http.ResponseWriter, *http.Request) { panic(http.ErrAbortHandler) }, "the connection was lost", true},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Connect(t.Context(), foreign(t, c.answer))
			if err == nil || !strings.Contains(err.Error(), c.want) || exitStatus(err) != 1 || isTransient(err) != c.transient {
				t.Errorf("%v, want %q", err, c.want)
			}
			if !c.transient && hint(err) == "" {
				t.Errorf("%v has no hint", err)
			}
		})
	}
	t.Run("no TLS", func(t *testing.T) {
		plain := httptest.NewServer(http.NotFoundHandler())
		defer plain.Close()
		_, err := Connect(t.Context(), optionsOf(t, plain.Listener.Addr(), nil))
		if err == nil || !strings.Contains(err.Error(), "the server does not speak TLS") || isTransient(err) {
			t.Errorf("%v", err)
		}
	})
	t.Run("nothing listens", func(t *testing.T) {
		_, err := Connect(t.Context(), Options{Server: "127.0.0.1", Port: 1, User: "u", Password: secret.New("p")})
		if err == nil || !strings.Contains(err.Error(), "cannot connect to 127.0.0.1:1: ") || exitStatus(err) != 1 || !isTransient(err) || hint(err) == "" {
			t.Errorf("%v", err)
		}
	})
}

// The certificate of the server is checked through a proxy, too.
func TestProxy(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t)
	var tunnels atomic.Int32
	refuse := new(atomic.Bool)
	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect || refuse.Load() {
			w.WriteHeader(http.StatusForbidden)
			return
		}
		tunnels.Add(1)
		tunnel(t, w, r.Host)
	}))
	defer proxy.Close()
	through := func(o *Options) {
		u, err := url.Parse(proxy.URL)
		if err != nil {
			t.Fatal(err)
		}
		u.User = url.UserPassword("user", "proxypassword")
		o.proxy = http.ProxyURL(u)
	}
	session := openSession(t, s, through)
	if err := session.Close(); err != nil || tunnels.Load() == 0 {
		t.Errorf("%v, %d tunnels", err, tunnels.Load())
	}
	o := optionsFor(s)
	through(&o)
	o.Thumbprint = strings.Repeat("ab", 32)
	if _, err := Connect(t.Context(), o); !errors.As(err, new(*certificate.Error)) {
		t.Errorf("%v", err)
	}
	refuse.Store(true)
	_, err := Connect(t.Context(), o)
	if err == nil || !strings.Contains(err.Error(), "through the proxy http://user:xxxxx@127.0.0.1:") || !strings.Contains(err.Error(), "Forbidden") ||
		!strings.Contains(hint(err), "NO_PROXY") {
		t.Errorf("%v, hint %q", err, hint(err))
	}
}

// tunnel connects the client of a request with an address.
func tunnel(t *testing.T, w http.ResponseWriter, address string) {
	server, err := net.Dial("tcp", address)
	if err != nil {
		t.Error(err)
		return
	}
	defer server.Close()
	client, _, err := w.(http.Hijacker).Hijack()
	if err != nil {
		t.Error(err)
		return
	}
	defer client.Close()
	fmt.Fprint(client, "HTTP/1.1 200 OK\r\n\r\n")
	join(client, server)
}

// The address of a server can be an IPv6 address.
func TestIPv6(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Skipf("this system has no IPv6: %v", err)
	}
	defer l.Close()
	s := vspheretest.New(t)
	go func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", net.JoinHostPort(s.Host, fmt.Sprint(s.Port)))
			if err != nil {
				t.Error(err)
				return
			}
			go join(client, server)
		}
	}()
	session := openSession(t, s, func(o *Options) { o.Server, o.Port = "::1", uint32(l.Addr().(*net.TCPAddr).Port) })
	if err := session.Close(); err != nil {
		t.Error(err)
	}
}
