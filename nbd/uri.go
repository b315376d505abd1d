package nbd

import (
	"fmt"
	"net"
	"net/url"
	"strings"
	"unicode/utf8"
)

// URI is a parsed NBD URI, which names an export of a server: see doc/uri.md of the
// protocol.
type URI struct {
	TLS        bool   // the scheme is nbds or nbds+unix: connect with TLS only
	Socket     string // path of a Unix domain socket, abstract if it begins with NUL; "": connect by TCP
	Host, Port string // for TCP
	Export     string // UTF-8, at most MaxString bytes, without NUL; "": the server's default export

	Certificates string // directory with ca-cert.pem, client-cert.pem and client-key.pem; "": trust the authorities of the system
	Hostname     string // name in the server's certificate; "": Host, or "localhost" for a Unix domain socket
	NoVerify     bool   // do not verify the server's certificate

	text string // the URI before parsing
}

// String returns the text that ParseURI parsed.
func (u *URI) String() string { return u.text }

// schemes are the schemes of doc/uri.md and of libnbd. The schemes with vsock are listed
// although they are not supported, so that the error for such a URI can say that.
var schemes = map[string]struct{ tls, unix, vsock bool }{
	"nbd": {}, "nbds": {tls: true},
	"nbd+unix": {unix: true}, "nbds+unix": {tls: true, unix: true},
	"nbd+vsock": {vsock: true}, "nbds+vsock": {tls: true, vsock: true},
}

// IsURI reports whether s begins with the scheme of an NBD URI and "://". ParseURI may
// refuse such a text nevertheless, because it checks the rest as well.
func IsURI(s string) bool {
	scheme, _, ok := strings.Cut(s, "://")
	_, known := schemes[strings.ToLower(scheme)]
	return ok && known
}

// ParseURI parses nbd://HOST[:PORT][/EXPORT] and nbd+unix:///[EXPORT]?socket=PATH, and
// the same with nbds instead of nbd. With nbds, the query may also have the parameters
// tls-certificates, tls-hostname and tls-verify-peer. Unknown parameters are an error.
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
		// The text of a *url.Error contains the URI. The caller adds the URI to
		// the error as well, so only the inner error is returned.
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
		return nil, fmt.Errorf("fragment %q: an NBD URI has no fragment (write # in a name as %%23)", p.Fragment)
	}
	u := &URI{TLS: scheme.tls, Export: strings.TrimPrefix(p.Path, "/")}
	if len(u.Export) > MaxString || strings.ContainsRune(u.Export, 0) || !utf8.ValidString(u.Export) {
		return nil, fmt.Errorf("export name of %d bytes: want UTF-8 of at most %d bytes without NUL", len(u.Export), MaxString)
	}
	if err := u.query(p.RawQuery, scheme.unix); err != nil {
		return nil, err
	}
	if p.User != nil {
		return nil, fmt.Errorf("user %q: users exist only with TLS pre-shared keys, which are not supported: use certificates", p.User.Username())
	}
	if scheme.unix {
		if u.Socket == "" {
			return nil, fmt.Errorf("the scheme %s without a socket: want ?socket=PATH", p.Scheme)
		}
		if p.Host != "" {
			return nil, fmt.Errorf("host %q cannot be combined with a Unix domain socket: want %s:///EXPORT?socket=PATH", p.Host, p.Scheme)
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
		return nil, fmt.Errorf("invalid port %q: want 1 to 65535", u.Port)
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
			return fmt.Errorf("parameter %s is given %d times, want once", key, len(all))
		}
		value := all[0]
		if strings.HasPrefix(key, "tls-") && !u.TLS {
			return fmt.Errorf("parameter %s needs TLS: want nbds:// or nbds+unix://", key)
		}
		switch key {
		case "socket":
			if !unix {
				return fmt.Errorf("parameter socket needs a Unix domain socket: want nbd+unix:// or nbds+unix://")
			}
			if strings.ContainsRune(value[min(1, len(value)):], 0) {
				return fmt.Errorf("socket %q: the path contains a NUL byte", value)
			}
			u.Socket = value
		case "tls-certificates":
			if value == "" {
				return fmt.Errorf("parameter tls-certificates is empty: want the path of a directory")
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
				return fmt.Errorf("tls-type=%s is not supported: want x509 (certificates)", Text([]byte(value)))
			}
		case "tls-psk-file":
			return fmt.Errorf("parameter %s: TLS with pre-shared keys is not supported: use certificates", key)
		default:
			return fmt.Errorf("unknown parameter %q: want socket, tls-certificates, tls-hostname or tls-verify-peer", key)
		}
	}
	return nil
}
