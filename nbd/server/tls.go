package server

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
)

// LoadTLS returns what TLS needs from a folder with the file names of nbdkit,
// qemu and libnbd: server-cert.pem (the authorities between may follow in it)
// and server-key.pem, and with verifyPeer ca-cert.pem, whose authorities have
// to have signed the certificate that each client then must show. TLS is
// version 1.2 or later.
func LoadTLS(dir string, verifyPeer bool) (*tls.Config, error) {
	own, err := tls.LoadX509KeyPair(filepath.Join(dir, "server-cert.pem"), filepath.Join(dir, "server-key.pem"))
	if err != nil {
		return nil, fmt.Errorf("the server's certificate and key in %s: %w", dir, err)
	}
	config := &tls.Config{MinVersion: tls.VersionTLS12, Certificates: []tls.Certificate{own}}
	if !verifyPeer {
		return config, nil
	}
	path := filepath.Join(dir, "ca-cert.pem")
	pem, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("the authority that clients are verified with: %w", err)
	}
	config.ClientCAs = x509.NewCertPool()
	if !config.ClientCAs.AppendCertsFromPEM(pem) {
		return nil, fmt.Errorf("%s: no certificate in PEM", path)
	}
	config.ClientAuth = tls.RequireAndVerifyClientCert
	return config, nil
}
