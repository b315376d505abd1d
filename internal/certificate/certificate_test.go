package certificate_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/certificate"
)

// authority signs certificates. A nil authority makes certificates that sign themselves.
type authority struct {
	certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

func newAuthority(t *testing.T) *authority {
	t.Helper()
	c, key := issue(t, nil, &x509.Certificate{
		Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	})
	return &authority{c, key}
}

// issue returns a certificate. It is valid now unless the template has other times.
func issue(t *testing.T, by *authority, c *x509.Certificate) (*x509.Certificate, *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	c.SerialNumber = big.NewInt(1)
	if c.NotAfter.IsZero() {
		c.NotBefore, c.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	}
	parent, signer := c, key
	if by != nil {
		parent, signer = by.certificate, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	made, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return made, key
}

// serve starts a TLS server with the certificate on 127.0.0.1. It returns the port and the
// thumbprints.
func serve(t *testing.T, by *authority, c *x509.Certificate, config *tls.Config) (port uint32, sha1sum, sha256sum string) {
	t.Helper()
	made, key := issue(t, by, c)
	config.Certificates = []tls.Certificate{{Certificate: [][]byte{made.Raw}, PrivateKey: key}}
	port = listen(t, func(conn net.Conn) {
		tls.Server(conn, config).HandshakeContext(t.Context())
	})
	return port, fmt.Sprintf("%X", sha1.Sum(made.Raw)), fmt.Sprintf("%X", sha256.Sum256(made.Raw))
}

// listen starts a server on 127.0.0.1 that calls handle for each connection. It returns the port.
func listen(t *testing.T, handle func(net.Conn)) (port uint32) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			handle(conn)
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		l.Close()
		<-done
	})
	return uint32(l.Addr().(*net.TCPAddr).Port)
}

func colons(s string) string {
	var pairs []string
	for i := 0; i < len(s); i += 2 {
		pairs = append(pairs, s[i:i+2])
	}
	return strings.Join(pairs, ":")
}

