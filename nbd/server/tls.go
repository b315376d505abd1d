package server

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"path/filepath"

	"github.com/vddkcp/vddkcp/nbd"
)

// LoadTLS returns what TLS needs from a folder with the file names of nbdkit,
// qemu and libnbd: server-cert.pem (the authorities between may follow in it)
// and server-key.pem, and with verifyPeer ca-cert.pem, whose authorities have
// to have signed the certificate that each client then must show. TLS is
// version 1.2 or later.
func LoadTLS(dir string, verifyPeer bool) (*tls.Config, error) {
	own, err := nbd.LoadCertificate(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"))
	if err != nil {
		return nil, fmt.Errorf("the server's certificate: %w", err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{own}}
	if !verifyPeer {
		return config, nil
	}
	authorities, err := nbd.LoadAuthorities(filepath.Join(dir, "ca-cert.pem"))
	if err != nil {
		return nil, fmt.Errorf("the authority that clients are verified with: %w", err)
	}
	// Not ClientCAs: then clients are told the authorities' names, and GnuTLS
	// (3.7, over TLS 1.3) shows no certificate for those.
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
			return fmt.Errorf("the client's certificate: %w", err)
		}
		return nil
	}
	return config, nil
}
