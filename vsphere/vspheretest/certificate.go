package vspheretest

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
	"math/big"
	"net"
	"strings"
	"time"
)

// RenewCertificate gives the server a new certificate, which it has signed itself, and closes the
// connections.
func (s *Server) RenewCertificate() {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // never
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "vcenter.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IPAddresses: []net.IP{net.ParseIP("127.0.0.1")}, DNSNames: []string{"localhost"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err) // never
	}
	s.mu.Lock()
	s.certificate = tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
	s.mu.Unlock()
	s.CutConnections()
}

func (s *Server) der() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.certificate.Certificate[0]
}

// Thumbprint returns the SHA-256 thumbprint of the server's certificate, as "XX:XX:...".
func (s *Server) Thumbprint() string { h := sha256.Sum256(s.der()); return colons(h[:]) }

// ThumbprintSHA1 returns the SHA-1 thumbprint of the server's certificate.
func (s *Server) ThumbprintSHA1() string { h := sha1.Sum(s.der()); return colons(h[:]) }

// CertificatePEM returns the server's certificate, for a list of authorities that verify it.
func (s *Server) CertificatePEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.der()})
}

func colons(b []byte) string { return strings.ReplaceAll(fmt.Sprintf("% X", b), " ", ":") }
