package client

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"vddkcp/nbd"
)

// tlsConfig is what the URI demands of TLS, with the names that files have in
// nbdkit, qemu and libnbd.
func tlsConfig(uri *nbd.URI) (*tls.Config, error) {
	name := uri.Hostname
	if name == "" {
		name = uri.Host
	}
	if name == "" {
		name = "localhost"
	}
	config := &tls.Config{ServerName: name, MinVersion: tls.VersionTLS12, InsecureSkipVerify: uri.NoVerify}
	dir := uri.Certificates
	if dir == "" {
		return config, nil
	}
	const authority, certificate, key = "ca-cert.pem", "client-cert.pem", "client-key.pem"
	switch pem, err := os.ReadFile(filepath.Join(dir, authority)); {
	case err == nil:
		config.RootCAs = x509.NewCertPool()
		if !config.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s: no certificate in PEM", filepath.Join(dir, authority))
		}
	case !uri.NoVerify || !errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("the authority that the server's certificate is verified with: %w", err)
	}
	own, err := tls.LoadX509KeyPair(filepath.Join(dir, certificate), filepath.Join(dir, key))
	switch {
	case err == nil:
		config.Certificates = []tls.Certificate{own}
	case !errors.Is(err, fs.ErrNotExist) || exists(filepath.Join(dir, certificate)):
		return nil, fmt.Errorf("%s: %w", filepath.Join(dir, certificate), err)
	}
	return config, nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
