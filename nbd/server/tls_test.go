package server_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
)

// authority is a certificate that signs others, with its key.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// issue writes a certificate signed by parent, and its key, to dir. Without a parent, it writes
// the certificate of an authority.
func issue(t testing.TB, parent *authority, dir, name string) *authority {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name},
		DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	a := &authority{key: private}
	signer := parent
	if parent == nil {
		template.IsCA, template.BasicConstraintsValid, template.KeyUsage = true, true, x509.KeyUsageCertSign
		signer = &authority{template, private}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, signer.cert, &private.PublicKey, signer.key)
	if err != nil {
		t.Fatal(err)
	}
	if a.cert, err = x509.ParseCertificate(der); err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{name + "-cert.pem": {Type: "CERTIFICATE", Bytes: der}, name + "-key.pem": {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

// certificates returns a directory with the certificates of an authority, a server and a client.
func certificates(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	ca := issue(t, nil, dir, "ca")
	issue(t, ca, dir, "server")
	issue(t, ca, dir, "client")
	return dir
}

func loadTLS(t testing.TB, dir string, verify bool) *tls.Config {
	t.Helper()
	config, err := server.LoadTLS(dir, verify)
	if err != nil {
		t.Fatal(err)
	}
	return config
}

// secure switches the connection to TLS.
func (c *client) secure(dir string, withCertificate bool) error {
	c.t.Helper()
	c.want(nbd.OptStartTLS, nil, nbd.RepAck)
	text, err := os.ReadFile(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		c.t.Fatal(err)
	}
	config := &tls.Config{ServerName: "localhost", RootCAs: x509.NewCertPool()}
	config.RootCAs.AppendCertsFromPEM(text)
	if withCertificate {
		own, err := tls.LoadX509KeyPair(filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem"))
		if err != nil {
			c.t.Fatal(err)
		}
		config.Certificates = []tls.Certificate{own}
	}
	t := tls.Client(c.Conn, config)
	c.Conn = t
	return t.Handshake()
}

func TestTLS(t *testing.T) {
	dir := certificates(t)
	d := newDisk(8 << 20)
	path, want := sparseFile(t, 8<<20)
	require := newServer(t, one("disk", d), server.Options{TLS: loadTLS(t, dir, false), TLSMode: server.TLSRequire})
	on := newServer(t, one("disk", openRaw(t, path)), server.Options{TLS: loadTLS(t, dir, false), TLSMode: server.TLSOn})

	t.Run("required", func(t *testing.T) {
		c := dial(t, require, 3)
		for _, o := range []nbd.Option{nbd.OptList, nbd.OptInfo, nbd.OptGo, nbd.OptStructuredReply, nbd.OptListMetaContext, nbd.OptSetMetaContext, 0x7777} {
			c.want(o, nil, nbd.RepErrTLSRequired)
		}
		c.want(nbd.OptStartTLS, []byte("x"), nbd.RepErrInvalid)
		if err := c.secure(dir, false); err != nil {
			t.Fatal(err)
		}
		c.want(nbd.OptStartTLS, nil, nbd.RepErrInvalid)
		c.alive()
		c.structure()
		c.enter("disk")
		c.reads(want, 1, 7<<20)
		for n := uint32(1); n < 8<<20; n = n*3 + 1 {
			c.reads(want, 0, n)
		}
		c.send(nbd.CmdDisconnect, 0, 0, 0, nil)
		c.closed() // fails without close_notify, which TLS reports as an unexpected end
	})
	t.Run("abort without TLS", func(t *testing.T) {
		c := dial(t, require, 3)
		c.want(nbd.OptAbort, nil, nbd.RepAck)
		c.closed()
	})
	t.Run("EXPORT_NAME without TLS", func(t *testing.T) {
		c := dial(t, require, 3)
		c.write(nbd.AppendOption(nil, nbd.OptExportName, []byte("disk")))
		c.closed()
	})
	t.Run("on", func(t *testing.T) {
		c := ready(t, on, "disk", true)
		c.reads(want, 1, 1<<20)
		c = dial(t, on, 3)
		c.structure()
		c.meta(nbd.OptSetMetaContext, "disk", nbd.BaseAllocation)
		if err := c.secure(dir, false); err != nil {
			t.Fatal(err)
		}
		// Options that were negotiated before STARTTLS must be forgotten.
		c.want(nbd.OptSetMetaContext, nbd.AppendMetaContext(nil, "disk", nbd.BaseAllocation), nbd.RepErrInvalid)
		c.structure()
		c.enter("disk")
		if a := c.do(nbd.CmdBlockStatus, 0, 0, 512, nil); a.errno != nbd.EINVAL {
			t.Errorf("a context of before: %v", a.errno)
		}
		c.reads(want, 0, 8<<20)
	})
	t.Run("plain text behind STARTTLS", func(t *testing.T) {
		c := dial(t, on, 3)
		c.write(nbd.AppendOption(nil, nbd.OptStartTLS, nil), nbd.AppendOption(nil, nbd.OptList, nil))
		if all := c.replies(nbd.OptStartTLS); all[0].kind != nbd.RepAck {
			t.Fatal(all)
		}
		rest, _ := io.ReadAll(c)
		if bytes.Contains(rest, nbd.OptionReply{Option: nbd.OptList}.Append(nil)[:12]) {
			t.Errorf("it was answered: %x", rest)
		}
	})
	t.Run("clients verified", func(t *testing.T) {
		s := newServer(t, one("disk", d), server.Options{TLS: loadTLS(t, dir, true), TLSMode: server.TLSRequire})
		c := dial(t, s, 3)
		if err := c.secure(dir, true); err != nil {
			t.Fatal(err)
		}
		c.enter("disk")
		c = dial(t, s, 3)
		err := c.secure(dir, false)
		if err == nil {
			_, err = c.Read(make([]byte, 1)) // TLS 1.3 reports the refusal after the handshake
		}
		if err == nil {
			t.Error("a client without a certificate is served")
		}
	})
	t.Run("old version", func(t *testing.T) {
		c := dial(t, on, 3)
		c.want(nbd.OptStartTLS, nil, nbd.RepAck)
		if err := tls.Client(c.Conn, &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}).Handshake(); err == nil {
			t.Error("TLS 1.1 is taken")
		}
	})
}
