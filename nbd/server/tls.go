package server

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"path/filepath"

	"github.com/vddkcp/vddkcp/nbd"
)

// LoadTLS reads certificates from a directory and returns the TLS configuration of a
// server, which requires TLS 1.2 or later. The files have the names that nbdkit, qemu
// and libnbd use. server-cert.pem contains the certificate of the server, after which
// certificates of intermediate authorities may follow. server-key.pem contains its key.
// If verifyPeer is true, each client must present a certificate that an authority in
// ca-cert.pem has signed.
func LoadTLS(dir string, verifyPeer bool) (*tls.Config, error) {
	own, err := nbd.LoadCertificate(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"))
	if err != nil {
		return nil, fmt.Errorf("cannot load the certificate of the server: %w", err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{own}}
	if !verifyPeer {
		return config, nil
	}
	authorities, err := nbd.LoadAuthorities(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		return nil, fmt.Errorf("cannot load the authority certificates for verifying clients: %w", err)
	}
	// The authorities of ca-cert.pem are not set as ClientCAs, because the server would then
	// send their names to clients. If GnuTLS 3.7 gets such names with TLS 1.3, it sends no
	// certificate.
	config.ClientAuth = tls.RequireAnyClientCert
	config.VerifyConnection = func(state tls.ConnectionState) error {
		between := x509.NewCertPool()
		for _, c := range state.PeerCertificates[1:] {
			between.AddCert(c)
		}
		_, err := state.PeerCertificates[0].Verify(x509.VerifyOptions{
			Roots: authorities, Intermediates: between, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
		})
		if err != nil {
			return fmt.Errorf("cannot verify the certificate of the client: %w", err)
		}
		return nil
	}
	return config, nil
}
