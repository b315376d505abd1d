package nbd

import (
	"fmt"
	"net"
	"net/url"
	"strings"
	"unicode/utf8"
)

// URI names an export of a server, by doc/uri.md.
type URI struct {
	TLS        bool   // nbds: no connection without it
	Socket     string // path of a Unix domain socket, abstract when it begins with NUL; "": TCP
	Host, Port string // of TCP
	Export     string // at most MaxString bytes, without NUL; "" is the server's default

	Certificates string // folder with ca-cert.pem, client-cert.pem and client-key.pem; "": the system's authorities
	Hostname     string // that the server's certificate must be for; "": Host, or localhost over a Unix domain socket
	NoVerify     bool   // the server's certificate is not looked at

	text string
}

// String is the URI as it was parsed.
func (u *URI) String() string { return u.text }

// schemes are those of doc/uri.md and those of libnbd.
var schemes = map[string]struct{ tls, unix, vsock bool }{
	"nbd": {}, "nbds": {tls: true},
	"nbd+unix": {unix: true}, "nbds+unix": {tls: true, unix: true},
	"nbd+vsock": {vsock: true}, "nbds+vsock": {tls: true, vsock: true},
}

// IsURI reports whether s means an NBD URI, good or bad: it begins with one of
// the schemes and "://".
func IsURI(s string) bool {
	scheme, _, ok := strings.Cut(s, "://")
	_, known := schemes[strings.ToLower(scheme)]
	return ok && known
}

// ParseURI parses nbd://HOST[:PORT][/EXPORT], nbds://, and
// nbd+unix:///[EXPORT]?socket=PATH, nbds+unix://. The query may have
// tls-certificates, tls-hostname and tls-verify-peer beside, with TLS only. What
// is not understood is an error, never ignored.
func ParseURI(s string) (*URI, error) {
	u, err := parse(s)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", Text([]byte(s)), err)
	}
	u.text = s
	return u, nil
}

func parse(s string) (*URI, error) {
	if !IsURI(s) {
		return nil, fmt.Errorf("not an NBD URI: want nbd://, nbds://, nbd+unix:// or nbds+unix://")
	}
	p, err := url.Parse(s)
	if err != nil {
		// Its text repeats the URI.
		if e, ok := err.(*url.Error); ok {
			err = e.Err
		}
		return nil, err
	}
	scheme := schemes[strings.ToLower(p.Scheme)]
	if scheme.vsock {
		return nil, fmt.Errorf("%s: vsock is not supported: want nbd://, nbds://, nbd+unix:// or nbds+unix://", p.Scheme)
	}
	if p.Fragment != "" || strings.Contains(s, "#") {
		return nil, fmt.Errorf("fragment %q: a URI of NBD has none (in a name # is written %%23)", p.Fragment)
	}
	u := &URI{TLS: scheme.tls, Export: strings.TrimPrefix(p.Path, "/")}
	if len(u.Export) > MaxString || strings.ContainsRune(u.Export, 0) || !utf8.ValidString(u.Export) {
		return nil, fmt.Errorf("export name of %d bytes: want UTF-8 of at most %d bytes without NUL", len(u.Export), MaxString)
	}
	if err := u.query(p.RawQuery, scheme.unix); err != nil {
		return nil, err
	}
	if p.User != nil {
		return nil, fmt.Errorf("user %q: only TLS with pre-shared keys has users, and it is not supported: use certificates", p.User.Username())
	}
	if scheme.unix {
		if u.Socket == "" {
			return nil, fmt.Errorf("%s without a socket: want ?socket=PATH", p.Scheme)
		}
		if p.Host != "" {
			return nil, fmt.Errorf("host %q with a Unix domain socket: want %s:///EXPORT?socket=PATH", p.Host, p.Scheme)
		}
		return u, nil
	}
	u.Host, u.Port = p.Hostname(), p.Port()
	if u.Host == "" {
		return nil, fmt.Errorf("no host: want %s://HOST[:PORT][/EXPORT]", p.Scheme)
	}
	if u.Port == "" {
		u.Port = DefaultPort
	}
	if n, err := net.LookupPort("tcp", u.Port); err != nil || n == 0 {
		return nil, fmt.Errorf("port %q: want 1 to 65535", u.Port)
	}
	return u, nil
}

func (u *URI) query(raw string, unix bool) error {
	values, err := url.ParseQuery(raw)
	if err != nil {
		return err
	}
	for key, all := range values {
		if len(all) > 1 {
			return fmt.Errorf("%s is given %d times", key, len(all))
		}
		value := all[0]
		if strings.HasPrefix(key, "tls-") && !u.TLS {
			return fmt.Errorf("%s without TLS: want nbds:// or nbds+unix://", key)
		}
		switch key {
		case "socket":
			if !unix {
				return fmt.Errorf("socket with TCP: want nbd+unix:// or nbds+unix://")
			}
			if strings.ContainsRune(value[min(1, len(value)):], 0) {
				return fmt.Errorf("socket %q: a path has no NUL", value)
			}
			u.Socket = value
		case "tls-certificates":
			if value == "" {
				return fmt.Errorf("tls-certificates is empty: want a folder")
			}
			u.Certificates = value
		case "tls-hostname":
			u.Hostname = value
		case "tls-verify-peer":
			switch value {
			case "0", "false":
				u.NoVerify = true
			case "1", "true":
			default:
				return fmt.Errorf("tls-verify-peer=%s: want 0 or 1", Text([]byte(value)))
			}
		case "tls-type":
			if value != "x509" {
				return fmt.Errorf("tls-type=%s is not supported: want x509, certificates", Text([]byte(value)))
			}
		case "tls-psk-file":
			return fmt.Errorf("%s: TLS with pre-shared keys is not supported: use certificates", key)
		default:
			return fmt.Errorf("unknown parameter %q: want socket, tls-certificates, tls-hostname or tls-verify-peer", key)
		}
	}
	return nil
}
