package client_test

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"io"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/sink"
)

// authority is a certificate that signs others, with its key.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// issue writes a certificate signed by parent, and its key, to dir. Without a parent, it writes
// the certificate of an authority.
func issue(t *testing.T, parent *authority, dir, cert, key, name string) *authority {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: name}, DNSNames: []string{name},
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
	for file, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: der}, key: {Type: "PRIVATE KEY", Bytes: pkcs8}} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

func TestTLS(t *testing.T) {
	pki, bare, other := t.TempDir(), t.TempDir(), t.TempDir()
	ca := issue(t, nil, pki, "ca-cert.pem", "ca-key.pem", "authority")
	issue(t, ca, pki, "server-cert.pem", "server-key.pem", "localhost")
	issue(t, ca, pki, "client-cert.pem", "client-key.pem", "client")
	text, err := os.ReadFile(filepath.Join(pki, "ca-cert.pem"))
	if err == nil { // bare is the directory of a client without a certificate
		err = os.WriteFile(filepath.Join(bare, "ca-cert.pem"), text, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	issue(t, nil, other, "ca-cert.pem", "ca-key.pem", "another authority")

	verifying := serve(t, "--tls=require", "--tls-certificates="+pki, "--tls-verify-peer", "memory", "1M")
	lenient := serve(t, "--tls=require", "--tls-certificates="+pki, "memory", "1M")
	plain := serve(t, "memory", "1M")
	nbds := func(uri, dir, more string) string {
		return "nbds" + strings.TrimPrefix(uri, "nbd") + "&tls-certificates=" + url.QueryEscape(dir) + more
	}
	for _, c := range []struct{ name, uri, err string }{
		{"both sides verified", nbds(verifying, pki, ""), ""},
		{"server verified", nbds(lenient, bare, ""), ""},
		{"not verified", nbds(lenient, other, "&tls-verify-peer=0"), ""},
		{"client without a certificate", nbds(verifying, bare, ""), "nbds+unix:"}, // the error depends on when the server closes the connection
		{"another authority", nbds(lenient, other, ""), "unknown authority"},
		{"another name", nbds(lenient, pki, "&tls-hostname=esx.example.com"), "esx.example.com"},
		{"no folder", nbds(lenient, filepath.Join(pki, "none"), ""), "ca-cert.pem"},
		{"a server without TLS", nbds(plain, pki, ""), "the server does not support TLS"},
		{"without TLS to one that demands it", lenient, "TLS"},
	} {
		t.Run(c.name, func(t *testing.T) {
			d, err := client.Open(t.Context(), parseURI(t, c.uri), client.Options{Timeout: 10 * time.Second})
			if c.err != "" {
				if err == nil {
					_, err = d.ReadAt(make([]byte, 512), 0)
					d.Close()
				}
				if err == nil || !strings.Contains(err.Error(), c.err) {
					t.Errorf("%v, want %q", err, c.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			d.Close()
			want := content(1 << 20)
			w, err := client.Create(t.Context(), parseURI(t, c.uri), 1<<20, client.SinkOptions{Options: sink.Options{}, Client: client.Options{Timeout: 10 * time.Second}})
			if err != nil {
				t.Fatal(err)
			}
			defer w.Abort()
			if _, err := w.WriteAt(want, 0); err != nil {
				t.Fatal(err)
			}
			if err := w.Finish(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := w.Publish(t.Context()); err != nil {
				t.Fatal(err)
			}
			if d, err = client.Open(t.Context(), parseURI(t, c.uri), client.Options{Timeout: 10 * time.Second}); err != nil {
				t.Fatal(err)
			}
			defer d.Close()
			got, err := io.ReadAll(io.NewSectionReader(d, 0, d.Size()))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("read back: %d bytes, %v", len(got), err)
			}
		})
	}
}
