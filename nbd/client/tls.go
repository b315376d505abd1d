package client

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/nbd"
)

// tlsConfig returns the TLS configuration that the URI describes. The files with
// certificates have the names that nbdkit, qemu and libnbd use.
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
	if st, err := os.Stat(dir); err != nil || !st.IsDir() {
		return nil, hinted.Error(fmt.Errorf("tls-certificates=%s: no such directory, want a directory with ca-cert.pem", nbd.Text([]byte(dir))), "create the directory with ca-cert.pem and, if the server demands them, client-cert.pem and client-key.pem")
	}
	authority, certificate, key := filepath.Join(dir, "ca-cert.pem"), filepath.Join(dir, "client-cert.pem"), filepath.Join(dir, "client-key.pem")
	if !uri.NoVerify {
		var err error
		if config.RootCAs, err = nbd.LoadAuthorities(authority); err != nil {
			return nil, fmt.Errorf("cannot load the authority certificates for verifying the server: %w", err)
		}
	}
	if !exists(certificate) && !exists(key) {
		return config, nil
	}
	own, err := nbd.LoadCertificate(certificate, key)
	if err != nil {
		return nil, fmt.Errorf("cannot load the certificate of the client: %w", err)
	}
	config.Certificates = []tls.Certificate{own}
	return config, nil
}

// The function exists returns false only if there is certainly no file at the given
// path. If the path cannot be examined, it returns true.
func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
