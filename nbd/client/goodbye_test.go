package client

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io"
	"math/big"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
)

// TestGoodbyeOverTLS uses a server that reads DISC and then stops reading, so that the client
// cannot send close_notify. The client must end within the same time as with a server that
// does not read DISC.
func TestGoodbyeOverTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		public, private, err := ed25519.GenerateKey(rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour)}
		certificate, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
		if err != nil {
			t.Fatal(err)
		}
		here, there := net.Pipe()
		defer there.Close()
		taken := make(chan error, 1)
		go func() {
			server := tls.Server(there, &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{certificate}, PrivateKey: private}}})
			_, err := io.ReadFull(server, make([]byte, nbd.RequestSize))
			taken <- err
		}()
		over := tls.Client(here, &tls.Config{InsecureSkipVerify: true})
		if err := over.HandshakeContext(t.Context()); err != nil {
			t.Fatal(err)
		}
		c := newConn(here, over, negotiated{}, time.Minute)
		start := time.Now()
		c.disconnect()
		if took := time.Since(start); took > disconnectTimeout {
			t.Errorf("the end took %v, want %v", took, disconnectTimeout)
		}
		if err := <-taken; err != nil {
			t.Error(err)
		}
	})
}
