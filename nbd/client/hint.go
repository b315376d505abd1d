package client

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/vddkcp/vddkcp/nbd"
)

// hinted is an error that the user can do something about.
type hinted struct {
	error
	hint string
}

func (e *hinted) Unwrap() error { return e.error }

// Hint says what to do.
func (e *hinted) Hint() string { return e.hint }

// noSocket says that there is no socket of that name. It is no fs.ErrNotExist,
// which never goes away: a server that is restarted makes its socket again.
type noSocket struct{ path string }

func (e *noSocket) Error() string { return fmt.Sprintf("there is no socket %q", e.path) }

// unreachable adds to an error of dialling what may help.
func explainDial(uri *nbd.URI, err error) error {
	switch unix := uri.Socket != ""; {
	case unix && errors.Is(err, syscall.ENOENT):
		return &hinted{&noSocket{uri.Socket}, "the server makes its socket when it starts; a path that does not begin with / starts from this folder"}
	case unix && errors.Is(err, syscall.EACCES):
		return &hinted{err, "a socket is for the user who started the server: run as that one"}
	case unix && errors.Is(err, syscall.ECONNREFUSED):
		return &hinted{err, "the socket is there and nobody listens on it: start the server again"}
	case errors.Is(err, syscall.ECONNREFUSED):
		return &hinted{err, fmt.Sprintf("is the server running on %s, and on port %s? NBD's own port is %s", uri.Host, uri.Port, nbd.DefaultPort)}
	}
	return err
}

// untrusted adds to an error of TLS, during its handshake or after it, what may
// help. A server of TLS 1.3 refuses a client's certificate, or misses one, after
// the handshake.
func explainTLS(uri *nbd.URI, config *tls.Config, err error) error {
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	var op *net.OpError
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)) && uri.Certificates == "":
		return &hinted{err, "tls-certificates=DIR names a folder whose ca-cert.pem signed the server's certificate"}
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return &hinted{err, fmt.Sprintf("put the certificate of the authority that signed the server's in %s", filepath.Join(nbd.Text([]byte(uri.Certificates)), "ca-cert.pem"))}
	case errors.As(err, &name) && nbd.NamesNoHost(name.Certificate):
		return &hinted{
			fmt.Errorf("the server's certificate names no host: it has the common name %q and no subjectAltName, want one of %q", name.Certificate.Subject.CommonName, name.Host),
			"issue the server's certificate with subjectAltName=DNS:NAME or IP:ADDRESS; tls-verify-peer=0 goes on without knowing who the server is",
		}
	case errors.As(err, &name):
		return &hinted{err, "tls-hostname=NAME says what name the server's certificate is for"}
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return &hinted{fmt.Errorf("the server's certificate: %w", err), "renew the server's certificate; if it is valid, set the clock of this machine"}
	case errors.As(err, &op) && op.Op == "remote error": // an alert of the server
		return &hinted{err, clientCertificateHint(uri, config)}
	case len(config.Certificates) == 0 && isClosed(err):
		return &hinted{err, "perhaps " + clientCertificateHint(uri, config)}
	}
	return err
}

// isClosed reports whether the other side closed the connection.
func isClosed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

func clientCertificateHint(uri *nbd.URI, config *tls.Config) string {
	dir := nbd.Text([]byte(uri.Certificates))
	switch {
	case len(config.Certificates) > 0:
		return fmt.Sprintf("the server refuses the certificate in %s: let an authority sign it that the server knows", filepath.Join(dir, "client-cert.pem"))
	case dir == "":
		return "the server demands a certificate of its clients: tls-certificates=DIR names a folder with client-cert.pem and client-key.pem"
	}
	return fmt.Sprintf("the server demands a certificate of its clients: put client-cert.pem and client-key.pem in %s", dir)
}

// secured is the URI with TLS.
func withTLS(uri *nbd.URI) string {
	scheme, rest, _ := strings.Cut(uri.String(), ":")
	return nbd.Text([]byte("nbds" + scheme[len("nbd"):] + ":" + rest))
}

// shownExports bounds how many exports a hint names.
const maxHintExports = 8

// listed tells of the exports that a server has.
func exportsHint(names []string, more int) string {
	if len(names) == 0 {
		return ""
	}
	if len(names) == 1 && names[0] == "" {
		return "the server has one export, without a name: leave the name out"
	}
	quoted := make([]string, len(names))
	for i, n := range names {
		quoted[i] = strconv.Quote(nbd.Text([]byte(n)))
	}
	text := "the server has " + strings.Join(quoted, ", ")
	if more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}
