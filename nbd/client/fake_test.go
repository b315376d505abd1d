package client

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// fake is the connection to a server that sends fixed bytes: first a greeting, and replies as
// soon as the client has sent a request.
type fake struct {
	greeting, replies *bytes.Reader
	asked, closed     chan struct{}
	ask, close        sync.Once
}

func newFake(greeting, replies []byte) *fake {
	return &fake{greeting: bytes.NewReader(greeting), replies: bytes.NewReader(replies), asked: make(chan struct{}), closed: make(chan struct{})}
}

func (f *fake) Read(p []byte) (int, error) {
	if f.greeting.Len() > 0 {
		return f.greeting.Read(p)
	}
	select {
	case <-f.asked:
		return f.replies.Read(p)
	case <-f.closed:
		return 0, net.ErrClosed
	}
}

func (f *fake) Write(p []byte) (int, error) {
	if len(p) >= 4 && binary.BigEndian.Uint32(p) == nbd.RequestMagic {
		f.ask.Do(func() { close(f.asked) })
	}
	return len(p), nil
}

func (f *fake) Close() error                     { f.close.Do(func() { close(f.closed) }); return nil }
func (f *fake) LocalAddr() net.Addr              { return nil }
func (f *fake) RemoteAddr() net.Addr             { return nil }
func (f *fake) SetDeadline(time.Time) error      { return nil }
func (f *fake) SetReadDeadline(time.Time) error  { return nil }
func (f *fake) SetWriteDeadline(time.Time) error { return nil }

const (
	fakeSize    = 1 << 20
	fakeContext = 9
)

func be(values ...any) []byte {
	var b []byte
	for _, v := range values {
		switch v := v.(type) {
		case string:
			b = append(b, v...)
		case []byte:
			b = append(b, v...)
		default:
			b, _ = binary.Append(b, binary.BigEndian, v)
		}
	}
	return b
}

func rep(o nbd.Option, t nbd.OptionReplyType, data []byte) []byte {
	return append(nbd.OptionReply{Option: o, Type: t, Len: uint32(len(data))}.Append(nil), data...)
}

// fakeGreeting returns the messages of a server that accepts all options.
func fakeGreeting() []byte {
	return be(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(3),
		rep(nbd.OptStructuredReply, nbd.RepAck, nil),
		rep(nbd.OptSetMetaContext, nbd.RepMetaContext, be(uint32(fakeContext), nbd.BaseAllocation)),
		rep(nbd.OptSetMetaContext, nbd.RepAck, nil),
		rep(nbd.OptGo, nbd.RepInfo, be(uint16(nbd.InfoExport), uint64(fakeSize), uint16(nbd.HasFlags|nbd.SendFlush|nbd.SendWriteZeroes))),
		rep(nbd.OptGo, nbd.RepAck, nil))
}

func chunk(t nbd.ChunkType, done bool, payload ...any) []byte {
	p := be(payload...)
	var flags uint16
	if done {
		flags = nbd.ChunkDone
	}
	return append(nbd.Chunk{Flags: flags, Type: t, Cookie: 1, Len: uint32(len(p))}.Append(nil), p...)
}

// open returns a server with one connection, to a fake.
func open(t testing.TB, greeting, replies []byte) (*server, error) {
	uri, err := nbd.ParseURI("nbd://fake")
	if err != nil {
		t.Fatal(err)
	}
	f := newFake(greeting, replies)
	if len(greeting) < len(fakeGreeting()) {
		f.ask.Do(func() { close(f.asked) }) // let the fake send its replies and end
	}
	c, n, err := negotiate(t.Context(), f, uri, nil, time.Minute)
	if err != nil {
		return nil, err
	}
	return &server{negotiated: n, life: life.Life{Context: t.Context(), Name: "nbd://fake"}, conns: []*conn{c}}, nil
}

func data(n int) []byte { return bytes.Repeat([]byte{7}, n) }

