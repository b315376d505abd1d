package server_test

import (
	"bytes"
	"io"
	"net"
	"runtime"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// TestVanishes runs clients that request much data, take none and disconnect. Another client
// must not be affected.
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

// TestHogs runs enough clients that take no replies to fill the memory for further buffers.
// Other clients must still be served, also with long reads.
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

// pipes serves clients over pipes, which work with the fake time of synctest.
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

// TestStalled runs clients that take no or almost no replies and fill all shared memory. Other
// clients must still be served, and the stalled clients must be disconnected after others have
// been short of memory for a while.
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
			hogs[0].Read(make([]byte, 100)) // fails after the server has closed the connection
			time.Sleep(time.Second)
			served()
		}
		for i, c := range hogs {
			if _, err := io.Copy(io.Discard, c); err != nil {
				t.Errorf("client %d: %v, want the end", i, err)
			}
		}
		// A client that takes no replies may stay while no other client waits for memory.
		idle := p.dial()
		idle.send(nbd.CmdRead, 0, 4<<20, 512, nil)
		time.Sleep(time.Hour)
		if a := idle.receive(4<<20, 512); a.errno != 0 {
			t.Error(a.errno)
		}
		p.close()
	})
}

// TestSlowWriters runs clients that start writes and send little or none of the data, enough to
// fill all memory. Other clients must still be served, and data that arrive late must be
// written.
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

// TestDrip sends the data of a write one byte at a time.
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

// TestSendsWithoutTaking sends more requests than the server processes at once before it reads
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

// TestManyConnections checks the memory that idle connections use.
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
	// The memory of the clients in this test is included.
	if got := heap() - before; got > 48<<20 {
		t.Errorf("%d idle connections take %d KiB", n, got>>10)
	}
	clients[n/2].reads(d.Bytes, 0, 1<<20)
}

// TestMemoryBound measures the memory for requests of clients that take no replies.
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

// TestHangsManyTimes sends more requests to a disk that hangs than a program can have threads.
// The server must limit the calls to the disk and still serve another export, also to the same
// clients.
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
		c.send(nbd.CmdRead, 0, 0, 0, nil) // exceeds the limit, so the server does not read it
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

// TestFlood opens idle connections from one host until the server accepts no more. A client of
// another host must replace the oldest of them, and connections that have chosen an export must
// stay.
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

// TestAnnouncedOptions checks the memory that the server allocates for an option whose length a
// client has announced without sending its data.
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

// stuttering is a connection that pauses in the middle of each write.
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

// TestTLSHandshakeDeadline checks that clients that stop within the TLS handshake are
// disconnected.
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
