// Package selfsigned makes certificates for the simulated servers of tests.
package selfsigned

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"math/big"
	"net"
	"strings"
	"time"
)

// New returns a new certificate that signs itself, for a server on the loopback interface. The
// parameter name is the common name of the server.
func New(name string) tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // never
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: name},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, DNSNames: []string{"localhost"},
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err) // never
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// SHA1 returns the SHA-1 thumbprint of a certificate in DER, as "AA:BB:...".
func SHA1(der []byte) string { h := sha1.Sum(der); return colons(h[:]) }

// SHA256 returns the SHA-256 thumbprint of a certificate in DER, as "AA:BB:...".
func SHA256(der []byte) string { h := sha256.Sum256(der); return colons(h[:]) }

func colons(b []byte) string { return strings.ReplaceAll(fmt.Sprintf("% X", b), " ", ":") }
