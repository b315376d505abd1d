package server_test

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/nbd/server"
)

// serving is a server with a listener.
type serving struct {
	*server.Server
	net.Listener
	end  context.CancelFunc
	done chan error
}

func serve(t testing.TB, exports server.Exports, o server.Options, address string) *serving {
	t.Helper()
	l, err := server.Listen(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &serving{newServer(t, exports, o), l, cancel, make(chan error, 1)}
	go func() { s.done <- s.Serve(ctx, l) }()
	t.Cleanup(func() {
		cancel()
		if err := <-s.done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return s
}

// socketPath returns a path that is short enough for a socket.
func socketPath(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "nbd")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "s")
}

func (s *serving) dial(t testing.TB, structured bool) *client {
	t.Helper()
	conn, err := net.Dial(s.Addr().Network(), s.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := &client{t: t, Conn: conn}
	c.greet(3)
	if structured {
		c.structure()
	}
	c.enter("")
	return c
}
