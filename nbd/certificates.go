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

// CertificateError says what is wrong with a certificate or a key, or with the file
// that contains it.
type CertificateError struct {
	err  error
	hint string
}

func (e *CertificateError) Error() string { return e.err.Error() }
func (e *CertificateError) Unwrap() error { return e.err }

// Hint returns an instruction that tells the user how to correct the error. It returns
// "" if there is none.
func (e *CertificateError) Hint() string { return e.hint }

func wrong(hint, format string, args ...any) error {
	return &CertificateError{fmt.Errorf(format, args...), hint}
}

// LoadCertificate reads a certificate and its private key from two PEM files. In its
// file, the certificate may be followed by certificates of intermediate authorities.
// LoadCertificate returns a *CertificateError, which names the file, if a file cannot
// be read or is not PEM, if the key is encrypted or does not belong to the certificate,
// or if the certificate has expired or is not valid yet.
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
	case strings.Contains(err.Error(), "does not match"): // crypto/tls has no type for this error
		return pair, wrong("replace the key file by the key that the certificate was issued for, or issue a new certificate for the existing key",
			"the key in %s does not belong to the certificate in %s", keyPath, certPath)
	default:
		return pair, wrong("", "%s and %s: %w", certPath, keyPath, err)
	}
	return pair, valid(certPath, pair.Leaf)
}

// LoadAuthorities reads the certificates of authorities from a PEM file. At least one
// of these certificates must be valid. It is not an error if others have expired or are
// not valid yet. All errors are of the type *CertificateError: see LoadCertificate.
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

// readPEM returns the content of the file at path. The file must have a PEM block of
// the given kind, which is "CERTIFICATE" or "PRIVATE KEY". The type of the block must
// end in this text. An encrypted key is an error.
func readPEM(path, kind string) ([]byte, error) {
	text, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, wrong("give the user who runs vddkcp permission to read the file", "%w", err)
	case err != nil:
		return nil, wrong("", "%w", err)
	}
	for block, rest := pem.Decode(text); block != nil; block, rest = pem.Decode(rest) {
		if !strings.HasSuffix(block.Type, kind) {
			continue
		}
		if strings.HasPrefix(block.Type, "ENCRYPTED") || strings.Contains(block.Headers["Proc-Type"], "ENCRYPTED") {
			return nil, wrong(fmt.Sprintf("decrypt the key (openssl pkey -in %s -out KEY), and make the new file readable only for the user who runs vddkcp", path),
				"the key in %s is encrypted, and vddkcp does not ask for passphrases", path)
		}
		return text, nil
	}
	if _, err := x509.ParseCertificate(text); err == nil && kind == "CERTIFICATE" {
		return nil, wrong(fmt.Sprintf("convert the certificate (openssl x509 -inform DER -in %s -out CERT)", path), "the certificate in %s is in DER format, want PEM", path)
	}
	return nil, wrong("", "%s has no %s in PEM format", path, strings.ToLower(kind))
}

// The function valid returns an error if a certificate has expired or is not valid yet.
// The error names the file that contains the certificate, which has the given path.
func valid(path string, c *x509.Certificate) error {
	const day = "2006-01-02 15:04:05 MST"
	switch now := time.Now(); {
	case now.After(c.NotAfter):
		return wrong("renew the certificate, or set the clock of this machine if it is wrong", "the certificate in %s expired on %s", path, c.NotAfter.UTC().Format(day))
	case now.Before(c.NotBefore):
		return wrong("set the clock of this machine if it is wrong; otherwise wait until the certificate becomes valid", "the certificate in %s is not valid before %s", path, c.NotBefore.UTC().Format(day))
	}
	return nil
}

// NamesNoHost reports whether a certificate has no subjectAltName. Such a certificate is
// valid for no host, since Go ignores its common name.
func NamesNoHost(c *x509.Certificate) bool {
	return len(c.DNSNames)+len(c.IPAddresses)+len(c.URIs)+len(c.EmailAddresses) == 0
}
