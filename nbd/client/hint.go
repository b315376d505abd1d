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

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/nbd"
)

// noSocket is an error which says that the socket of a server does not exist. This
// error may be temporary, because a server that restarts creates its socket again.
// Therefore it does not wrap fs.ErrNotExist, which is treated as permanent.
type noSocket struct{ path string }

func (e *noSocket) Error() string { return fmt.Sprintf("there is no socket %q", e.path) }

// explainDial adds a hint to an error of connecting to the server.
func explainDial(uri *nbd.URI, err error) error {
	switch unix := uri.Socket != ""; {
	case unix && errors.Is(err, syscall.ENOENT):
		return hinted.Error(&noSocket{uri.Socket}, "start the server, which creates the socket; a path that does not begin with / is relative to the current directory")
	case unix && errors.Is(err, syscall.EACCES):
		return hinted.Error(err, "run vddkcp as the user who started the server, or change the permissions of the socket")
	case unix && errors.Is(err, syscall.ECONNREFUSED):
		return hinted.Error(err, "start the server again: the socket exists, but no server listens on it")
	case errors.Is(err, syscall.ECONNREFUSED):
		return hinted.Error(err, fmt.Sprintf("check that the server runs on host %s and listens on port %s (the default port of NBD is %s)", uri.Host, uri.Port, nbd.DefaultPort))
	}
	return err
}

// explainTLS adds a hint to an error of the TLS handshake or of the messages after it. With
// TLS 1.3, a server refuses the certificate of a client only after the handshake.
func explainTLS(uri *nbd.URI, config *tls.Config, err error) error {
	var name x509.HostnameError
	var invalid x509.CertificateInvalidError
	var op *net.OpError
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)) && uri.Certificates == "":
		return hinted.Error(err, "add tls-certificates=DIR to the URI: DIR is a directory whose ca-cert.pem signed the server's certificate")
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return hinted.Error(err, fmt.Sprintf("put the certificate of the authority that signed the server's certificate in %s", filepath.Join(nbd.Text([]byte(uri.Certificates)), "ca-cert.pem")))
	case errors.As(err, &name) && nbd.NamesNoHost(name.Certificate):
		return hinted.Error(
			fmt.Errorf("the server's certificate names no host: it has the common name %q and no subjectAltName, want a subjectAltName for %q", name.Certificate.Subject.CommonName, name.Host),
			"issue the server's certificate with subjectAltName=DNS:NAME or IP:ADDRESS; tls-verify-peer=0 connects without verifying the certificate",
		)
	case errors.As(err, &name):
		return hinted.Error(err, "if the server's certificate was issued for another name, add tls-hostname=NAME with this name to the URI")
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return hinted.Error(fmt.Errorf("cannot verify the server's certificate: %w", err), "renew the server's certificate, or set the clock of this machine if it is wrong")
	case errors.As(err, &op) && op.Op == "remote error": // the server sent a TLS alert
		return hinted.Error(err, clientCertificateHint(uri, config))
	case len(config.Certificates) == 0 && isClosed(err):
		return hinted.Error(err, "perhaps "+clientCertificateHint(uri, config))
	}
	return err
}

// isClosed reports whether err says that the server closed the connection.
func isClosed(err error) bool {
	return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, syscall.EPIPE) || errors.Is(err, syscall.ECONNRESET)
}

// clientCertificateHint returns a hint for a server that refuses the certificate of the
// client, or requires one.
func clientCertificateHint(uri *nbd.URI, config *tls.Config) string {
	dir := nbd.Text([]byte(uri.Certificates))
	switch {
	case len(config.Certificates) > 0:
		return fmt.Sprintf("the server refuses the certificate in %s: use a certificate of an authority that the server trusts", filepath.Join(dir, "client-cert.pem"))
	case dir == "":
		return "the server demands a certificate of its clients: add tls-certificates=DIR to the URI, where DIR is a directory with client-cert.pem and client-key.pem"
	}
	return fmt.Sprintf("the server demands a certificate of its clients: put client-cert.pem and client-key.pem in %s", dir)
}

// withTLS returns the text of the URI with a scheme for TLS.
func withTLS(uri *nbd.URI) string {
	scheme, rest, _ := strings.Cut(uri.String(), ":")
	return nbd.Text([]byte("nbds" + scheme[len("nbd"):] + ":" + rest))
}

// maxHintExports is how many exports a hint names.
const maxHintExports = 8

// exportsHint returns a hint that names exports of the server, and says how many more there
// are. The hint is empty if the server has not listed any exports.
func exportsHint(names []string, more int) string {
	if len(names) == 0 {
		return ""
	}
	if len(names) == 1 && names[0] == "" {
		return "leave the name out: the only export of the server has no name"
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
