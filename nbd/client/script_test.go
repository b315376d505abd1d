package client

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// greetingOf returns a fakeGreeting for a disk of size bytes.
func greetingOf(size int64, flags nbd.TransmissionFlags, sizes ...nbd.BlockSizes) []byte {
	b := be(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(3),
		rep(nbd.OptStructuredReply, nbd.RepAck, nil),
		rep(nbd.OptSetMetaContext, nbd.RepMetaContext, be(uint32(fakeContext), nbd.BaseAllocation)),
		rep(nbd.OptSetMetaContext, nbd.RepAck, nil),
		rep(nbd.OptGo, nbd.RepInfo, be(uint16(nbd.InfoExport), uint64(size), uint16(nbd.HasFlags|flags))))
	for _, s := range sizes {
		b = append(b, rep(nbd.OptGo, nbd.RepInfo, s.Append(be(uint16(nbd.InfoBlockSize))))...)
	}
	return append(b, rep(nbd.OptGo, nbd.RepAck, nil)...)
}

// script is a server that sends a greeting and then answers each request with the result of a
// function. When the function returns nil, the server closes the connection.
type script struct {
	*server
	ended chan struct{} // closed when the client has disconnected

	mu   sync.Mutex
	took []string // the requests that were received
}

func (s *script) requests() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]string(nil), s.took...)
}

// play starts a script and connects a client to it.
func play(t testing.TB, greeting []byte, answer func(r nbd.Request, data []byte) []byte) *script {
	t.Helper()
	return playUntil(t, greeting, func(r nbd.Request, data []byte) ([]byte, bool) {
		b := answer(r, data)
		return b, b == nil
	})
}

// playUntil is play for a script that closes the connection after the reply marked as last.
func playUntil(t testing.TB, greeting []byte, answer func(r nbd.Request, data []byte) (reply []byte, last bool)) *script {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		ends[i], err = net.FileConn(f)
		f.Close()
		if err != nil {
			t.Fatal(err)
		}
	}
	s := &script{ended: make(chan struct{})}
	go func() {
		defer close(s.ended)
		if err := s.serve(ends[1], greeting, answer); err != nil {
			t.Error(err)
		}
	}()
	t.Cleanup(func() {
		ends[0].Close()
		<-s.ended
	})
	uri, err := nbd.ParseURI("nbd://fake")
	if err != nil {
		t.Fatal(err)
	}
	c, n, err := negotiate(t.Context(), ends[0], uri, nil, time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	s.server = &server{negotiated: n, life: life.Life{Context: t.Context(), Name: "nbd://fake"}, conns: []*conn{c}}
	return s
}

func (s *script) serve(c net.Conn, greeting []byte, answer func(nbd.Request, []byte) ([]byte, bool)) error {
	defer c.Close()
	if _, err := c.Write(greeting); err != nil {
		return err
	}
	if _, err := io.CopyN(io.Discard, c, 4); err != nil {
		return err
	}
	for option := nbd.Option(0); option != nbd.OptGo; {
		var b [16]byte
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return err
		}
		option = nbd.Option(binary.BigEndian.Uint32(b[8:]))
		if _, err := io.CopyN(io.Discard, c, int64(binary.BigEndian.Uint32(b[12:]))); err != nil {
			return err
		}
	}
	for {
		var b [nbd.RequestSize]byte
		if _, err := io.ReadFull(c, b[:]); err != nil {
			return nil // the client has disconnected
		}
		r, err := nbd.ParseRequest(&b)
		if err != nil {
			return err
		}
		var data []byte
		if r.Type == nbd.CmdWrite {
			data = make([]byte, r.Len)
			if _, err := io.ReadFull(c, data); err != nil {
				return nil
			}
		}
		s.mu.Lock()
		s.took = append(s.took, fmt.Sprintf("%v %d %d", r.Type, r.Off, r.Len))
		s.mu.Unlock()
		if r.Type == nbd.CmdDisconnect {
			return nil
		}
		reply, last := answer(r, data)
		if _, err := c.Write(reply); err != nil || last {
			return nil
		}
	}
}

// to sets the cookie of r in chunks, which makes them a reply to r.
func to(r nbd.Request, chunks ...[]byte) []byte {
	for _, c := range chunks {
		binary.BigEndian.PutUint64(c[8:], r.Cookie)
	}
	return bytes.Join(chunks, nil)
}

func done(r nbd.Request, errno nbd.Errno) []byte {
	return nbd.SimpleReply{Errno: errno, Cookie: r.Cookie}.Append(nil)
}

