package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"vddkcp/nbd"
	"vddkcp/nbd/server"
	"vddkcp/source"
	"vddkcp/source/sourcetest"
)

// TestVanishes has clients that ask for much, take nothing and leave, beside
// one that must not notice.
func TestVanishes(t *testing.T) {
	path, want := sparseFile(t, 8<<20)
	for name, d := range map[string]source.Disk{"memory": newDisk(8 << 20), "file": openRaw(t, path)} {
		t.Run(name, func(t *testing.T) {
			s := newServer(t, one("", d), server.Options{})
			good := ready(t, s, "", true)
			for range 20 {
				c := ready(t, s, "", true)
				for i := range 100 {
					c.send(nbd.CmdRead, 0, uint64(i)*4096, 256<<10, nil)
				}
				good.reads(want, 0, 1<<20)
				c.Close()
				good.reads(want, 4<<20, 4096)
			}
		})
	}
}

// TestHogs has more clients that take nothing than fill the memory for more
// than first pieces: others get theirs, also at length.
func TestHogs(t *testing.T) {
	d := newDisk(8 << 20)
	s := newServer(t, one("", d), server.Options{Memory: 16 << 20})
	for range 6 {
		c := ready(t, s, "", true)
		for range 40 {
			c.send(nbd.CmdRead, 0, 4<<20, 4<<20, nil)
		}
	}
	good := ready(t, s, "", true)
	good.reads(d.Bytes, 0, 8<<20)
	for range 10 {
		good.reads(d.Bytes, 4<<20, 64<<10)
	}
}

// TestStalled has clients that take nothing, so many that no memory is left
// even for first pieces. They are ended when others have waited a while.
func TestStalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &sourcetest.Memory{Bytes: content(8 << 20)}
		s := newServer(t, one("", d), server.Options{Memory: 4 << 20})
		var served sync.WaitGroup
		dialPipe := func() *client {
			ours, theirs := net.Pipe()
			served.Go(func() { s.ServeConn(t.Context(), theirs) })
			c := &client{t: t, Conn: ours}
			c.greet(3)
			c.structure()
			c.enter("")
			return c
		}
		var hogs []*client
		for range 4 {
			c := dialPipe()
			c.send(nbd.CmdRead, 0, 4<<20, 1<<20, nil)
			hogs = append(hogs, c)
		}
		synctest.Wait()
		start := time.Now()
		good := dialPipe()
		good.reads(d.Bytes, 4<<20, 1<<20)
		if waited := time.Since(start); waited < 20*time.Second || waited > time.Minute {
			t.Errorf("waited %v", waited)
		}
		good.reads(d.Bytes, 4<<20, 1<<20)
		// A client that takes nothing harms nobody while nobody waits.
		idle := dialPipe()
		idle.send(nbd.CmdRead, 0, 4<<20, 512, nil)
		time.Sleep(time.Hour)
		if a := idle.receive(4<<20, 512); a.errno != 0 {
			t.Error(a.errno)
		}
		for _, c := range append(hogs, good, idle) {
			c.Close()
		}
		served.Wait()
	})
}

// TestSendsWithoutTaking sends more than is worked on at once before it takes
// the first reply.
func TestSendsWithoutTaking(t *testing.T) {
	d := newDisk(8 << 20)
	c := ready(t, newServer(t, one("", d), server.Options{}), "", true)
	for range 100 {
		c.send(nbd.CmdRead, 0, 0, 256<<10, nil)
	}
	for range 100 {
		if a := c.receive(0, 256<<10); a.errno != 0 || !bytes.Equal(a.data, d.Bytes[:256<<10]) {
			t.Fatal(a.errno)
		}
	}
}

// TestManyConnections bounds what idle connections take.
func TestManyConnections(t *testing.T) {
	const n = 1000
	d := newDisk(1 << 20)
	s := newServer(t, one("", d), server.Options{})
	heap := func() uint64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return m.HeapInuse + m.StackInuse
	}
	before := heap()
	clients := make([]*client, n)
	for i := range clients {
		clients[i] = ready(t, s, "", true)
		clients[i].reads(d.Bytes, 0, 4096)
	}
	// The test's own ends are in it too.
	if got := heap() - before; got > 48<<20 {
		t.Errorf("%d idle connections take %d KiB", n, got>>10)
	}
	clients[n/2].reads(d.Bytes, 0, 1<<20)
}

// TestMemoryBound measures what requests in work take, of clients that take
// nothing.
func TestMemoryBound(t *testing.T) {
	if testing.Short() {
		t.Skip("it reads much")
	}
	d := sourcetest.Pattern(1<<30, source.Extent{Len: 1 << 30})
	s := newServer(t, one("", d), server.Options{})
	heap := func() int64 {
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapSys - m.HeapReleased)
	}
	debug.FreeOSMemory()
	before := heap()
	var clients []*client
	for range 16 {
		c := ready(t, s, "", true)
		clients = append(clients, c)
		for i := range 64 {
			c.send(nbd.CmdRead, 0, uint64(i)<<20, 256<<10, nil)
		}
	}
	var all sync.WaitGroup
	for _, c := range clients {
		all.Go(func() {
			for range 64 {
				if _, err := io.CopyN(io.Discard, c, nbd.ChunkSize+8+256<<10); err != nil {
					t.Error(err)
				}
			}
		})
	}
	all.Wait()
	if got := heap() - before; !raceEnabled && got > 112<<20 {
		t.Errorf("%d MiB of heap", got>>20)
	}
}

