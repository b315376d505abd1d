package vspheretest

import (
	"encoding/pem"

	"github.com/vddkcp/vddkcp/internal/selfsigned"
)

// RenewCertificate gives the server a new certificate, which it has signed itself, and closes the
// connections.
func (s *Server) RenewCertificate() {
	certificate := selfsigned.New("vcenter.test")
	s.mu.Lock()
	s.certificate = certificate
	s.mu.Unlock()
	s.CutConnections()
}

func (s *Server) der() []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.certificate.Certificate[0]
}

// Thumbprint returns the SHA-256 thumbprint of the server's certificate, as "XX:XX:...".
func (s *Server) Thumbprint() string { return selfsigned.SHA256(s.der()) }

// ThumbprintSHA1 returns the SHA-1 thumbprint of the server's certificate.
func (s *Server) ThumbprintSHA1() string { return selfsigned.SHA1(s.der()) }

// CertificatePEM returns the server's certificate, for a list of authorities that verify it.
func (s *Server) CertificatePEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.der()})
}
