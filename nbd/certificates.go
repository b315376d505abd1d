package nbd

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"
)

// CertificateError says what is wrong with a file of TLS, and what to do.
type CertificateError struct {
	err  error
	hint string
}

func (e *CertificateError) Error() string { return e.err.Error() }
func (e *CertificateError) Unwrap() error { return e.err }

// Hint is an instruction, or empty.
func (e *CertificateError) Hint() string { return e.hint }

func wrong(hint, format string, args ...any) error {
	return &CertificateError{fmt.Errorf(format, args...), hint}
}

// LoadCertificate reads a certificate, with those of the authorities between,
// and its key. Each error is a *CertificateError that names the file: one that
// can't be read, is not PEM, is encrypted, does not fit, or is not valid now.
func LoadCertificate(certPath, keyPath string) (tls.Certificate, error) {
	cert, err := readPEM(certPath, "CERTIFICATE")
	if err != nil {
		return tls.Certificate{}, err
	}
	key, err := readPEM(keyPath, "PRIVATE KEY")
	if err != nil {
		return tls.Certificate{}, err
	}
	pair, err := tls.X509KeyPair(cert, key)
	switch {
	case err == nil:
	case strings.Contains(err.Error(), "does not match"): // Go has no type for it
		return pair, wrong("issue a certificate for this key, or put the key here that the certificate was issued for",
			"%s is not the key of the certificate in %s", keyPath, certPath)
	default:
		return pair, wrong("", "%s and %s: %w", certPath, keyPath, err)
	}
	return pair, valid(certPath, pair.Leaf)
}

// LoadAuthorities reads the certificates of authorities. Its errors are as those
// of LoadCertificate; only if none of them is valid now, that is one.
func LoadAuthorities(path string) (*x509.CertPool, error) {
	text, err := readPEM(path, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	pool := x509.NewCertPool()
	var outdated error
	usable := false
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if block.Type != "CERTIFICATE" {
			continue
		}
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, wrong("", "%s: %w", path, err)
		}
		pool.AddCert(c)
		if err := valid(path, c); err == nil {
			usable = true
		} else if outdated == nil {
			outdated = err
		}
	}
	if !usable {
		return nil, outdated
	}
	return pool, nil
}

// readPEM reads a file that has a block of PEM whose type ends in kind.
func readPEM(path, kind string) ([]byte, error) {
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, wrong("let the user who runs vddkcp read the file", "%w", err)
	case err != nil:
		return nil, wrong("", "%w", err)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if !strings.HasSuffix(block.Type, kind) {
			continue
		}
		if strings.HasPrefix(block.Type, "ENCRYPTED") || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED") {
			return nil, wrong(fmt.Sprintf("decrypt it (openssl pkey -in %s -out KEY), and let only the user who runs vddkcp read it", path),
				"the key in %s is encrypted, and nobody can be asked for its passphrase", path)
		}
		return text, nil
	}
	if _, err := x509.ParseCertificate(text); err == nil && kind == "CERTIFICATE" {
		return nil, wrong(fmt.Sprintf("convert it (openssl x509 -inform DER -in %s -out CERT)", path), "%s is a certificate in DER: want PEM", path)
	}
	return nil, wrong("", "%s: no %s in PEM", path, strings.ToLower(kind))
}

func valid(path string, c *x509.Certificate) error {
	const day = "2006-01-02 15:04:05 MST"
	switch now := time.Now(); {
	case now.After(c.NotAfter):
		return wrong("renew the certificate; if it is valid, set the clock of this machine", "the certificate in %s expired on %s", path, c.NotAfter.UTC().Format(day))
	case now.Before(c.NotBefore):
		return wrong("set the clock of this machine, or wait", "the certificate in %s is not valid before %s", path, c.NotBefore.UTC().Format(day))
	}
	return nil
}

// NamesNoHost reports whether a certificate has no subjectAltName: then it is
// for no host, whatever its common name is.
func NamesNoHost(c *x509.Certificate) bool {
	return len(c.DNSNames)+len(c.IPAddresses)+len(c.URIs)+len(c.EmailAddresses) == 0
}