// TestExtentsAround4GiB checks extents whose lengths are near the limit of 32 bits, for
// servers that divide them in different ways.
func TestExtentsAround4GiB(t *testing.T) {
	const most = 1<<32 - 1
	for _, c := range []struct {
		name string
		size int64
		zero func(off int64) (length int64, zero bool) // the extent at off, as the server reports it
		want []source.Extent
	}{
		{"all of it, a byte short of 4 GiB", most, func(int64) (int64, bool) { return most, true },
			[]source.Extent{{Len: most, Kind: source.Zero}}},
		{"all of it, 4 GiB", 1 << 32, func(int64) (int64, bool) { return most, true },
			[]source.Extent{{Len: 1 << 32, Kind: source.Zero}}},
		{"all of it, more", 1<<33 + 512, func(int64) (int64, bool) { return most, true },
			[]source.Extent{{Len: 1<<33 + 512, Kind: source.Zero}}},
		{"an end exactly there", 1 << 33, func(off int64) (int64, bool) {
			if off < 1<<32 {
				return min(1<<32-off, most), true
			}
			return min(1<<33-off, most), false
		}, []source.Extent{{Len: 1 << 32, Kind: source.Zero}, {Off: 1 << 32, Len: 1 << 32}}},
		{"an end a byte before", 1 << 33, func(off int64) (int64, bool) {
			if off < most {
				return most - off, false
			}
			return min(1<<33-off, most), true
		}, []source.Extent{{Len: most}, {Off: most, Len: 1<<33 - most, Kind: source.Zero}}},
		{"little at a time", 3 << 30, func(off int64) (int64, bool) { return 64 << 20, off/(64<<20)%2 == 0 }, nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := play(t, greetingOf(c.size, nbd.ReadOnly), func(r nbd.Request, _ []byte) []byte {
				n, zero := c.zero(int64(r.Off))
				state := nbd.StateHole
				if zero {
					state |= nbd.StateZero
				}
				return to(r, chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), uint32(n), state|1<<20))
			})
			d := &Disk{server: s.server, size: c.size}
			defer d.Close()
			var got []source.Extent
			at := int64(0)
			for e, err := range d.Extents(t.Context(), 0, c.size) {
				if err != nil {
					t.Fatal(err)
				}
				if e.Off != at || e.Len <= 0 {
					t.Fatalf("%+v after %d", e, at)
				}
				if _, zero := c.zero(e.Off); zero != (e.Kind == source.Zero) {
					t.Errorf("%+v: the server says otherwise", e)
				}
				at = e.End()
				if n := len(got); n > 0 && got[n-1].Kind == e.Kind {
					got[n-1].Len += e.Len
				} else {
					got = append(got, e)
				}
			}
			if at != c.size || c.want != nil && fmt.Sprint(got) != fmt.Sprint(c.want) {
				t.Errorf("%v up to %d, want %v", got, at, c.want)
			}
		})
	}
}

// TestCloseAtEveryByte checks that a reply that is cut off at any byte is an error.
func TestCloseAtEveryByte(t *testing.T) {
	content := data(4096)
	replies := map[nbd.Command]func(nbd.Request) []byte{
		nbd.CmdRead: func(r nbd.Request) []byte {
			return to(r, chunk(nbd.ChunkHole, false, uint64(2048), uint32(2048)), chunk(nbd.ChunkData, false, uint64(0), content[:2048]), chunk(nbd.ChunkNone, true))
		},
		nbd.CmdBlockStatus: func(r nbd.Request) []byte {
			return to(r, chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), uint32(512), uint32(0), uint32(fakeSize-512), uint32(3)))
		},
		nbd.CmdWrite:       func(r nbd.Request) []byte { return done(r, 0) },
		nbd.CmdFlush:       func(r nbd.Request) []byte { return to(r, chunk(nbd.ChunkNone, true)) },
		nbd.CmdWriteZeroes: func(r nbd.Request) []byte { return done(r, 0) },
	}
	calls := map[nbd.Command]func(s *script) error{
		nbd.CmdRead:        func(s *script) error { return s.read(make([]byte, 4096), 0) },
		nbd.CmdBlockStatus: func(s *script) error { _, err := s.query(t.Context(), 0, fakeSize); return err },
		nbd.CmdWrite: func(s *script) error {
			_, err := newTarget(s.server, fakeSize, SinkOptions{}).WriteAt(content, 0)
			return err
		},
		nbd.CmdFlush:       func(s *script) error { return newTarget(s.server, fakeSize, SinkOptions{}).Finish(t.Context()) },
		nbd.CmdWriteZeroes: func(s *script) error { return plainTarget(s.server).ZeroAt(t.Context(), 0, 4096) },
	}
	for cmd, reply := range replies {
		t.Run(cmd.String(), func(t *testing.T) {
			whole := len(reply(nbd.Request{}))
			for n := 0; n <= whole; n++ {
				s := playUntil(t, greetingOf(fakeSize, nbd.SendFlush|nbd.SendWriteZeroes), func(r nbd.Request, _ []byte) ([]byte, bool) {
					return reply(r)[:n], n < whole
				})
				hung := time.AfterFunc(time.Minute, func() { panic("a call hangs") })
				err := calls[cmd](s)
				hung.Stop()
				if n == whole && err != nil || n < whole && (!errors.As(err, new(*lostError)) || errors.Is(err, io.EOF) || !strings.Contains(err.Error(), "nbd://fake")) {
					t.Fatalf("%d of %d bytes: %v", n, whole, err)
				}
				if lost := errors.Is(err, sink.ErrLost); lost != (n < whole && cmd != nbd.CmdRead && cmd != nbd.CmdBlockStatus) {
					t.Fatalf("%d of %d bytes: %v: a sink.ErrLost: %v", n, whole, err, lost)
				}
				s.close()
			}
		})
	}
}

