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
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
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

// pipes serves clients over pipes, whose time a synctest bubble has.
type pipes struct {
	t      *testing.T
	s      *server.Server
	served sync.WaitGroup
	all    []*client
}

func (p *pipes) dial() *client {
	p.t.Helper()
	ours, theirs := net.Pipe()
	p.served.Go(func() { p.s.ServeConn(p.t.Context(), theirs) })
	c := &client{t: p.t, Conn: ours}
	p.all = append(p.all, c)
	c.greet(3)
	c.structure()
	c.enter("")
	return c
}

func (p *pipes) close() {
	for _, c := range p.all {
		c.Close()
	}
	p.served.Wait()
}

// TestStalled has clients that take nothing, or next to nothing, so many that no
// memory is left even for first pieces. Others are served all the same, and
// those clients are ended when others have been short of memory for a while.
func TestStalled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := &sourcetest.Memory{Bytes: content(8 << 20)}
		p := &pipes{t: t, s: newServer(t, one("", d), server.Options{Memory: 4 << 20})}
		var hogs []*client
		for range 4 {
			c := p.dial()
			c.send(nbd.CmdRead, 0, 4<<20, 1<<20, nil)
			hogs = append(hogs, c)
		}
		synctest.Wait()
		good := p.dial()
		served := func() {
			t.Helper()
			start := time.Now()
			good.reads(d.Bytes, 4<<20, 1<<20)
			if waited := time.Since(start); waited > time.Second {
				t.Errorf("waited %v", waited)
			}
		}
		served()
		for range 30 {
			hogs[0].Read(make([]byte, 100)) // it fails when it is ended
			time.Sleep(time.Second)
			served()
		}
		for i, c := range hogs {
			if _, err := io.Copy(io.Discard, c); err != nil {
				t.Errorf("client %d: %v, want the end", i, err)
			}
		}
		// A client that takes nothing harms nobody while nobody waits.
		idle := p.dial()
		idle.send(nbd.CmdRead, 0, 4<<20, 512, nil)
		time.Sleep(time.Hour)
		if a := idle.receive(4<<20, 512); a.errno != 0 {
			t.Error(a.errno)
		}
		p.close()
	})
}

// TestSlowWriters has clients that begin writes and send none or little of their
// data, so many that they would hold all memory. Others are served all the same,
// and what comes late is written.
func TestSlowWriters(t *testing.T) {
	for name, sent := range map[string]int{"nothing": 0, "a byte": 1, "a part": 100_001, "nearly all": 1<<20 - 1} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d := newDisk(8 << 20)
				p := &pipes{t: t, s: newServer(t, one("", d), server.Options{Memory: 4 << 20, Writable: true})}
				data := content(1 << 20)
				var slow []*client
				for range 8 {
					c := p.dial()
					c.write(nbd.Request{Type: nbd.CmdWrite, Cookie: 1, Off: 1<<20 + 1, Len: 1 << 20}.Append(nil), data[:sent])
					slow = append(slow, c)
				}
				for range 60 {
					good := p.dial()
					start := time.Now()
					good.reads(d.settled(), 4<<20, 1<<20)
					if a := good.do(nbd.CmdWrite, 0, 3<<20, 1<<20, data); a.errno != 0 {
						t.Error(a.errno)
					}
					if waited := time.Since(start); waited > 2*time.Second {
						t.Fatalf("waited %v", waited)
					}
					good.Close()
					time.Sleep(time.Second)
				}
				for _, c := range slow {
					c.write(data[sent:])
					if a := c.receive(0, 0); a.errno != 0 || a.cookie != 1 {
						t.Errorf("%v", a)
					}
				}
				if !bytes.Equal(d.settled()[1<<20+1:][:1<<20], data) {
					t.Error("other data are there than were written")
				}
				p.close()
			})
		})
	}
}

