// Package certificate checks the certificates of vCenter servers and ESXi hosts, as docs/cli.md
// describes for --thumbprint. [CheckThumbprint] fetches the certificate of a server and compares it
// with a thumbprint.
package certificate

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/sha1"
	"github.com/vddkcp/vddkcp/internal/usage"
)

// DefaultPort is the port of a server if no port is given.
const DefaultPort = 443

// certificateTimeout is the time limit of Fetch.
const certificateTimeout = 30 * time.Second

// Certificate is the certificate that a server presents on a TLS connection.
type Certificate struct {
	SHA1, SHA256 string // thumbprints, in the form "AA:BB:..."
	Leaf         *x509.Certificate
	// Trust is nil if the root certificates of the system confirm that the certificate is valid
	// for the server's name. Otherwise it says why it is not valid.
	Trust error
}

// Thumbprint returns the thumbprint of the certificate that can be compared with the thumbprint
// like, and the name of its hash: the SHA-1 if like is a SHA-1, and the SHA-256 otherwise.
func (c *Certificate) Thumbprint(like string) (hash, thumbprint string) {
	if isSHA1(like) {
		return "SHA-1", c.SHA1
	}
	return "SHA-256", c.SHA256
}

// Fetch connects to server, a host name or an address, and returns its certificate. A
// port of 0 means DefaultPort. It accepts any certificate: the TLS handshake only proves that
// the server has the private key of the certificate, and the caller decides whether to trust it.
// Fetch fails after 30 s, or when ctx ends.
func Fetch(ctx context.Context, server string, port uint32) (*Certificate, error) {
	if err := sha1.Allowed(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, certificateTimeout)
	defer cancel()
	if port == 0 {
		port = DefaultPort
	}
	address := net.JoinHostPort(server, strconv.FormatUint(uint64(port), 10))
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, addTimeout(ctx, err)
	}
	defer conn.Close()
	config := baseConfig(server)
	t := tls.Client(conn, config)
	if err := t.HandshakeContext(ctx); err != nil {
		var record tls.RecordHeaderError
		if errors.As(err, &record) {
			err = errors.New("the server does not speak TLS")
		}
		return nil, fmt.Errorf("TLS: %w", addTimeout(ctx, err))
	}
	return read(t.ConnectionState().PeerCertificates, config.ServerName)
}

// read returns the certificate of the server with the given name. The parameter chain is what the
// server has sent in the TLS handshake. If SHA-1 is not allowed, the field SHA1 is "".
func read(chain []*x509.Certificate, name string) (*Certificate, error) {
	if len(chain) == 0 {
		return nil, errors.New("TLS: the server has sent no certificate")
	}
	c := &Certificate{Leaf: chain[0]}
	if sum, err := sha1.Sum(chain[0].Raw); err == nil {
		c.SHA1 = colons(hex.EncodeToString(sum[:]))
	}
	sum := sha256.Sum256(chain[0].Raw)
	c.SHA256 = colons(hex.EncodeToString(sum[:]))
	intermediates := x509.NewCertPool()
	for _, i := range chain[1:] {
		intermediates.AddCert(i)
	}
	_, c.Trust = chain[0].Verify(x509.VerifyOptions{DNSName: name, Intermediates: intermediates})
	return c, nil
}

// Config returns the configuration for TLS connections to a server. On every connection, it checks
// that the certificate has the expected thumbprint, or that the system's root certificates confirm
// the certificate if the thumbprint is "". The handshake fails with an *Error if the check fails.
// A thumbprint that ParseThumbprint does not accept is a *usage.Error.
//
// The function accepted, which may be nil, is called for every certificate that passed the check.
func Config(server string, port uint32, want string, accepted func(*Certificate)) (*tls.Config, error) {
	if want != "" {
		var err error
		if want, err = ParseThumbprint(want); err != nil {
			return nil, usage.Wrap(err)
		}
		if isSHA1(want) {
			if err := sha1.Allowed(); err != nil {
				return nil, err
			}
		}
	}
	c := baseConfig(server)
	name := c.ServerName
	c.VerifyConnection = func(state tls.ConnectionState) error {
		got, err := read(state.PeerCertificates, name)
		if err != nil {
			return err
		}
		if err := got.check(server, port, want); err != nil {
			return err
		}
		if accepted != nil {
			accepted(got)
		}
		return nil
	}
	return c, nil
}

// baseConfig returns a configuration that accepts every certificate. Old ESXi hosts need old
// versions of TLS and old cipher suites.
func baseConfig(server string) *tls.Config {
	name, _, _ := strings.Cut(server, "%") // the zone of an IPv6 address is not part of the name
	return &tls.Config{
		ServerName: name, InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, CipherSuites: anyCipherSuite(),
	}
}

