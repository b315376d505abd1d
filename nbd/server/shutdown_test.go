package server_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
)

// TestShutdown shuts the server down while requests are in progress.
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
			// An incomplete request cannot be executed, and must not affect the others.
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
			busy.closed() // the incomplete write gets no reply
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

// TestShutdownLeavesUnanswered shuts the server down while requests wait that were not started.
// They must get no reply, so that the client can send them to the next server.
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

// hung is a disk whose calls wait for the end of its context and then return fail.
type hung struct {
	*disk
	ctx   context.Context
	fail  error // nil: calls return the cause of the context
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

func (h hung) ReadAt([]byte, int64) (int, error) { return 0, h.wait() }

func (h hung) WriteAt([]byte, int64) (int, error) { return 0, h.wait() }

func (h hung) Flush(context.Context) error { return h.wait() }

type hungExports struct {
	server.Fixed
	fail  error
	begun chan<- struct{} // receives a value for each call that starts
}

func (e hungExports) Open(ctx context.Context, _ string) (source.Disk, error) {
	return hung{newDisk(64 << 10), ctx, e.fail, e.begun}, nil
}

// TestGrace shuts the server down while a disk hangs. A request that fails because of the
// shutdown must get no reply. Only the failure of a flush is reported if it has another reason,
// because the next server could not report it.
func TestGrace(t *testing.T) {
	for _, c := range []struct {
		name string
		cmd  nbd.Command
		n    uint32
		fail error
		want nbd.Errno // error number in the reply; 0: there is no reply
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

// TestFailsWhileEnding lets a disk fail during the shutdown for a reason of its own. The client
// must get the error.
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

// TestEndWithStuckClients shuts the server down while many clients take no replies. All
// connections must end, also those that wait when the context of disks ends.
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

// TestEndOfGivenConnections shuts down a server that has a listener and also serves a connection
// with ServeConn, as socket activation can pass both. Serve must return at once, because the
// listener has accepted no connection. The other connection must get the grace period for its
// requests, and end after it if its client takes no replies.
func TestEndOfGivenConnections(t *testing.T) {
	// begin starts a server with a connection for ServeConn and a listener to which nobody
	// connects.
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

// unclosable is a disk whose last flush, in Close, fails.
type unclosable struct{ *disk }

func (unclosable) Close() error { return unix.EIO }

type unclosableExports struct{ server.Fixed }

func (unclosableExports) Open(context.Context, string) (source.Disk, error) {
	return unclosable{newDisk(64 << 10)}, nil
}

// TestCloseFails checks that Server.Err returns the error of closing a writable disk, since no
// client learns of it.
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

// heldExports has a disk whose reads send to begun and then wait for release, or for the end of
// the context of the disk.
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

// enteredOverTLS returns a client in the transmission phase that uses TLS over conn with the
// certificates in dir, and has chosen the export without a name.
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

// TestSlowWriteOverTLS interrupts the data of a write in the middle of a TLS record, until the
// server has replaced its buffer by a smaller one.
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

// TestEndOverTLS shuts the server down while a client does not read, so that the server cannot
// send close_notify. The server must not wait longer than it waits for the sending of replies.
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
