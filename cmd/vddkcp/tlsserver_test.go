package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"os"
	"strconv"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
)

// cmdServer starts a server on an address of this host until the end of the script:
// server self|authority|plain|silent [ADDRESS]. It sets PORT. For self and authority,
// which use TLS, it also sets SHA1 and SHA256. authority writes the certificate of its
// authority to roots.pem.
func cmdServer(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 || len(args) > 2 {
		ts.Fatalf("usage: server self|authority|plain|silent [ADDRESS]")
	}
	address := "127.0.0.1"
	if len(args) == 2 {
		address = args[1]
	}
	var handle func(net.Conn)
	switch args[0] {
	case "plain":
		handle = func(c net.Conn) { io.WriteString(c, "220 ready\r\n") }
	case "silent":
		handle = func(c net.Conn) { io.Copy(io.Discard, c) }
	case "self", "authority":
		config := &tls.Config{Certificates: []tls.Certificate{makeCertificate(ts, args[0] == "authority")}}
		handle = func(c net.Conn) { tls.Server(c, config).Handshake() }
	default:
		ts.Fatalf("no server is called %s", args[0])
	}
	l, err := net.Listen("tcp", net.JoinHostPort(address, "0"))
	ts.Check(err)
	ts.Defer(func() { l.Close() })
	ts.Setenv("PORT", strconv.Itoa(l.Addr().(*net.TCPAddr).Port))
	go func() { // until l is closed
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				handle(c)
			}()
		}
	}()
}

func makeCertificate(ts *testscript.TestScript, signed bool) tls.Certificate {
	make := func(c, parent *x509.Certificate, signer *ecdsa.PrivateKey) ([]byte, *ecdsa.PrivateKey) {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		ts.Check(err)
		c.SerialNumber, c.NotBefore, c.NotAfter = big.NewInt(1), time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
		if parent == nil {
			parent, signer = c, key
		}
		der, err := x509.CreateCertificate(rand.Reader, c, parent, &key.PublicKey, signer)
		ts.Check(err)
		return der, key
	}
	var authority *x509.Certificate
	var signer *ecdsa.PrivateKey
	if signed {
		authority = &x509.Certificate{Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
		var der []byte
		der, signer = make(authority, nil, nil)
		f, err := os.Create(ts.MkAbs("roots.pem"))
		ts.Check(err)
		ts.Check(pem.Encode(f, &pem.Block{Type: "CERTIFICATE", Bytes: der}))
		ts.Check(f.Close())
	}
	der, key := make(&x509.Certificate{
		Subject: pkix.Name{CommonName: "esxi\x1b[31m"}, DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
	}, authority, signer)
	ts.Setenv("SHA1", pairs(fmt.Sprintf("%X", sha1.Sum(der))))
	ts.Setenv("SHA256", pairs(fmt.Sprintf("%X", sha256.Sum256(der))))
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// pairs puts a colon after every second digit except the last.
func pairs(digits string) string {
	s := digits[:2]
	for i := 2; i < len(digits); i += 2 {
		s += ":" + digits[i:i+2]
	}
	return s
}
