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

// DefaultPort is the port of a server where none is given.
const DefaultPort = 443

// certificateTimeout bounds how long a server may take to show its certificate.
const certificateTimeout = 30 * time.Second

// Certificate is what a server shows on a TLS connection.
type Certificate struct {
	SHA1, SHA256 string // "AA:BB:.."
	Leaf         *x509.Certificate
	// Trust is nil where the system's authorities vouch for the certificate
	// and the server's name, else why not.
	Trust error
}

// FetchCertificate connects to the server, a name or an address, and returns the
// certificate whose key the server proves to have. It trusts nothing: that is
// the caller's to judge. It gives up after 30 s, or when ctx ends.
func FetchCertificate(ctx context.Context, server string, port uint32) (*Certificate, error) {
	if err := sha1.Allowed(); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, certificateTimeout)
	defer cancel()
	if port == 0 {
		port = DefaultPort
	}
	name, _, _ := strings.Cut(server, "%") // the zone of an address is nobody's name
	address := net.JoinHostPort(server, strconv.FormatUint(uint64(port), 10))
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, within(ctx, err)
	}
	defer conn.Close()
	// The certificate alone is wanted: an ESXi host of long ago may speak as it
	// does. Nothing is sent over the connection.
	t := tls.Client(conn, &tls.Config{
		ServerName: name, InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, CipherSuites: anyCipherSuite(),
	})
	if err := t.HandshakeContext(ctx); err != nil {
		var record tls.RecordHeaderError
		if errors.As(err, &record) {
			err = errors.New("what answers does not speak TLS")
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

func anyCipherSuite() (ids []uint16) {
	for _, s := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		ids = append(ids, s.ID)
	}
	return ids
}

// within makes the end of ctx the reason of an error that it brought about.
func within(ctx context.Context, err error) error {
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return err
	}
	return fmt.Errorf("no answer within %s: %w", certificateTimeout, err)
}

// colons writes hexadecimal digits as thumbprints are written: "AA:BB:..".
func colons(digits string) string {
	digits = strings.ToUpper(digits)
	var pairs []string
	for i := 0; i+1 < len(digits); i += 2 {
		pairs = append(pairs, digits[i:i+2])
	}
	return strings.Join(pairs, ":")
}

// ParseThumbprint returns the digits of a thumbprint in upper case with colons:
// 20 bytes are SHA-1, 32 are SHA-256.
func ParseThumbprint(s string) (string, error) {
	digits := s
	if strings.Contains(s, ":") {
		for _, pair := range strings.Split(s, ":") {
			if len(pair) != 2 {
				return "", fmt.Errorf("%q is no thumbprint: want a colon after each two digits, or none", s)
			}
		}
		digits = strings.ReplaceAll(s, ":", "")
	}
	b, err := hex.DecodeString(digits)
	if err != nil || len(b) != sha1.Size && len(b) != sha256.Size {
		return "", fmt.Errorf("%q is no thumbprint: want 40 hexadecimal digits (SHA-1) or 64 (SHA-256), and there are %d characters", s, len(digits))
	}
	return colons(digits), nil
}

func isSHA1(thumbprint string) bool { return len(thumbprint) == 3*sha1.Size-1 }

// CertificateError is a server's certificate that is not the one wanted, or,
// where none was named, that nobody vouches for. Trying again does not help.
type CertificateError struct {
	Server string      // with its port, where that is not DefaultPort
	Want   string      // "" where none was named
	Got    Certificate // that the server showed
}

func (e *CertificateError) Error() string {
	if e.Want == "" {
		return fmt.Sprintf("%s: the certificate does not verify: %v", e.Server, e.Got.Trust)
	}
	kind, got := "SHA-256", e.Got.SHA256
	if isSHA1(e.Want) {
		kind, got = "SHA-1", e.Got.SHA1
	}
	return fmt.Sprintf("%s: the certificate is another one: its %s thumbprint is %s, expected %s", e.Server, kind, got, e.Want)
}

// ExitStatus implements the interface of transfer/report.
func (*CertificateError) ExitStatus() int { return exit.Usage }

// Hint says what to do about it.
func (e *CertificateError) Hint() string {
	if e.Want == "" {
		return fmt.Sprintf("vddkcp thumbprint %s shows the thumbprint: compare it with what the host itself shows, then name it with --thumbprint", e.Server)
	}
	return "compare it with what the host itself shows: the certificate was renewed, or what answers is not the host"
}

// CheckThumbprint makes sure that the server shows the certificate that want
// names, the SHA-1 or SHA-256 thumbprint in any form of ParseThumbprint, or,
// where want is empty, one that the system's authorities vouch for. It returns
// the SHA-1 of that certificate as the library wants it, "AA:BB:..". Another
// certificate is a *CertificateError.
//
// Where the server can't be asked this way and want is a SHA-1, that is
// returned: the library checks it too.
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
		return "", fmt.Errorf("the certificate of %s: %w", server, err)
	case err != nil && isSHA1(want):
		return want, nil
	case err != nil:
		return "", fmt.Errorf("the certificate of %s: %w", server, err)
	case want == "" && got.Trust != nil,
		want != "" && want != got.SHA1 && want != got.SHA256:
		if port != 0 && port != DefaultPort {
			server = net.JoinHostPort(server, strconv.FormatUint(uint64(port), 10))
		}
		return "", &CertificateError{Server: server, Want: want, Got: *got}
	}
	return got.SHA1, nil
}

// libraryThumbprint returns the SHA-1 thumbprint that the library is to find, of
// the certificate that the user's parameters ask for.
func libraryThumbprint(ctx context.Context, p *Params) (string, error) {
	if !p.Remote() {
		return "", nil
	}
	return CheckThumbprint(ctx, p.Server, p.Port, p.Thumbprint)
}