// TestContextViolations checks the errors for wrong replies to SET_META_CONTEXT.
func TestContextViolations(t *testing.T) {
	const o = nbd.OptSetMetaContext
	context := rep(o, nbd.RepMetaContext, be(uint32(fakeContext), nbd.BaseAllocation))
	for _, c := range []struct {
		name    string
		replies []byte
		want    string
	}{
		{"type", rep(o, nbd.RepServer, be(uint32(0))), "with 4 bytes of data, want META_CONTEXT, ACK or an error"},
		{"short", rep(o, nbd.RepMetaContext, be(uint16(1))), "found META_CONTEXT with 2 bytes of data, want at least 4 bytes"},
		{"name", rep(o, nbd.RepMetaContext, be(uint32(1), "x:y")), `found the metadata context "x:y", want the metadata context "base:allocation"`},
		{"second", be(context, context), "found a second META_CONTEXT"},
	} {
		t.Run(c.name, func(t *testing.T) {
			greeting := be(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(3), rep(nbd.OptStructuredReply, nbd.RepAck, nil), c.replies)
			if _, err := open(t, greeting, nil); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v, want %q", err, c.want)
			}
		})
	}
}

// TestReadViolations checks the errors for wrong replies to a read of [4096, 8192).
func TestReadViolations(t *testing.T) {
	cat := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	wrongCookie := chunk(nbd.ChunkData, true, uint64(4096), data(4096))
	wrongCookie[15] = 77
	for _, c := range []struct {
		name    string
		replies []byte
		want    string
	}{
		{"cookie", wrongCookie, "cookie 0x4d"},
		{"magic", be("GARBAGE!"), "found a reply that begins with 0x47415242"},
		{"simple", nbd.SimpleReply{Cookie: 1}.Append(nil), "want a structured reply"},
		{"missing", cat(chunk(nbd.ChunkData, true, uint64(4096), data(4095))), "bytes [8191, 8192) are missing"},
		{"missing first", chunk(nbd.ChunkData, true, uint64(4608), data(3584)), "bytes [4096, 4608) are missing"},
		{"nothing", chunk(nbd.ChunkNone, true), "bytes [4096, 8192) are missing"},
		{"none not last", chunk(nbd.ChunkNone, false), "last chunk"},
		{"before", chunk(nbd.ChunkData, true, uint64(4095), data(10)), "inside the range of the request"},
		{"after", chunk(nbd.ChunkData, true, uint64(8191), data(2)), "inside the range of the request"},
		{"far", chunk(nbd.ChunkData, true, uint64(1<<64-5), data(10)), "inside the range of the request"},
		{"absurd", nbd.Chunk{Type: nbd.ChunkData, Cookie: 1, Len: 1<<32 - 1}.Append(nil)[:20:20], "cannot read the reply"},
		{"absurd with offset", be(nbd.Chunk{Type: nbd.ChunkData, Cookie: 1, Len: 1<<32 - 1}.Append(nil), uint64(4096)), "inside the range of the request"},
		{"overlap", cat(chunk(nbd.ChunkData, false, uint64(4096), data(512)), chunk(nbd.ChunkData, false, uint64(4607), data(512))), "repeats bytes [4607, 4608)"},
		{"overlap below", cat(chunk(nbd.ChunkData, false, uint64(4608), data(512)), chunk(nbd.ChunkData, false, uint64(4096), data(513))), "repeats bytes [4608, 4609)"},
		{"twice", cat(chunk(nbd.ChunkHole, false, uint64(4096), uint32(4096)), chunk(nbd.ChunkData, true, uint64(4096), data(4096))), "repeats bytes"},
		{"empty data", chunk(nbd.ChunkData, true, uint64(4096)), "want at least 9"},
		{"empty hole", chunk(nbd.ChunkHole, true, uint64(4096), uint32(0)), "empty hole"},
		{"long hole", chunk(nbd.ChunkHole, true, uint64(4096), uint32(4096), "x"), "want 12"},
		{"hole outside", chunk(nbd.ChunkHole, true, uint64(4096), uint32(1<<31)), "inside the range of the request"},
		{"status", chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), uint32(1), uint32(0)), "type 5"},
		{"unknown type", chunk(99, true), "type 99"},
		{"error 0", chunk(nbd.ChunkError, true, uint32(0), uint16(0)), "error number 0"},
		{"error text past the chunk", chunk(nbd.ChunkError, true, uint32(5), uint16(9), "short"), "error text of 9"},
		{"error text too long", chunk(nbd.ChunkError, true, uint32(5), uint16(5000), strings.Repeat("x", 5000)), "at most 4096"},
		{"error absurd", nbd.Chunk{Type: nbd.ChunkError, Cookie: 1, Len: 1 << 31}.Append(nil), "with a payload of"},
		{"error short", chunk(nbd.ChunkErrorOffset, true, uint32(5), uint16(0)), "want 14"},
		{"error outside", chunk(nbd.ChunkErrorOffset, true, uint32(5), uint16(0), uint64(8192)), "error at offset 8192"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := open(t, fakeGreeting(), c.replies)
			if err != nil {
				t.Fatal(err)
			}
			defer s.close()
			err = s.read(make([]byte, 4096), 4096)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), "nbd://fake: read [4096, 8192)") {
				t.Errorf("%v, want %q", err, c.want)
			}
			if lost := errors.As(err, new(*lostError)); lost == source.IsPermanent(err) {
				t.Errorf("%v: lost %v, permanent %v", err, lost, source.IsPermanent(err))
			}
		})
	}
}

