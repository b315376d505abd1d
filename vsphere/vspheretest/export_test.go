package vspheretest

import (
	"testing"

	"github.com/vddkcp/vddkcp/nfc/nfctest"
)

// CheckNFC reports to t what clients of the NFC services have done wrong.
func (s *Server) CheckNFC(t testing.TB) { s.nfc.check(t) }

// OpenFile opens a file as a client of the first host's NFC service does.
func (s *Server) OpenFile(file string) (*nfctest.Disk, error) {
	p, err := s.place(VM{})
	s.must(err)
	return s.openFile(p.datacenter.Self, file)
}

// MayOpen reports whether a ticket for a VM allows to open a file.
func (s *Server) MayOpen(vm, file string) bool {
	p, err := s.place(VM{})
	s.must(err)
	return s.mayOpen(p.datacenter.Self, s.Find(vm), file)
}
