package vsphere

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

// A connection is used again although the decoder stops before the end of an answer. An answer
// without an end does not keep the caller.
func TestEndOfAnswer(t *testing.T) {
	t.Parallel()
	var conns atomic.Int32
	stall := make(chan struct{})
	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Write(make([]byte, 10000))
		w.(http.Flusher).Flush()
		if r.URL.Path == "/stall" {
			<-stall
		}
	}))
	s.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			conns.Add(1)
		}
	}
	s.StartTLS()
	defer s.Close()
	defer close(stall)
	o, err := optionsOf(t, s.Listener.Addr(), s.Certificate().Raw).withDefaults()
	if err != nil {
		t.Fatal(err)
	}
	certs, err := newCertificates(&o)
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Transport: newTransport(&o, certs)}
	for _, path := range []string{"/1", "/2", "/3", "/stall"} {
		res, err := client.Get(s.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(res.Body, make([]byte, 5000)); err != nil {
			t.Error(err)
		}
		res.Body.Close()
	}
	if n := conns.Load(); n != 1 {
		t.Errorf("%d connections", n)
	}
}

// A connection that the server has closed while it was idle does not make a call uncertain.
func TestIdleConnectionClosed(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	vm := s.Find("web01")
	for range 10 {
		s.CutConnections()
		if err := session.snapshot(t.Context(), vm); err != nil {
			t.Fatal(err)
		}
		s.Settle()
	}
}