// TestReadReplies checks unusual replies to a read that are valid.
func TestReadReplies(t *testing.T) {
	whole := bytes.Join([][]byte{
		chunk(nbd.ChunkData, false, uint64(7168), data(1024)), chunk(nbd.ChunkHole, false, uint64(5120), uint32(2048)),
		chunk(nbd.ChunkData, false, uint64(4096), data(1024)), chunk(nbd.ChunkNone, true),
	}, nil)
	s, err := open(t, fakeGreeting(), whole)
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	p := bytes.Repeat([]byte{1}, 4096)
	if err := s.read(p, 4096); err != nil {
		t.Fatal(err)
	}
	if want := append(append(data(1024), make([]byte, 2048)...), data(1024)...); !bytes.Equal(p, want) {
		t.Error("chunks in disorder are put together wrongly")
	}

	// A reply that is cut off at any byte must be an error other than io.EOF.
	for n := range len(whole) {
		s, err := open(t, fakeGreeting(), whole[:n])
		if err != nil {
			t.Fatal(err)
		}
		if err := s.read(p, 4096); !errors.As(err, new(*lostError)) || errors.Is(err, io.EOF) {
			t.Fatalf("%d of %d bytes of the reply: %v", n, len(whole), err)
		}
		s.close()
	}
	for n := range len(fakeGreeting()) {
		if s, err := open(t, fakeGreeting()[:n], nil); err == nil || errors.Is(err, io.EOF) {
			t.Fatalf("%d of %d bytes of the greeting: %v, %v", n, len(fakeGreeting()), s, err)
		}
	}

	s, err = open(t, fakeGreeting(), bytes.Join([][]byte{
		chunk(nbd.ChunkErrorOffset, false, uint32(nbd.EIO), uint16(8), "bad \x1bdisk"[:8], uint64(5000)), chunk(nbd.ChunkNone, true)}, nil))
	if err != nil {
		t.Fatal(err)
	}
	defer s.close()
	if err := s.read(p, 4096); !errors.Is(err, nbd.EIO) || !strings.Contains(err.Error(), "at 5000: bad ?dis") || source.IsPermanent(err) {
		t.Errorf("%v", err)
	}
}

