package nfc_test

import (
	"bytes"
	"io"
	"net"
	"strconv"
	"sync"
	"testing"
)

// A wiretap passes connections on to a host and records what is sent in both directions.
type wiretap struct {
	listener net.Listener
	mu       sync.Mutex
	b        bytes.Buffer
}

func newWiretap(t *testing.T, port int) *wiretap {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w := &wiretap{listener: l}
	var wg sync.WaitGroup
	t.Cleanup(func() { l.Close(); wg.Wait() })
	pass := func(to, from net.Conn) {
		io.Copy(io.MultiWriter(w, to), from)
		to.(*net.TCPConn).CloseWrite()
	}
	wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer client.Close()
				host, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
				if err != nil {
					return
				}
				defer host.Close()
				go pass(client, host)
				pass(host, client)
			})
		}
	})
	return w
}

func (w *wiretap) port() int { return w.listener.Addr().(*net.TCPAddr).Port }

func (w *wiretap) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.b.Write(p)
}

// seen returns all bytes that were sent.
func (w *wiretap) seen() []byte {
	w.mu.Lock()
	defer w.mu.Unlock()
	return bytes.Clone(w.b.Bytes())
}