func TestCheckThumbprint(t *testing.T) {
	selfSigned := &x509.Certificate{Subject: pkix.Name{CommonName: "esxi"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	port, sum1, sum256 := serve(t, nil, selfSigned, &tls.Config{})
	plain := listen(t, func(c net.Conn) { fmt.Fprint(c, "220 hello\r\n") })
	closed := uint32(1)
	other1, other256 := strings.Repeat("0a", 20), strings.Repeat("0a", 32)
	for name, c := range map[string]struct {
		port  uint32
		want  string
		sha1  string
		fails string // part of the error; after a ! the error is a Error
	}{
		"SHA-1":                      {port: port, want: sum1, sha1: colons(sum1)},
		"SHA-1 with colons":          {port: port, want: colons(sum1), sha1: colons(sum1)},
		"SHA-1 in lower case":        {port: port, want: strings.ToLower(colons(sum1)), sha1: colons(sum1)},
		"SHA-256":                    {port: port, want: sum256, sha1: colons(sum1)},
		"SHA-256, colons, lower":     {port: port, want: strings.ToLower(colons(sum256)), sha1: colons(sum1)},
		"another SHA-1":              {port: port, want: other1, fails: "!the SHA-1 thumbprint " + colons(sum1) + ", expected " + colons(strings.ToUpper(other1))},
		"another SHA-256":            {port: port, want: other256, fails: "!the SHA-256 thumbprint " + colons(sum256) + ", expected " + colons(strings.ToUpper(other256))},
		"none, and nobody vouches":   {port: port, fails: "!does not verify"},
		"SHA-1, nothing listens":     {port: closed, want: strings.ToLower(other1), sha1: colons(strings.ToUpper(other1))},
		"SHA-256, nothing listens":   {port: closed, want: other256, fails: "connection refused"},
		"none, nothing listens":      {port: closed, fails: "connection refused"},
		"SHA-1, another protocol":    {port: plain, want: other1, sha1: colons(strings.ToUpper(other1))},
		"SHA-256, another protocol":  {port: plain, want: other256, fails: "does not speak TLS"},
		"no digits":                  {port: port, want: "xx:yy", fails: "not a thumbprint"},
		"digits and a bit":           {port: port, want: sum1 + "0", fails: "found 41 characters"},
		"colons in the wrong places": {port: port, want: sum1[:1] + ":" + sum1[1:], fails: "a colon after each two digits"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := certificate.CheckThumbprint(t.Context(), "127.0.0.1", c.port, c.want)
			if c.fails == "" {
				if err != nil || got != c.sha1 {
					t.Fatalf("%q, %v; want %q", got, err, c.sha1)
				}
				return
			}
			want, mismatch := strings.CutPrefix(c.fails, "!")
			if err == nil || got != "" || !strings.Contains(err.Error(), want) {
				t.Fatalf("%q, %v; want an error with %q", got, err, want)
			}
			var wrong *certificate.Error
			if errors.As(err, &wrong) != mismatch {
				t.Errorf("%T", err)
			}
			if mismatch && wrong.Hint() == "" {
				t.Error("no hint")
			}
		})
	}
}

// Old hosts support only TLS 1.0.
func TestThumbprintOfOldServers(t *testing.T) {
	port, sum1, sum256 := serve(t, nil, &x509.Certificate{}, &tls.Config{MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS10})
	// For a SHA-1 thumbprint, no connection would be needed.
	if got, err := certificate.CheckThumbprint(t.Context(), "127.0.0.1", port, sum256); err != nil || got != colons(sum1) {
		t.Errorf("%q, %v", got, err)
	}
}

// dial opens a connection with the configuration that Config returns, and closes it.
func dial(t *testing.T, server string, port uint32, want string, accepted func(*certificate.Certificate)) error {
	t.Helper()
	config, err := certificate.Config(server, port, want, accepted)
	if err != nil {
		return err
	}
	conn, err := tls.Dial("tcp", net.JoinHostPort(server, fmt.Sprint(port)), config)
	if err != nil {
		return err
	}
	return conn.Close()
}

func TestConfig(t *testing.T) {
	leaf := &x509.Certificate{IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	port, sum1, sum256 := serve(t, nil, leaf, &tls.Config{})
	old, old1, _ := serve(t, nil, leaf, &tls.Config{MaxVersion: tls.VersionTLS10, MinVersion: tls.VersionTLS10})
	other1, other256 := strings.Repeat("0A", 20), strings.Repeat("0a", 32)
	for name, c := range map[string]struct {
		port  uint32
		want  string
		fails string
	}{
		"SHA-1":          {port, strings.ToLower(sum1), ""},
		"SHA-256":        {port, colons(sum256), ""},
		"TLS 1.0":        {old, old1, ""},
		"other SHA-1":    {port, other1, "has the SHA-1 thumbprint " + colons(sum1) + ", expected " + colons(other1)},
		"other SHA-256":  {port, other256, "has the SHA-256 thumbprint " + colons(sum256) + ", expected "},
		"nobody vouches": {port, "", "does not verify"},
		"no thumbprint":  {port, "xx", "not a thumbprint"},
	} {
		t.Run(name, func(t *testing.T) {
			var accepted []string
			err := dial(t, "127.0.0.1", c.port, c.want, func(got *certificate.Certificate) { accepted = append(accepted, got.SHA1) })
			if c.fails == "" {
				if err != nil || len(accepted) != 1 {
					t.Errorf("%v, accepted %v", err, accepted)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), c.fails) || len(accepted) != 0 || errors.As(err, new(*certificate.Error)) == (c.want == "xx") {
				t.Errorf("%T %v, want %q; accepted %v", err, err, c.fails, accepted)
			}
		})
	}
}

// Go reads the root certificates once in each process, so that each case runs in its own process.
func TestCertificateMustVerify(t *testing.T) {
	if port := os.Getenv("VDDKCP_TEST_CHECK"); port != "" {
		var n uint32
		fmt.Sscan(port, &n)
		sum, err := certificate.CheckThumbprint(t.Context(), os.Getenv("VDDKCP_TEST_SERVER"), n, "")
		fmt.Printf("got %s %v\n", sum, err)
		if again := dial(t, os.Getenv("VDDKCP_TEST_SERVER"), n, "", nil); fmt.Sprint(again) != fmt.Sprint(err) {
			t.Errorf("a connection with Config: %v", again)
		}
		return
	}
	known, unknown := newAuthority(t), newAuthority(t)
	roots := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: known.certificate.Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	localhost := func() *x509.Certificate {
		return &x509.Certificate{Subject: pkix.Name{CommonName: "esxi"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	}
	old := localhost()
	old.NotBefore, old.NotAfter = time.Now().Add(-2*time.Hour), time.Now().Add(-time.Hour)
	for name, c := range map[string]struct {
		by          *authority
		certificate *x509.Certificate
		server      string
		fails       string
	}{
		"by name":            {by: known, certificate: localhost(), server: "localhost"},
		"by address":         {by: known, certificate: localhost(), server: "127.0.0.1"},
		"another name":       {by: known, certificate: &x509.Certificate{DNSNames: []string{"other"}}, server: "localhost", fails: "not localhost"},
		"no address":         {by: known, certificate: &x509.Certificate{DNSNames: []string{"localhost"}}, server: "127.0.0.1", fails: "doesn't contain any IP SANs"},
		"an expired one":     {by: known, certificate: old, server: "localhost", fails: "expired"},
		"another authority":  {by: unknown, certificate: localhost(), server: "localhost", fails: "unknown authority"},
		"signed by itself":   {certificate: localhost(), server: "localhost", fails: "unknown authority"},
		"no authority by it": {by: &authority{}, certificate: localhost(), server: "localhost", fails: "unknown authority"},
	} {
		t.Run(name, func(t *testing.T) {
			by := c.by
			if by != nil && by.certificate == nil { // the certificate is not one of an authority
				leaf, key := issue(t, known, localhost())
				by = &authority{leaf, key}
			}
			port, sum1, _ := serve(t, by, c.certificate, &tls.Config{})
			cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestCertificateMustVerify$")
			cmd.Env = append(os.Environ(), "SSL_CERT_FILE="+roots, "SSL_CERT_DIR=/nowhere",
				fmt.Sprintf("VDDKCP_TEST_CHECK=%d", port), "VDDKCP_TEST_SERVER="+c.server)
			out, err := cmd.CombinedOutput()
			if err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
			want := fmt.Sprintf("got %s <nil>", colons(sum1))
			if c.fails != "" {
				want = c.fails
			}
			if !strings.Contains(string(out), want) {
				t.Errorf("%s\nwant %q", out, want)
			}
			if c.fails != "" && strings.Contains(string(out), colons(sum1)) {
				t.Errorf("%s\nhas the thumbprint", out)
			}
		})
	}
}

// A server that accepts connections and sends nothing is an error after the timeout.
func TestFetchEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	port := listen(t, func(net.Conn) {
		cancel(errors.New("enough"))
		<-ctx.Done()
	})
	if _, err := certificate.CheckThumbprint(ctx, "127.0.0.1", port, strings.Repeat("ab", 20)); err == nil || err.Error() != "enough" {
		t.Errorf("%v, want what ended the context, and no thumbprint", err)
	}
}

func FuzzParseThumbprint(f *testing.F) {
	f.Fuzz(func(t *testing.T, s string) {
		got, err := certificate.ParseThumbprint(s)
		if err != nil {
			return
		}
		again, err := certificate.ParseThumbprint(got)
		if err != nil || again != got {
			t.Errorf("%q: %q, then %q, %v", s, got, again, err)
		}
		if !strings.EqualFold(strings.ReplaceAll(got, ":", ""), strings.ReplaceAll(s, ":", "")) {
			t.Errorf("%q: %q", s, got)
		}
	})
}