// TestDrip writes a byte at a time.
func TestDrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newDisk(1 << 20)
		p := &pipes{t: t, s: newServer(t, one("", d), server.Options{Memory: 4 << 20, Writable: true})}
		c := p.dial()
		data := content(20_000)
		c.write(nbd.Request{Type: nbd.CmdWrite, Off: 5, Len: 20_000}.Append(nil))
		for i := range data {
			time.Sleep(10 * time.Millisecond)
			c.write(data[i : i+1])
		}
		if a := c.receive(0, 0); a.errno != 0 || !bytes.Equal(d.settled()[5:][:len(data)], data) {
			t.Errorf("%v, or other data", a.errno)
		}
		p.close()
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
	heap := func() int64 {
		runtime.GC()
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapInuse + m.StackInuse)
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
			for range 4 {
				if a := busy.receive(0, 512); a.errno != 0 || !bytes.Equal(a.data, d.Bytes[:512]) {
					t.Errorf("%v", a.errno)
				}
			}
			busy.closed() // the write has no reply
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

// TestShutdownLeavesUnanswered ends the server when requests have come that are
// not begun: they get no reply, so that the client can send them to the next
// server.
func TestShutdownLeavesUnanswered(t *testing.T) {
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
		for i := range 64 {
			if a := c.receive(0, 512); a.errno != 0 {
				t.Errorf("request %d: %v", i, a.errno)
			}
		}
		c.closed()
		<-served
	})
}

// hung is a disk whose calls end with its context, and then with fail.
type hung struct {
	*disk
	ctx   context.Context
	fail  error // nil: the context's cause
	begun chan<- struct{}
}

func (h hung) wait() error {
	h.begun <- struct{}{}
	<-h.ctx.Done()
	if h.fail != nil {
		return h.fail
	}
	return fmt.Errorf("hung: %w", context.Cause(h.ctx))
}

func (h hung) ReadAt([]byte, int64) (int, error)  { return 0, h.wait() }
func (h hung) WriteAt([]byte, int64) (int, error) { return 0, h.wait() }
func (h hung) Flush(context.Context) error        { return h.wait() }

type hungExports struct {
	server.Fixed
	fail  error
	begun chan<- struct{} // gets each call
}

func (e hungExports) Open(ctx context.Context, _ string) (source.Disk, error) {
	return hung{newDisk(64 << 10), ctx, e.fail, e.begun}, nil
}

// TestGrace ends the server while a disk hangs. A request that fails because of
// that gets no reply; only a flush that failed by itself is told of, since the
// next server could not know.
func TestGrace(t *testing.T) {
	for _, c := range []struct {
		name string
		cmd  nbd.Command
		n    uint32
		fail error
		want nbd.Errno // 0: no reply
	}{
		{"read", nbd.CmdRead, 512, nil, 0},
		{"read that says something else", nbd.CmdRead, 512, unix.EIO, 0},
		{"write", nbd.CmdWrite, 512, nil, 0},
		{"write that says something else", nbd.CmdWrite, 512, unix.EPIPE, 0},
		{"flush", nbd.CmdFlush, 0, nil, 0},
		{"flush that failed", nbd.CmdFlush, 0, unix.EIO, nbd.EIO},
	} {
		for _, structured := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, structured %v", c.name, structured), func(t *testing.T) {
				killed, begun := make(chan error, 1), make(chan struct{})
				s := serve(t, hungExports{server.Fixed{{}}, c.fail, begun}, server.Options{
					Grace: 20 * time.Millisecond, Writable: true, Kill: func(cause error) { killed <- cause },
				}, "unix:"+socketPath(t))
				k := s.dial(t, structured)
				var data []byte
				if c.cmd == nbd.CmdWrite {
					data = make([]byte, c.n)
				}
				k.send(c.cmd, 0, 0, c.n, data)
				<-begun
				s.end()
				if c.want != 0 {
					if a := k.receive(0, 0); a.errno != c.want {
						t.Errorf("%v, want %v", a.errno, c.want)
					}
				}
				k.closed()
				if cause := <-killed; cause != server.ErrShutdown {
					t.Errorf("killed with %v", cause)
				}
			})
		}
	}
}

// TestFailsWhileEnding has a disk that fails by itself after the server began to
// end: that is an error as ever.
func TestFailsWhileEnding(t *testing.T) {
	held, begun := make(chan struct{}), make(chan struct{})
	d := newDisk(1 << 20)
	d.OnRead = func(int64, int) error { close(begun); <-held; return unix.EIO }
	s := serve(t, one("", d), server.Options{}, "unix:"+socketPath(t))
	c := s.dial(t, true)
	c.send(nbd.CmdRead, 0, 0, 512, nil)
	<-begun
	s.end()
	close(held)
	if a := c.receive(0, 512); a.errno != nbd.EIO {
		t.Errorf("%v, want EIO", a.errno)
	}
	c.closed()
}

