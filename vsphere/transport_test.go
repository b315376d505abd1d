package vsphere

import (
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httptrace"
	"sync/atomic"
	"testing"

	"github.com/vmware/govmomi/vim25/methods"

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

// A call that must not be repeated uses a new connection, because the server may have closed one that
// was idle.
func TestNewConnection(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.VM{Name: "web01"})
	session := openSession(t, s)
	var reused atomic.Bool
	ctx := httptrace.WithClientTrace(t.Context(), &httptrace.ClientTrace{
		GotConn: func(info httptrace.GotConnInfo) { reused.Store(info.Reused) },
	})
	if _, err := methods.GetCurrentTime(ctx, session.client); err != nil || !reused.Load() {
		t.Errorf("%v; reused %v, want true", err, reused.Load())
	}
	if err := session.snapshot(ctx, s.Find("web01")); err != nil || reused.Load() {
		t.Errorf("%v; reused %v, want false", err, reused.Load())
	}
}