// TestWriteReplies checks valid and wrong replies to a write.
func TestWriteReplies(t *testing.T) {
	for _, c := range []struct {
		name  string
		reply func(r nbd.Request) []byte
		want  string // a part of the error; "": there is none
		lost  bool
	}{
		{"done", func(r nbd.Request) []byte { return done(r, 0) }, "", false},
		{"done in a chunk", func(r nbd.Request) []byte { return to(r, chunk(nbd.ChunkNone, true)) }, "", false},
		{"no space", func(r nbd.Request) []byte { return done(r, nbd.ENOSPC) }, "no space left", false},
		{"no space, with a text", func(r nbd.Request) []byte {
			return to(r, chunk(nbd.ChunkError, true, uint32(28), uint16(4), "full"))
		}, "(ENOSPC): full", false},
		{"shutting down", func(r nbd.Request) []byte { return done(r, nbd.ESHUTDOWN) }, "shutting down", true},
		{"cookie", func(r nbd.Request) []byte { r.Cookie += 1 << 40; return done(r, 0) }, "cookie 0x10000000001", false},
		{"data", func(r nbd.Request) []byte { return to(r, chunk(nbd.ChunkData, true, uint64(0), data(512))) }, "chunk type 1 does not belong", false},
		{"hole", func(r nbd.Request) []byte { return to(r, chunk(nbd.ChunkHole, true, uint64(0), uint32(512))) }, "chunk type 2 does not belong", false},
		{"status", func(r nbd.Request) []byte {
			return to(r, chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), uint32(512), uint32(0)))
		}, "chunk type 5 does not belong", false},
		{"twice", func(r nbd.Request) []byte { return append(done(r, 0), done(r, 0)...) }, "", false},
		{"closed", func(nbd.Request) []byte { return nil }, "closed the connection", true},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := play(t, greetingOf(fakeSize, 0), func(r nbd.Request, _ []byte) []byte { return c.reply(r) })
			d := plainTarget(s.server)
			_, err := d.WriteAt(data(512), 0)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "nbd://fake: write [0, 512)")) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if errors.Is(err, sink.ErrLost) != c.lost {
				t.Errorf("%v, want a sink.ErrLost: %v", err, c.lost)
			}
			if c.name == "twice" {
				if _, err := d.WriteAt(data(512), 0); err == nil || !strings.Contains(err.Error(), "cookie") {
					t.Errorf("the write after a reply that came twice: %v", err)
				}
			}
			d.Abort()
			<-s.ended
			if took := s.requests(); c.name == "shutting down" && took[len(took)-1] != "disconnect 0 0" {
				t.Errorf("%q, want a disconnect at the end", took)
			}
		})
	}
}

// TestSilenceInReply checks that a server that stops in the middle of a reply causes a timeout.
func TestSilenceInReply(t *testing.T) {
	s := play(t, greetingOf(fakeSize, 0), func(r nbd.Request, _ []byte) []byte {
		return to(r, chunk(nbd.ChunkData, true, uint64(0), data(4096)))[:100]
	})
	defer s.close()
	s.conns[0].timeout = 10 * time.Millisecond
	if err := s.read(make([]byte, 4096), 0); !errors.As(err, new(*lostError)) || !strings.Contains(err.Error(), "no reply to read [0, 4096) within 10ms") {
		t.Error(err)
	}
}