func TestStatusReplies(t *testing.T) {
	for _, c := range []struct {
		name    string
		replies []byte
		want    string // a part of the error; "": the first extent must be right
		first   source.Extent
	}{
		{"zero past the end", chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), uint32(1<<31), uint32(3)), "", source.Extent{Len: fakeSize, Kind: source.Zero}},
		{"a hole is not zero", chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), uint32(fakeSize), uint32(1)), "", source.Extent{Len: fakeSize}},
		{"error", chunk(nbd.ChunkError, true, uint32(nbd.EINVAL), uint16(0)), "", source.Extent{Len: fakeSize}},
		{"simple error", nbd.SimpleReply{Errno: nbd.EINVAL, Cookie: 1}.Append(nil), "", source.Extent{Len: fakeSize}},
		{"simple", nbd.SimpleReply{Cookie: 1}.Append(nil), "want a structured reply", source.Extent{}},
		{"empty", chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), uint32(0), uint32(0)), "an extent of 0 bytes", source.Extent{}},
		{"no extents", chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext)), "with a payload of", source.Extent{}},
		{"odd length", chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), uint64(1), uint16(1)), "with a payload of", source.Extent{}},
		{"two past the end", chunk(nbd.ChunkBlockStatus, true, uint32(fakeContext), uint32(fakeSize), uint32(0), uint32(1), uint32(0)), "past the end", source.Extent{}},
		{"another context", chunk(nbd.ChunkBlockStatus, true, uint32(8), uint32(fakeSize), uint32(0)), "context with the ID 8,", source.Extent{}},
		{"nothing", chunk(nbd.ChunkNone, true), "ended without a chunk with extents", source.Extent{}},
		{"twice", bytes.Repeat(chunk(nbd.ChunkBlockStatus, false, uint32(fakeContext), uint32(1), uint32(0)), 2), "found a second chunk with extents", source.Extent{}},
		{"closed", nil, "closed the connection", source.Extent{}},
	} {
		t.Run(c.name, func(t *testing.T) {
			s, err := open(t, fakeGreeting(), c.replies)
			if err != nil {
				t.Fatal(err)
			}
			d := &Disk{server: s, size: fakeSize}
			defer d.Close()
			for e, err := range d.Extents(t.Context(), 0, fakeSize) {
				if c.want == "" && (err != nil || e != c.first) {
					t.Errorf("%+v, %v, want %+v", e, err, c.first)
				}
				if c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
					t.Errorf("%+v, %v, want %q", e, err, c.want)
				}
				break
			}
		})
	}
}

func TestTargetLost(t *testing.T) {
	for _, c := range []struct {
		name    string
		replies []byte
		lost    bool
	}{
		{"closed", nil, true},
		{"an error of the server", nbd.SimpleReply{Errno: nbd.EIO, Cookie: 1}.Append(nil), false},
		{"a violation", be("GARBAGE!"), false},
	} {
		s, err := open(t, fakeGreeting(), c.replies)
		if err != nil {
			t.Fatal(err)
		}
		d := newTarget(s, fakeSize, SinkOptions{})
		if _, err := d.WriteAt(data(512), 0); err == nil || errors.Is(err, sink.ErrLost) != c.lost {
			t.Errorf("%s: %v, want a sink.ErrLost: %v", c.name, err, c.lost)
		}
		if _, err := d.WriteAt(data(512), 0); err == nil {
			t.Errorf("%s: a write after an error succeeds", c.name)
		}
		if err := d.Abort(); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestSilence checks that a call to a server that sends nothing ends with the timeout or with
// the context.
func TestSilence(t *testing.T) {
	uri, _ := nbd.ParseURI("nbd://fake")
	here, there := net.Pipe()
	defer there.Close()
	go io.Copy(io.Discard, there)
	c := newConn(here, here, negotiated{}, time.Millisecond)
	k := &call{cmd: nbd.CmdRead, n: 1, data: data(1)}
	if err := c.start(t.Context(), k); err != nil {
		t.Fatal(err)
	}
	if err := k.wait(t.Context()); err == nil || !strings.Contains(err.Error(), "no reply to read [0, 1) within 1ms") {
		t.Error(err)
	}
	c.disconnect()
	why := errors.New("the operator said stop")
	ctx, stop := context.WithCancelCause(t.Context())
	stop(why)
	here, there = net.Pipe()
	defer there.Close()
	if _, _, err := negotiate(ctx, here, uri, nil, time.Minute); !errors.Is(err, why) {
		t.Error(err)
	}
}
