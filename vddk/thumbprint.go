package vddk

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
)

// DefaultPort is the port of a server if none is given.
const DefaultPort = 443

// certificateTimeout limits the time that FetchCertificate takes.
const certificateTimeout = 30 * time.Second

// Certificate is the certificate that a server presents on a TLS connection.
type Certificate struct {
	SHA1, SHA256 string // thumbprints, in the form "AA:BB:..."
	Leaf         *x509.Certificate
	// Trust is nil if the certificate is valid for the server's name according to the root
	// certificates of the system. Otherwise it is the reason why the certificate is not valid.
	Trust error
}

// FetchCertificate connects to server, a name or an address, and returns its certificate,
// whose key the server has proved to have. port 0 means DefaultPort. Whether the certificate
// is trustworthy is left to the caller. FetchCertificate fails after 30 s, or when ctx ends.
func FetchCertificate(ctx context.Context, server string, port uint32) (*Certificate, error) {
	if err := sha1.Allowed(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, certificateTimeout)
	defer cancel()
	if port == 0 {
		port = DefaultPort
	}
	name, _, _ := strings.Cut(server, "%") // the zone of an IPv6 address is not part of the name
	address := net.JoinHostPort(server, strconv.FormatUint(uint64(port), 10))
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, within(ctx, err)
	}
	defer conn.Close()
	// Old versions of TLS are accepted for old ESXi hosts, because only the certificate is
	// needed and no data is sent.
	t := tls.Client(conn, &tls.Config{
		ServerName: name, InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, CipherSuites: anyCipherSuite(),
	})
	if err := t.HandshakeContext(ctx); err != nil {
		var record tls.RecordHeaderError
		if errors.As(err, &record) {
			err = errors.New("the server does not speak TLS")
		}
		return nil, fmt.Errorf("TLS: %w", within(ctx, err))
	}
	chain := t.ConnectionState().PeerCertificates
	c := &Certificate{Leaf: chain[0]}
	sum1, err := sha1.Sum(chain[0].Raw)
	if err != nil {
		return nil, err
	}
	sum256 := sha256.Sum256(chain[0].Raw)
	c.SHA1, c.SHA256 = colons(hex.EncodeToString(sum1[:])), colons(hex.EncodeToString(sum256[:]))
	intermediates := x509.NewCertPool()
	for _, i := range chain[1:] {
		intermediates.AddCert(i)
	}
	_, c.Trust = chain[0].Verify(x509.VerifyOptions{DNSName: name, Intermediates: intermediates})
	return c, nil
}

// anyCipherSuite returns all cipher suites, also those that are not safe.
func anyCipherSuite() (ids []uint16) {
	for _, s := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		ids = append(ids, s.ID)
	}
	return ids
}

// within returns err, and adds that there was no answer in time if ctx has timed out.
func within(ctx context.Context, err error) error {
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("no answer from the server within %s: %w", certificateTimeout, err)
}

// colons returns hexadecimal digits in the form of thumbprints: "AA:BB:...".
func colons(digits string) string {
	digits = strings.ToUpper(digits)
	var pairs []string
	for i := 0; i+1 < len(digits); i += 2 {
		pairs = append(pairs, digits[i:i+2])
	}
	return strings.Join(pairs, ":")
}

// ParseThumbprint parses a thumbprint with or without colons, 20 bytes for SHA-1 or 32 bytes
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

// isSHA1 reports whether a thumbprint that ParseThumbprint returned is a SHA-1.
func isSHA1(thumbprint string) bool { return len(thumbprint) == 3*sha1.Size-1 }

// CertificateError says that a server has another certificate than expected or, if no
// thumbprint was given, one that does not verify. A retry does not help.
type CertificateError struct {
	Server string      // with its port if that is not DefaultPort
	Want   string      // expected thumbprint; "" if none was given
	Got    Certificate // certificate of the server
}

func (e *CertificateError) Error() string {
	if e.Want == "" {
		return fmt.Sprintf("%s: the certificate does not verify: %v", e.Server, e.Got.Trust)
	}
	kind, got := "SHA-256", e.Got.SHA256
	if isSHA1(e.Want) {
		kind, got = "SHA-1", e.Got.SHA1
	}
	return fmt.Sprintf("%s: the certificate has the %s thumbprint %s, expected %s", e.Server, kind, got, e.Want)
}

// ExitStatus returns the exit status of the command, for transfer/report.
func (*CertificateError) ExitStatus() int { return exit.Usage }

// Hint returns what the user can do about the error.
func (e *CertificateError) Hint() string {
	if e.Want == "" {
		return fmt.Sprintf("vddkcp thumbprint %s shows the thumbprint: compare it with the one that the host itself shows, then pass it with --thumbprint", e.Server)
	}
	return "compare the thumbprint with the one that the host itself shows: the certificate was renewed, or another machine answers in place of the host"
}

// CheckThumbprint checks that the certificate of a server has the thumbprint want, in any form
// that ParseThumbprint accepts or, if want is "", that the certificate is valid by the system's
// root certificates. It returns the SHA-1 thumbprint of the certificate in the form that the
// library needs. The error is a *CertificateError if the server has another certificate.
//
// If the certificate cannot be fetched and want is a SHA-1 thumbprint, CheckThumbprint returns
// want, because the library checks it, too.
func CheckThumbprint(ctx context.Context, server string, port uint32, want string) (string, error) {
	if want != "" {
		var err error
		if want, err = ParseThumbprint(want); err != nil {
			return "", &ParamsError{err: err}
		}
	}
	got, err := FetchCertificate(ctx, server, port)
	switch {
	case ctx.Err() != nil:
		return "", context.Cause(ctx)
	case errors.As(err, new(*sha1.NotAllowedError)):
		return "", fmt.Errorf("cannot fetch the certificate of %s: %w", server, err)
	case err != nil && isSHA1(want):
		return want, nil
	case err != nil:
		return "", fmt.Errorf("cannot fetch the certificate of %s: %w", server, err)
	case want == "" && got.Trust != nil,
		want != "" && want != got.SHA1 && want != got.SHA256:
		if port != 0 && port != DefaultPort {
			server = net.JoinHostPort(server, strconv.FormatUint(uint64(port), 10))
		}
		return "", &CertificateError{Server: server, Want: want, Got: *got}
	}
	return got.SHA1, nil
}

// libraryThumbprint returns the SHA-1 thumbprint that the library is to expect, after it has
// checked the certificate of the server.
func libraryThumbprint(ctx context.Context, p *Params) (string, error) {
	if !p.Remote() {
		return "", nil
	}
	return CheckThumbprint(ctx, p.Server, p.Port, p.Thumbprint)
}
