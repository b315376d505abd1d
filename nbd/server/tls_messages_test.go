package server_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/peer"
	nbdclient "github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
)

// issueLike is issue with a template that the function change has modified.
func issueLike(t *testing.T, parent *authority, dir, name string, change func(*x509.Certificate)) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{CommonName: "localhost"}, DNSNames: []string{"localhost"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
	}
	change(template)
	der, err := x509.CreateCertificate(rand.Reader, template, parent.cert, &private.PublicKey, parent.key)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	writePEM(t, filepath.Join(dir, name+"-cert.pem"), "CERTIFICATE", der)
	writePEM(t, filepath.Join(dir, name+"-key.pem"), "PRIVATE KEY", key)
}

func writePEM(t *testing.T, path, kind string, der []byte) {
	t.Helper()
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		t.Fatal(err)
	}
}

func hintOf(err error) string {
	var h interface{ Hint() string }
	if errors.As(err, &h) {
		return h.Hint()
	}
	return ""
}

// TestCertificateFiles uses directories with wrong files. Each error of the server and of the
// client must name the file and say what is wrong with it.
func TestCertificateFiles(t *testing.T) {
	expired := func(c *x509.Certificate) { c.NotAfter = time.Now().Add(-time.Minute) }
	for _, c := range []struct {
		name  string
		spoil func(t *testing.T, ca *authority, dir, who string)
		want  string // the error, in which WHO stands for server or client
		hint  string
	}{
		{"expired", func(t *testing.T, ca *authority, dir, who string) { issueLike(t, ca, dir, who, expired) }, "DIR/WHO-cert.pem expired on 20", "renew the certificate"},
		{"not valid yet", func(t *testing.T, ca *authority, dir, who string) {
			issueLike(t, ca, dir, who, func(c *x509.Certificate) { c.NotBefore = time.Now().Add(time.Minute) })
		}, "DIR/WHO-cert.pem is not valid before 20", "clock"},
		{"encrypted key", func(t *testing.T, _ *authority, dir, who string) {
			peer.Need(t, "openssl")
			key := filepath.Join(dir, who+"-key.pem")
			peer.Run(t, "openssl", "pkey", "-in", key, "-aes256", "-passout", "pass:secret", "-out", key+".new")
			if err := os.Rename(key+".new", key); err != nil {
				t.Fatal(err)
			}
		}, "the key in DIR/WHO-key.pem is encrypted", "openssl pkey -in DIR/WHO-key.pem"},
		{"encrypted in the old way", func(t *testing.T, _ *authority, dir, who string) {
			text := "-----BEGIN RSA PRIVATE KEY-----\nProc-Type: 4,ENCRYPTED\nDEK-Info: AES-128-CBC,00\n\nAAAA\n-----END RSA PRIVATE KEY-----\n"
			if err := os.WriteFile(filepath.Join(dir, who+"-key.pem"), []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
		}, "the key in DIR/WHO-key.pem is encrypted", "openssl pkey"},
		{"another key", func(t *testing.T, ca *authority, dir, who string) {
			other := t.TempDir()
			issue(t, ca, other, who)
			if err := os.Rename(filepath.Join(other, who+"-key.pem"), filepath.Join(dir, who+"-key.pem")); err != nil {
				t.Fatal(err)
			}
		}, "the key in DIR/WHO-key.pem does not belong to the certificate in DIR/WHO-cert.pem", "issue a new certificate for the existing key"},
		{"no key", func(t *testing.T, _ *authority, dir, who string) { os.Remove(filepath.Join(dir, who+"-key.pem")) }, "DIR/WHO-key.pem: no such file", ""},
		{"no certificate", func(t *testing.T, _ *authority, dir, who string) {
			os.Remove(filepath.Join(dir, who+"-cert.pem"))
		}, "DIR/WHO-cert.pem: no such file", ""},
		{"a folder", func(t *testing.T, _ *authority, dir, who string) {
			os.Remove(filepath.Join(dir, who+"-key.pem"))
			os.Mkdir(filepath.Join(dir, who+"-key.pem"), 0o700)
		}, "DIR/WHO-key.pem: is a directory", ""},
		{"no PEM", func(t *testing.T, _ *authority, dir, who string) {
			os.WriteFile(filepath.Join(dir, who+"-cert.pem"), []byte("hello"), 0o600)
		}, "DIR/WHO-cert.pem has no certificate in PEM format", ""},
		{"DER", func(t *testing.T, ca *authority, dir, who string) {
			os.WriteFile(filepath.Join(dir, who+"-cert.pem"), ca.cert.Raw, 0o600)
		}, "the certificate in DIR/WHO-cert.pem is in DER format", "openssl x509 -inform DER"},
		{"expired authority", func(t *testing.T, ca *authority, dir, _ string) { issueLike(t, ca, dir, "ca", expired) }, "DIR/ca-cert.pem expired on 20", "renew"},
		{"no authority", func(t *testing.T, _ *authority, dir, _ string) { os.Remove(filepath.Join(dir, "ca-cert.pem")) }, "DIR/ca-cert.pem: no such file", ""},
	} {
		for _, who := range []string{"server", "client"} {
			t.Run(c.name+"/"+who, func(t *testing.T) {
				dir := t.TempDir()
				ca := issue(t, nil, dir, "ca")
				issue(t, ca, dir, who)
				c.spoil(t, ca, dir, who)
				var err error
				if who == "server" {
					_, err = server.LoadTLS(dir, true)
				} else {
					_, err = nbdclient.Open(t.Context(), parseURI(t, "nbds+unix:///?socket=/none&tls-certificates="+url.QueryEscape(dir)), nbdclient.Options{})
				}
				put := strings.NewReplacer("DIR", dir, "WHO", who)
				if err == nil || !strings.Contains(err.Error(), put.Replace(c.want)) || !strings.Contains(hintOf(err), put.Replace(c.hint)) {
					t.Errorf("%v\nhint: %s\nwant %s\nhint: %s", err, hintOf(err), put.Replace(c.want), c.hint)
				}
			})
		}
	}
}

// TestTLSMessages combines servers and clients that cannot connect. Each error must say why.
func TestTLSMessages(t *testing.T) {
	pki := t.TempDir()
	ca := issue(t, nil, pki, "ca")
	issue(t, ca, pki, "server")
	issue(t, ca, pki, "client")
	with := func(files ...string) string {
		dir := t.TempDir()
		for _, f := range files {
			b, err := os.ReadFile(filepath.Join(pki, f))
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(dir, f), b, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	bare := with("ca-cert.pem")
	commonName := with("ca-cert.pem")
	issueLike(t, ca, commonName, "server", func(c *x509.Certificate) { c.DNSNames = nil })
	otherName := with("ca-cert.pem")
	issueLike(t, ca, otherName, "server", func(c *x509.Certificate) { c.DNSNames = []string{"esx.example.com"} })
	stranger := with("ca-cert.pem")
	issue(t, issue(t, nil, t.TempDir(), "ca"), stranger, "client")
	otherCA := t.TempDir()
	issue(t, nil, otherCA, "ca")

	for _, c := range []struct {
		name        string
		server      string // directory of the server; "": the server does not use TLS
		verify      bool
		mode        server.TLSMode
		client      string // directory of the client; "": none; "-": the client does not use TLS
		err, hint   string
		insecureToo bool // the connection succeeds with tls-verify-peer=0
	}{
		{name: "common name only", server: commonName, mode: server.TLSRequire, client: bare, err: `the server's certificate names no host: it has the common name "localhost" and no subjectAltName, want a subjectAltName for "localhost"`, hint: "issue the server's certificate with subjectAltName", insecureToo: true},
		{name: "another name", server: otherName, mode: server.TLSRequire, client: bare, err: "esx.example.com", hint: "tls-hostname=NAME", insecureToo: true},
		{name: "another authority", server: pki, mode: server.TLSRequire, client: otherCA, err: "unknown authority", hint: "put the certificate of the authority that signed the server's certificate in " + otherCA + "/ca-cert.pem", insecureToo: true},
		{name: "the system's authorities", server: pki, mode: server.TLSRequire, client: "", err: "unknown authority", hint: "tls-certificates=DIR to the URI: DIR is a directory", insecureToo: true},
		{name: "client without a certificate", server: pki, verify: true, mode: server.TLSRequire, client: bare, err: "certificate", hint: "the server demands a certificate of its clients: put client-cert.pem and client-key.pem in " + bare},
		{name: "client of another authority", server: pki, verify: true, mode: server.TLSRequire, client: stranger, err: "certificate", hint: "the server refuses the certificate in " + stranger + "/client-cert.pem"},
		{name: "server without TLS", mode: server.TLSOff, client: bare, err: "the server does not support TLS, which the scheme nbds requires", hint: "use nbd:// or nbd+unix://"},
		{name: "client without TLS", server: pki, mode: server.TLSRequire, client: "-", err: "the server demands TLS", hint: "use nbds"},
	} {
		for _, address := range []string{"unix:" + socketPath(t), "tcp://127.0.0.1:0"} {
			t.Run(c.name+"/"+address[:4], func(t *testing.T) {
				o := server.Options{TLSMode: c.mode}
				if c.server != "" {
					o.TLS = loadTLS(t, c.server, c.verify)
				}
				s := serve(t, one("", newDisk(64<<10)), o, address)
				uri := server.URI(s.Addr(), c.client != "-", "")
				separator := "?"
				if strings.Contains(uri, "?") {
					separator = "&"
				}
				if c.client != "-" {
					uri += separator + "tls-hostname=localhost"
				}
				if c.client != "-" && c.client != "" {
					uri += "&tls-certificates=" + url.QueryEscape(c.client)
				}
				_, err := nbdclient.Open(t.Context(), parseURI(t, uri), nbdclient.Options{Timeout: 10 * time.Second})
				if err == nil || !strings.Contains(err.Error(), c.err) || !strings.Contains(hintOf(err), c.hint) {
					t.Errorf("%v\nhint: %s\nwant %s\nhint: %s", err, hintOf(err), c.err, c.hint)
				}
				if !c.insecureToo {
					return
				}
				d, err := nbdclient.Open(t.Context(), parseURI(t, uri+"&tls-verify-peer=0"), nbdclient.Options{Timeout: 10 * time.Second})
				if err != nil {
					t.Fatalf("without verification: %v", err)
				}
				d.Close()
			})
		}
	}
}

// TestNotOpened opens an export whose disk cannot be opened.
func TestNotOpened(t *testing.T) {
	s := serve(t, noDisk{server.Fixed{{}}}, server.Options{}, "unix:"+socketPath(t))
	_, err := nbdclient.Open(t.Context(), parseURI(t, server.URI(s.Addr(), false, "")), nbdclient.Options{})
	if err == nil || !strings.Contains(err.Error(), "did not open it: the export cannot be opened") || !strings.Contains(hintOf(err), "server's log") {
		t.Errorf("%v\nhint: %s", err, hintOf(err))
	}
}

// noDisk is a list of exports whose disks cannot be opened.
type noDisk struct{ server.Fixed }

func (noDisk) Open(context.Context, string) (source.Disk, error) {
	return nil, errors.New("the host is away")
}
