package server_test

import (
	"context"
	"errors"
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
)

func TestListen(t *testing.T) {
	path := socketPath(t)
	l, err := server.Listen(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", st.Mode(), err)
	}
	if got, want := server.URI(l.Addr(), false, "a b+c/d?"), "nbd+unix:///a%20b+c/d%3F?socket="+path; got != want {
		t.Errorf("%s, want %s", got, want)
	}
	if _, err := server.Listen(t.Context(), "unix:"+path); err == nil || !strings.Contains(err.Error(), "another server") {
		t.Errorf("where a server listens: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if _, err := os.Stat(path); err != nil {
		t.Fatal("no stale socket: ", err)
	}
	if l, err = server.Listen(t.Context(), "unix:"+path); err != nil {
		t.Fatalf("where no server listens any more: %v", err)
	}
	l.Close()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("after closing: %v", err)
	}
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, address := range []string{"unix:" + path, "unix:", "unix:/" + strings.Repeat("n", 200), "tcp://localhost", "tcp://:0", "localhost:10809", "tcp://127.0.0.1:99999", "unix:/nonexistent/s"} {
		if l, err := server.Listen(t.Context(), address); err == nil {
			l.Close()
			t.Errorf("%s: no error", address)
		}
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("a file is gone")
	}
}

func TestURI(t *testing.T) {
	for _, c := range []struct {
		addr   net.Addr
		tls    bool
		export string
		want   string
	}{
		{&net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 10809}, false, "", "nbd://127.0.0.1:10809"},
		{&net.TCPAddr{IP: net.IPv6loopback, Port: 7}, true, "/x y", "nbds://[::1]:7//x%20y"},
		{&net.TCPAddr{IP: net.IPv4zero, Port: 7}, false, "d", "nbd://localhost:7/d"},
		{&net.UnixAddr{Name: "/run/a b&c"}, true, "", "nbds+unix:///?socket=/run/a%20b%26c"},
	} {
		got := server.URI(c.addr, c.tls, c.export)
		if got != c.want {
			t.Errorf("%s, want %s", got, c.want)
		}
		u, err := nbd.ParseURI(got)
		if err != nil || u.Export != c.export || u.TLS != c.tls {
			t.Errorf("%s is read as %+v, %v", got, u, err)
		}
	}
}

// TestNoFiles lets the process run out of file descriptors while clients connect.
func TestNoFiles(t *testing.T) {
	l, err := server.Listen(t.Context(), "unix:"+socketPath(t))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	failing := &failingListener{Listener: l, errs: []error{unix.EMFILE, &net.OpError{Op: "accept", Err: os.NewSyscallError("accept4", unix.ENFILE)}}}
	done := make(chan error, 1)
	go func() { done <- newServer(t, one("", newDisk(64<<10)), server.Options{}).Serve(ctx, failing) }()
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	(&client{t: t, Conn: conn}).greet(3)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	broken := &failingListener{Listener: l, errs: []error{errors.New("broken")}}
	if err := newServer(t, one("", newDisk(64<<10)), server.Options{}).Serve(t.Context(), broken); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("a broken listener: %v", err)
	}
}

// TestBrokenListener breaks a listener while a client is connected. Serve must return the error
// without waiting for the client to disconnect.
func TestBrokenListener(t *testing.T) {
	l, err := server.Listen(t.Context(), "unix:"+socketPath(t))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() // the connection stays open until the server has ended
	broken := &failingListener{Listener: l, good: 1, errs: []error{errors.New("broken")}}
	if err := newServer(t, one("", newDisk(64<<10)), server.Options{}).Serve(t.Context(), broken); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("a broken listener: %v", err)
	}
}

type failingListener struct {
	net.Listener
	good int // number of calls that succeed before errs are returned
	errs []error
}

func (l *failingListener) Accept() (net.Conn, error) {
	if l.good > 0 {
		l.good--
	} else if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return nil, err
	}
	return l.Listener.Accept()
}