// TestGreatestSize checks that sizes near the limit of 63 bits do not overflow, and that larger
// sizes are an error.
func TestGreatestSize(t *testing.T) {
	for _, size := range []int64{-1, -1 << 63} {
		if _, err := open(t, greetingOf(size, 0), nil); err == nil || !strings.Contains(err.Error(), "size of the export: ") || !source.IsPermanent(err) {
			t.Errorf("%d: %v", uint64(size), err)
		}
	}
	const size = 1<<63 - 1
	s := play(t, greetingOf(size, 0), func(r nbd.Request, _ []byte) []byte {
		if r.Off > size || r.Off+uint64(r.Len) > size {
			t.Errorf("%+v", r)
		}
		return to(r, chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), r.Len, uint32(3)))
	})
	d := &Disk{server: s.server, size: s.size}
	defer d.Close()
	n := int64(0)
	for e, err := range d.Extents(t.Context(), size-3*window, 3*window) {
		if err != nil {
			t.Fatal(err)
		}
		n += e.Len
	}
	if n != 3*window {
		t.Errorf("extents of %d bytes, want %d", n, int64(3*window))
	}
}

// TestOddSize checks that opening fails if the size of the export is not a multiple of the
// server's minimum block and the server refuses to read the end.
func TestOddSize(t *testing.T) {
	const size, block = 10*4096 + 777, 4096
	sizes := nbd.BlockSizes{Min: block, Preferred: block, Max: 1 << 20}
	for _, c := range []struct {
		name  string
		reply func(r nbd.Request) []byte
		size  int64
		want  string
	}{
		{"refused", func(r nbd.Request) []byte { return failed(r, nbd.EINVAL) }, size, "cannot read the last 777 bytes of the export: its size of 41737 bytes is not a multiple of the server's minimum block size of 4096 bytes: the server says: invalid request"},
		{"given", func(r nbd.Request) []byte { return to(r, chunk(nbd.ChunkData, true, r.Off, data(int(r.Len)))) }, size, ""},
		{"failed", func(r nbd.Request) []byte { return failed(r, nbd.EIO) }, size, ""},
		{"lost", func(r nbd.Request) []byte { return nil }, size, "read [40960, 41737): connection lost"},
		{"even", func(r nbd.Request) []byte { return failed(r, nbd.EINVAL) }, 10 * block, ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := play(t, greetingOf(c.size, 0, sizes), func(r nbd.Request, _ []byte) []byte { return c.reply(r) })
			defer s.disconnect()
			err := s.checkTail()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q", err, c.want)
			}
			if c.name == "even" && len(s.requests()) > 0 {
				t.Errorf("%q for an even size", s.requests())
			}
		})
	}
}

// TestNoSocketIsNotForever checks that a missing socket is worth a retry: a server that restarts
// creates its socket again.
func TestNoSocketIsNotForever(t *testing.T) {
	uri, err := nbd.ParseURI("nbd+unix:///?socket=" + t.TempDir() + "/none")
	if err != nil {
		t.Fatal(err)
	}
	_, err = Open(t.Context(), uri, Options{})
	var h interface{ Hint() string }
	if err == nil || source.IsPermanent(err) || !errors.As(err, &h) || !strings.Contains(err.Error(), "there is no socket") {
		t.Errorf("%v: permanent %v", err, source.IsPermanent(err))
	}
}

// TestReplyBeforeSent checks that a call ends if its reply arrives before the writing goroutine
// has recorded the sending, also if no goroutine waits for the call.
func TestReplyBeforeSent(t *testing.T) {
	here, there := net.Pipe()
	defer there.Close()
	c := newConn(here, here, negotiated{}, time.Minute)
	k := &call{conn: c, cookie: 1 << 40, done: make(chan error, 1)}
	c.slots <- struct{}{}
	c.load.Add(1)
	c.mu.Lock()
	c.pending[k.cookie] = k
	c.mu.Unlock()
	c.markReplied(k, nil)
	c.markSent(k)
	c.fail(net.ErrClosed)
	c.disconnect() // must not wait for calls whose callers stopped waiting
	if err := <-k.done; err != nil || len(c.slots) != 0 || c.load.Load() != 0 {
		t.Errorf("%v, %d slots taken, load %d", err, len(c.slots), c.load.Load())
	}
}