// TestEndWithStuckClients ends the server while many clients take nothing: the
// end of the disks' context must not keep any connection from its end.
func TestEndWithStuckClients(t *testing.T) {
	s := serve(t, one("", newDisk(32<<20)), server.Options{Grace: 20 * time.Millisecond}, "unix:"+socketPath(t))
	for range 40 {
		c := s.dial(t, true)
		c.send(nbd.CmdRead, 0, 0, 1<<20, nil)
		c.full(nbd.ChunkSize)
	}
	s.end()
	if err := <-s.done; err != nil {
		t.Error(err)
	}
	s.done <- nil
}

// TestEndOfGivenConnections ends a server that listens and also serves a
// connection that was accepted before, as socket activation can pass both. Serve
// returns at once, since nobody came by the listener; the other connection still
// has the grace for its requests, and ends after it where its client takes
// nothing.
func TestEndOfGivenConnections(t *testing.T) {
	// begin serves a connection, and listens in vain.
	begin := func(t *testing.T, exports server.Exports, o server.Options) (c *client, end func(), served chan struct{}) {
		l, err := server.Listen(t.Context(), "unix:"+socketPath(t))
		if err != nil {
			t.Fatal(err)
		}
		s := newServer(t, exports, o)
		ctx, cancel := context.WithCancel(context.Background())
		ours, theirs := pair(t)
		served = make(chan struct{})
		go func() {
			defer close(served)
			s.ServeConn(ctx, theirs)
		}()
		listened := make(chan error, 1)
		go func() { listened <- s.Serve(ctx, l) }()
		end = func() {
			cancel()
			if err := <-listened; err != nil {
				t.Error(err)
			}
		}
		t.Cleanup(func() {
			cancel()
			ours.Close()
			<-served
		})
		c = &client{t: t, Conn: ours, cookie: 0x1000}
		c.greet(3)
		c.enter("")
		return c, end, served
	}
	t.Run("stuck", func(t *testing.T) {
		c, end, served := begin(t, one("", newDisk(32<<20)), server.Options{Grace: 20 * time.Millisecond})
		c.send(nbd.CmdRead, 0, 0, 16<<20, nil)
		c.full(nbd.SimpleReplySize)
		end()
		<-served
	})
	t.Run("in work", func(t *testing.T) {
		begun, release := make(chan struct{}), make(chan struct{})
		c, end, _ := begin(t, heldExports{server.Fixed{{}}, begun, release}, server.Options{Grace: time.Minute})
		c.send(nbd.CmdRead, 0, 0, 512, nil)
		<-begun
		end()
		close(release)
		if a := c.receive(0, 512); a.errno != 0 {
			t.Errorf("%v", a.errno)
		}
		c.closed()
	})
}

// TestHangsManyTimes has a disk that hangs, and more requests to it than a program
// can have threads. The calls to it are bounded, and another export is served, for
// the same clients too.
func TestHangsManyTimes(t *testing.T) {
	release := make(chan struct{})
	var calls, most atomic.Int64
	hanging := newDisk(1 << 20)
	hanging.OnRead = func(int64, int) error {
		n := calls.Add(1)
		for m := most.Load(); n > m && !most.CompareAndSwap(m, n); m = most.Load() {
		}
		<-release
		calls.Add(-1)
		return nil
	}
	s := newServer(t, server.Fixed{{Export: server.Export{Name: "hangs"}, Disk: hanging}, {Export: server.Export{Name: "good"}, Disk: newDisk(1 << 20)}}, server.Options{})
	const clients = 40
	var stuck []*client
	for range clients {
		c := ready(t, s, "hangs", true)
		for range 64 {
			c.send(nbd.CmdRead, 0, 0, 512, nil)
		}
		c.send(nbd.CmdRead, 0, 0, 0, nil) // no room: it is not read
		stuck = append(stuck, c)
	}
	good := ready(t, s, "good", true)
	for range 100 {
		good.reads(content(1<<20), 0, 64<<10)
	}
	close(release)
	for _, c := range stuck {
		for range 65 {
			h := nbd.ParseChunk((*[nbd.ChunkSize - 4]byte)(c.full(nbd.ChunkSize)[4:]))
			c.full(int(h.Len))
		}
	}
	if n := most.Load(); n > 256+clients {
		t.Errorf("%d calls at once, want at most %d", n, 256+clients)
	}
}

