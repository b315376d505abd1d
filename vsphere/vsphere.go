// Package vsphere talks to a vCenter server or an ESXi host: it logs in, finds virtual machines,
// describes them, makes and removes snapshots, and gets tickets for reading disks over NFC. It is
// the only package that imports govmomi.
//
//	s, err := vsphere.Connect(ctx, vsphere.Options{Server: "vcenter.example.com", User: "backup", Password: vsphere.NewSecret(password)})
//	defer s.Close()
//	vm, err := s.Find(ctx, "web01")
//	d, err := vm.Describe(ctx)
//
// A [Session] is one login, which all callers share.
package vsphere

import (
	"cmp"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/certificate"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/internal/usage"
)

// Secret is a password or a cookie. If it is printed, only stars appear; see [secret.Secret].
type Secret = secret.Secret

// NewSecret returns text as a Secret.
func NewSecret(text string) Secret { return secret.New(text) }

// Options say how to reach a server and how to log in.
type Options struct {
	Server   string // host name or address
	Port     uint32 // 0: 443
	User     string // not needed with a Cookie
	Password Secret // not needed with a Cookie
	// Cookie is the value of vmware_soap_session of a session that is open. Session uses it instead
	// of logging in. If that session ends, Session logs in with User and Password if they are set.
	Cookie     Secret
	Thumbprint string // SHA-1 or SHA-256 of the server's certificate; "": the system's authorities must verify it

	Timeout     time.Duration // of one call; 0: 2 minutes
	TaskTimeout time.Duration // how long to wait for a task; 0: 6 hours
	Poll        time.Duration // the time between two looks at a task, and five times less often later; 0: 1 s
	KeepAlive   time.Duration // how often the server is called to keep the session open; 0: 5 minutes
	Retry       retry.Policy  // for calls that a lost connection has interrupted
	UserAgent   string        // such as "vddkcp/1.2.3"; "": "vddkcp"
	Log         *slog.Logger  // nil: nothing is logged

	// proxy returns the HTTP proxy for a request. If it is nil, the environment names the proxy,
	// as for other programs. Tests set it, because package net/http reads the environment once.
	proxy func(*http.Request) (*url.URL, error)
}

// These are the defaults of Options.
const (
	defaultTimeout     = 2 * time.Minute
	defaultTaskTimeout = 6 * time.Hour
	defaultPoll        = time.Second
	defaultKeepAlive   = 5 * time.Minute
)

// withDefaults returns o with its defaults, and with the value of the cookie alone in
// Options.Cookie. It returns a *usage.Error if the options cannot name a server and a login. The
// names of flags in its message are those of docs/cli.md.
func (o Options) withDefaults() (Options, error) {
	o.Port = cmp.Or(o.Port, certificate.DefaultPort)
	o.Timeout = cmp.Or(o.Timeout, defaultTimeout)
	o.TaskTimeout = cmp.Or(o.TaskTimeout, defaultTaskTimeout)
	o.Poll = cmp.Or(o.Poll, defaultPoll)
	o.KeepAlive = cmp.Or(o.KeepAlive, defaultKeepAlive)
	o.UserAgent = cmp.Or(o.UserAgent, "vddkcp")
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	if o.Retry.OnRetry == nil {
		o.Retry.OnRetry = retry.LogTo(o.Log, "vsphere: repeating a request to the server")
	}
	if o.proxy == nil {
		o.proxy = http.ProxyFromEnvironment
	}
	if o.Cookie.IsSet() {
		var err error
		if o.Cookie, err = parseCookie(o.Cookie); err != nil {
			return o, err
		}
	}
	return o, o.validate()
}

func (o *Options) validate() error {
	var missing []string
	if o.Server == "" {
		missing = append(missing, "--server")
	}
	if !o.Cookie.IsSet() {
		if o.User == "" {
			missing = append(missing, "--user")
		}
		if !o.Password.IsSet() {
			missing = append(missing, "--password or --cookie")
		}
	}
	if len(missing) > 0 {
		return usage.New("missing: "+strings.Join(missing, ", "),
			"for the login, the password can also be in the environment variable VDDKCP_PASSWORD, or the cookie of an open session in VDDKCP_COOKIE")
	}
	name, _, _ := strings.Cut(o.Server, "%") // the zone of an IPv6 address
	if strings.ContainsAny(o.Server, "/ \t\n\x00@[]") || strings.HasPrefix(o.Server, "-") || strings.Contains(name, ":") && net.ParseIP(name) == nil {
		return usage.New(fmt.Sprintf("--server: %q: expected only the name or the address of a host", o.Server),
			"if the server has another port than 443, pass the port with --port and not as a part of --server")
	}
	if o.Port > 65535 {
		return usage.Errorf("--port: %d is not a port: expected 1 to 65535", o.Port)
	}
	return nil
}

// address returns the address of the server as messages show it. It has the port only if that is
// not the usual one.
func (o *Options) address() string {
	if o.Port == certificate.DefaultPort {
		return o.Server
	}
	return o.hostPort()
}

func (o *Options) hostPort() string {
	return net.JoinHostPort(o.Server, strconv.FormatUint(uint64(o.Port), 10))
}
