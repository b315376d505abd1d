package nfctest

import (
	"crypto/tls"

	"github.com/vddkcp/vddkcp/internal/selfsigned"
)

// tlsConfig returns the configuration of a TLS session of the host.
func (h *Host) tlsConfig(certificate tls.Certificate) *tls.Config {
	return &tls.Config{
		Certificates:                []tls.Certificate{certificate},
		MinVersion:                  tls.VersionTLS12,
		MaxVersion:                  h.options.MaxTLS,
		DynamicRecordSizingDisabled: true,
	}
}

// newCertificate returns a new certificate for a host.
func newCertificate() tls.Certificate { return selfsigned.New("esx.test") }