// unclosable is a disk whose last flush, in Close, fails.
type unclosable struct{ *disk }

func (unclosable) Close() error { return unix.EIO }

type unclosableExports struct{ server.Fixed }

func (unclosableExports) Open(context.Context, string) (source.Disk, error) {
	return unclosable{newDisk(64 << 10)}, nil
}

// A disk that was written to and could not be closed is an error of the server: a
// client that writes, and comes back to the next server, does not learn of it.
func TestCloseFails(t *testing.T) {
	for _, writable := range []bool{true, false} {
		s := serve(t, unclosableExports{server.Fixed{{}}}, server.Options{Writable: writable}, "unix:"+socketPath(t))
		s.dial(t, true)
		s.end()
		if err := <-s.done; err != nil {
			t.Error(err)
		}
		s.done <- nil
		if err := s.Err(); errors.Is(err, unix.EIO) != writable {
			t.Errorf("writable %v: %v", writable, err)
		}
	}
}

// heldExports have a disk whose reads tell begun, and wait for release or the
// end of the disk's context.
type heldExports struct {
	server.Fixed
	begun, release chan struct{}
}

func (e heldExports) Open(ctx context.Context, _ string) (source.Disk, error) {
	d := newDisk(64 << 10)
	d.OnRead = func(int64, int) error {
		close(e.begun)
		select {
		case <-e.release:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	return d, nil
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

// TestBrokenListener has a listener that breaks while a client is connected. Serve
// must return the error without waiting for the client to leave.
func TestBrokenListener(t *testing.T) {
	l, err := server.Listen(t.Context(), "unix:"+socketPath(t))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close() // not before the server has ended
	broken := &failingListener{Listener: l, good: 1, errs: []error{errors.New("broken")}}
	if err := newServer(t, one("", newDisk(64<<10)), server.Options{}).Serve(t.Context(), broken); err == nil || !strings.Contains(err.Error(), "broken") {
		t.Errorf("a broken listener: %v", err)
	}
}

type failingListener struct {
	net.Listener
	good int // calls before errs
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

// TestFlood has a host that connects until the server takes no more, and says
// nothing. A client of another host takes the place of its oldest connection;
// connections that have an export stay.
func TestFlood(t *testing.T) {
	s := serve(t, one("", newDisk(64<<10)), server.Options{MaxConnections: 4}, "tcp://127.0.0.1:0")
	from := func(ip string) *client {
		t.Helper()
		d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
		conn, err := d.Dial("tcp", s.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		return &client{t: t, Conn: conn}
	}
	enter := func(c *client) *client {
		t.Helper()
		c.greet(3)
		c.enter("")
		return c
	}
	stays := enter(from("127.0.0.2"))
	var flood []*client
	for range 3 {
		c := from("127.0.0.2")
		c.greet(3)
		flood = append(flood, c)
	}
	from("127.0.0.2").closed()
	first := enter(from("127.0.0.3"))
	flood[0].closed()
	second := enter(from("127.0.0.4"))
	flood[1].closed()
	for _, c := range []*client{stays, first, second} {
		c.reads(content(64<<10), 0, 512)
	}
}

// TestAnnouncedOptions bounds what a client can make the server allocate by the
// length of an option of which it sends nothing.
func TestAnnouncedOptions(t *testing.T) {
	const n = 500
	s := newServer(t, one("", newDisk(64<<10)), server.Options{})
	clients := make([]*client, n)
	for i := range clients {
		clients[i] = dial(t, s, 3)
		clients[i].alive()
	}
	heap := func() int64 {
		runtime.GC()
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int64(m.HeapInuse)
	}
	before := heap()
	for _, c := range clients {
		c.write(nbd.AppendOption(nil, nbd.OptGo, make([]byte, 16<<10))[:16])
	}
	if got := heap() - before; got > n*(4<<10) {
		t.Errorf("%d options that were announced take %d KiB", n, got>>10)
	}
}

// enteredOverTLS returns a client that has the export without a name, through conn
// and TLS with the certificates of dir.
func enteredOverTLS(t *testing.T, conn net.Conn, dir string) *client {
	t.Helper()
	c := &client{t: t, Conn: conn}
	c.greet(3)
	if err := c.secure(dir, false); err != nil {
		t.Fatal(err)
	}
	c.structure()
	c.enter("")
	return c
}

// TestSlowWriteOverTLS has data that stop in the middle of a record of TLS, and
// go on when the server has taken a smaller piece of memory.
func TestSlowWriteOverTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := certificates(t)
		d := newDisk(8 << 20)
		p := &pipes{t: t, s: newServer(t, one("", d), server.Options{TLS: loadTLS(t, dir, false), TLSMode: server.TLSRequire, Writable: true})}
		ours, theirs := net.Pipe()
		p.served.Go(func() { p.s.ServeConn(t.Context(), theirs) })
		slow := &stuttering{Conn: ours}
		c := enteredOverTLS(t, slow, dir)
		data := content(1 << 20)
		slow.pause = 3 * time.Second
		c.write(nbd.Request{Type: nbd.CmdWrite, Off: 4097, Len: 1 << 20}.Append(nil), data)
		slow.pause = 0
		if a := c.receive(0, 0); a.errno != 0 || !bytes.Equal(d.settled()[4097:][:len(data)], data) {
			t.Errorf("%v, or other data", a.errno)
		}
		c.reads(d.settled(), 0, 2<<20)
		p.all = append(p.all, c)
		p.close()
	})
}

// TestEndOverTLS ends the server while a client does not read, so that the server
// cannot send close_notify. The server must wait no longer than for replies.
func TestEndOverTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := certificates(t)
		d := newDisk(64 << 10)
		s := newServer(t, one("", d), server.Options{TLS: loadTLS(t, dir, false), TLSMode: server.TLSRequire})
		ours, theirs := net.Pipe()
		ctx, end := context.WithCancel(t.Context())
		served := make(chan struct{})
		go func() { defer close(served); s.ServeConn(ctx, theirs) }()
		c := enteredOverTLS(t, ours, dir)
		c.reads(d.Bytes, 0, 512)
		start := time.Now()
		end()
		<-served
		if took := time.Since(start); took > time.Second {
			t.Errorf("the end took %v", took)
		}
		ours.Close()
	})
}