// serving is a server on a listener.
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

// socketPath is a path that is short enough for a socket.
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

// TestShutdown ends the server while requests are in work.
func TestShutdown(t *testing.T) {
	for name, address := range map[string]string{"unix": "unix:" + socketPath(t), "tcp": "tcp://127.0.0.1:0"} {
		t.Run(name, func(t *testing.T) {
			held, begun := make(chan struct{}), make(chan struct{}, 10)
			d := newDisk(1 << 20)
			d.OnRead = func(int64, int) error { begun <- struct{}{}; <-held; return nil }
			s := serve(t, one("", d), server.Options{Writable: true}, address)
			idle, busy := s.dial(t, true), s.dial(t, true)
			for range 4 {
				busy.send(nbd.CmdRead, 0, 0, 512, nil)
			}
			for range 4 {
				<-begun
			}
			// What is not whole can't be done, and must not spoil the rest.
			busy.write(nbd.Request{Type: nbd.CmdWrite, Len: 4096}.Append(nil), []byte("half"))
			s.end()
			idle.closed()
			if c, err := net.Dial(s.Addr().Network(), s.Addr().String()); err == nil {
				(&client{t: t, Conn: c}).closed()
			}
			close(held)
			refused := 0
			for range 5 {
				if a := busy.receive(0, 512); a.errno == nbd.ESHUTDOWN && a.cookie == 0 {
					refused++
				} else if a.errno != 0 || !bytes.Equal(a.data, d.Bytes[:512]) {
					t.Errorf("%v", a.errno)
				}
			}
			if refused != 1 {
				t.Errorf("%d were refused, want the write", refused)
			}
			busy.closed()
			if err := <-s.done; err != nil {
				t.Error(err)
			}
			s.done <- nil
			if name == "unix" {
				if _, err := os.Stat(s.Addr().String()); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("the socket is still there: %v", err)
				}
			}
		})
	}
}

// TestShutdownRefuses ends the server when requests have come that are not
// begun.
func TestShutdownRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		held := make(chan struct{})
		d := newDisk(1 << 20)
		d.OnRead = func(int64, int) error { <-held; return nil }
		s := newServer(t, one("", d), server.Options{Writable: true})
		ours, theirs := net.Pipe()
		ctx, cancel := context.WithCancel(t.Context())
		served := make(chan struct{})
		go func() { s.ServeConn(ctx, theirs); close(served) }()
		c := &client{t: t, Conn: ours}
		c.greet(3)
		c.enter("")
		c.write(bytes.Repeat(nbd.Request{Type: nbd.CmdRead, Len: 512}.Append(nil), 100))
		synctest.Wait()
		cancel()
		synctest.Wait()
		close(held)
		refused := 0
		for i := range 100 {
			switch a := c.receive(0, 512); a.errno {
			case 0:
			case nbd.ESHUTDOWN:
				refused++
			default:
				t.Errorf("request %d: %v", i, a.errno)
			}
		}
		if refused < 30 || refused > 36 {
			t.Errorf("%d of 100 refused, want those beyond 64", refused)
		}
		c.closed()
		<-served
	})
}

// hung is a disk whose reads end with its context.
type hung struct {
	*sourcetest.Memory
	ctx context.Context
}

func (h hung) ReadAt([]byte, int64) (int, error) {
	<-h.ctx.Done()
	return 0, fmt.Errorf("read: %w", context.Cause(h.ctx))
}

type hungExports struct{ server.Fixed }

func (hungExports) Open(ctx context.Context, _ string) (source.Disk, error) {
	return hung{&sourcetest.Memory{Bytes: make([]byte, 4096)}, ctx}, nil
}

// TestGrace ends the server while a disk hangs, and while a client takes
// nothing.
func TestGrace(t *testing.T) {
	e := hungExports{server.Fixed{{}}}
	s := serve(t, e, server.Options{Grace: 20 * time.Millisecond}, "unix:"+socketPath(t))
	c := s.dial(t, true)
	c.send(nbd.CmdRead, 0, 0, 512, nil)
	c.do(nbd.CmdCache, 0, 0, 1, nil) // the read is in work now
	s.end()
	if a := c.receive(0, 512); a.errno != nbd.ESHUTDOWN {
		t.Errorf("%v, want ESHUTDOWN", a.errno)
	}
	c.closed()

	s = serve(t, one("", newDisk(32<<20)), server.Options{Grace: 20 * time.Millisecond}, "unix:"+socketPath(t))
	c = s.dial(t, true)
	c.send(nbd.CmdRead, 0, 0, 32<<20, nil)
	c.full(nbd.ChunkSize)
	s.end()
	if err := <-s.done; err != nil {
		t.Error(err)
	}
	s.done <- nil
}

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

// TestNoFiles runs out of files while others connect.
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

type failingListener struct {
	net.Listener
	errs []error
}

func (l *failingListener) Accept() (net.Conn, error) {
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return nil, err
	}
	return l.Listener.Accept()
}