// The method check returns an *Error if the certificate does not have the thumbprint want, which is
// in the form that ParseThumbprint returns. If want is "", it returns an *Error if the certificate
// does not verify.
func (c *Certificate) check(server string, port uint32, want string) error {
	if want == "" && c.Trust == nil || want != "" && (want == c.SHA1 || want == c.SHA256) {
		return nil
	}
	if port != 0 && port != DefaultPort {
		server = net.JoinHostPort(server, strconv.FormatUint(uint64(port), 10))
	}
	return &Error{Server: server, Want: want, Got: *c}
}

// anyCipherSuite returns the IDs of all cipher suites, including the insecure ones.
func anyCipherSuite() (ids []uint16) {
	for _, s := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		ids = append(ids, s.ID)
	}
	return ids
}

// addTimeout adds to err that the server did not answer in time, if the deadline of ctx has passed.
// Otherwise it returns err as it is.
func addTimeout(ctx context.Context, err error) error {
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("no answer from the server within %s: %w", certificateTimeout, err)
}

// The function colons writes hexadecimal digits as a thumbprint: in upper case, with a colon after
// every second digit except the last one ("AA:BB:CC").
func colons(digits string) string {
	digits = strings.ToUpper(digits)
	var pairs []string
	for i := 0; i+1 < len(digits); i += 2 {
		pairs = append(pairs, digits[i:i+2])
	}
	return strings.Join(pairs, ":")
}

// ParseThumbprint parses a thumbprint, with or without colons: 20 bytes for SHA-1 or 32 bytes
// for SHA-256. It returns the digits in upper case with colons.
func ParseThumbprint(s string) (string, error) {
	digits := s
	if strings.Contains(s, ":") {
		for _, pair := range strings.Split(s, ":") {
			if len(pair) != 2 {
				return "", fmt.Errorf("%q is not a thumbprint: expected a colon after each two digits, or no colons", s)
			}
		}
		digits = strings.ReplaceAll(s, ":", "")
	}
	b, err := hex.DecodeString(digits)
	if err != nil || len(b) != sha1.Size && len(b) != sha256.Size {
		return "", fmt.Errorf("%q is not a thumbprint: expected 40 hexadecimal digits (SHA-1) or 64 (SHA-256), found %d characters", s, len(digits))
	}
	return colons(digits), nil
}

// isSHA1 reports whether a thumbprint in the form that ParseThumbprint returns is a SHA-1
// thumbprint.
func isSHA1(thumbprint string) bool { return len(thumbprint) == 3*sha1.Size-1 }

// Error says that a server does not have the expected certificate. If no thumbprint
// was given, it says that the system does not trust the certificate. A retry does not help.
type Error struct {
	Server string      // with its port if that is not DefaultPort
	Want   string      // expected thumbprint; "" if none was given
	Got    Certificate // certificate of the server
}

func (e *Error) Error() string {
	if e.Want == "" {
		return fmt.Sprintf("%s: the certificate does not verify: %v", e.Server, e.Got.Trust)
	}
	kind, got := e.Got.Thumbprint(e.Want)
	return fmt.Sprintf("%s: the certificate has the %s thumbprint %s, expected %s", e.Server, kind, got, e.Want)
}

// ExitStatus is the exit status of the command; package transfer/report uses it.
func (*Error) ExitStatus() int { return exit.Usage }

// Hint tells the user what to do about the error.
func (e *Error) Hint() string {
	if e.Want == "" {
		return fmt.Sprintf("run vddkcp thumbprint %s, and compare the thumbprint that it prints with the thumbprint that the host itself shows; if the two are equal, pass this thumbprint with --thumbprint", e.Server)
	}
	return "compare the thumbprint of the certificate with the thumbprint that the host itself shows: either the certificate was renewed, or another machine answers in place of the host"
}

// CheckThumbprint fetches the certificate of a server and checks that it has the expected
// thumbprint. This thumbprint, the parameter want, may have any form that ParseThumbprint accepts.
// If it is "", CheckThumbprint checks whether the system's root certificates confirm the
// certificate. If the check fails, the error is a *Error. If the check succeeds, the
// result is the SHA-1 thumbprint of the certificate in the form that the library needs.
//
// If the certificate cannot be fetched and the expected thumbprint is a SHA-1 thumbprint,
// CheckThumbprint returns the expected one, because the library checks it, too.
func CheckThumbprint(ctx context.Context, server string, port uint32, want string) (string, error) {
	if want != "" {
		var err error
		if want, err = ParseThumbprint(want); err != nil {
			return "", usage.Wrap(err)
		}
	}
	got, err := Fetch(ctx, server, port)
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case errors.As(err, new(*sha1.NotAllowedError)):
		return "", fmt.Errorf("cannot fetch the certificate of %s: %w", server, err)
	case err != nil && isSHA1(want):
		return want, nil
	case err != nil:
		return "", fmt.Errorf("cannot fetch the certificate of %s: %w", server, err)
	}
	if err := got.check(server, port, want); err != nil {
		return "", err
	}
	return got.SHA1, nil
}