// stuttering pauses in the middle of each write.
type stuttering struct {
	net.Conn
	pause time.Duration
}

func (s *stuttering) Write(b []byte) (int, error) {
	if s.pause == 0 || len(b) < 2 {
		return s.Conn.Write(b)
	}
	n, err := s.Conn.Write(b[:len(b)/3])
	if err != nil {
		return n, err
	}
	time.Sleep(s.pause)
	more, err := s.Conn.Write(b[len(b)/3:])
	return n + more, err
}

// TestTLSHandshakeDeadline has clients that begin TLS and do not go on.
func TestTLSHandshakeDeadline(t *testing.T) {
	for name, speak := range map[string]func(c net.Conn){
		"silent": func(net.Conn) {},
		"a byte a second": func(c net.Conn) {
			for _, b := range []byte{22, 3, 1, 2, 0, 1, 0, 1, 252, 3, 3, 0, 0, 0, 0, 0, 0, 0, 0, 0} {
				if _, err := c.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := certificates(t)
				s := newServer(t, one("", newDisk(64<<10)), server.Options{TLS: loadTLS(t, dir, false), TLSMode: server.TLSOn, Handshake: 10 * time.Second})
				ours, theirs := net.Pipe()
				ended := make(chan time.Time, 1)
				start := time.Now()
				go func() {
					s.ServeConn(t.Context(), theirs)
					ended <- time.Now()
				}()
				c := &client{t: t, Conn: ours}
				c.greet(3)
				c.want(nbd.OptStartTLS, nil, nbd.RepAck)
				go io.Copy(io.Discard, ours)
				speak(ours)
				if got := (<-ended).Sub(start); got < 10*time.Second || got > 20*time.Second {
					t.Errorf("it is served for %v", got)
				}
				ours.Close()
			})
		})
	}
}
