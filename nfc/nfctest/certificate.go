package nfctest

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

// newCertificate returns a new certificate that signs itself.
func newCertificate() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		panic(err) // never
	}
	serial, _ := rand.Int(rand.Reader, big.NewInt(1<<62))
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "esx.test"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(1000 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, KeyUsage: x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		panic(err) // never
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

func thumbprintSHA1(der []byte) string { h := sha1.Sum(der); return colons(h[:]) }

func thumbprintSHA256(der []byte) string { h := sha256.Sum256(der); return colons(h[:]) }

func colons(b []byte) string { return strings.ReplaceAll(fmt.Sprintf("% X", b), " ", ":") }

// tlsConfig returns the configuration of a TLS session of the host.
func (h *Host) tlsConfig(certificate tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates:                []tls.Certificate{certificate},
		MinVersion:                  tls.VersionTLS12,
		MaxVersion:                  h.options.MaxTLS,
		DynamicRecordSizingDisabled: true,
	}
}
