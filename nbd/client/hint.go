package client

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"syscall"

	"vddkcp/nbd"
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
func unreachable(uri *nbd.URI, err error) error {
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

// untrusted adds to an error of TLS's handshake what may help.
func untrusted(err error) error {
	var alert tls.AlertError
	var name x509.HostnameError
	switch {
	case errors.As(err, new(x509.UnknownAuthorityError)):
		return &hinted{err, "tls-certificates=DIR names a folder whose ca-cert.pem signed the server's certificate"}
	case errors.As(err, &name):
		return &hinted{err, "tls-hostname=NAME says what name the server's certificate is for"}
	case errors.As(err, &alert):
		return &hinted{err, "a server that demands a certificate finds it as client-cert.pem and client-key.pem in the folder of tls-certificates=DIR"}
	}
	return err
}

// secured is the URI with TLS.
func secured(uri *nbd.URI) string {
	scheme, rest, _ := strings.Cut(uri.String(), ":")
	return nbd.Text([]byte("nbds" + scheme[len("nbd"):] + ":" + rest))
}

// shownExports bounds how many exports a hint names.
const shownExports = 8

// listed tells of the exports that a server has.
func listed(names []string, more int) string {
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
