package client

import (
	"bytes"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/fuzzseed"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/nbd"
)

// FuzzReply answers a read and a query for extents with random bytes. Both calls must end, and
// a reply that the client accepts must be complete.
func FuzzReply(f *testing.F) {
	status := func(done bool, runs ...uint32) []byte {
		return chunk(nbd.ChunkBlockStatus, done, uint32(fakeContext), be(runs))
	}
	fuzzseed.Add(f,
		chunk(nbd.ChunkData, true, uint64(4096), data(4096)),
		bytes.Join([][]byte{chunk(nbd.ChunkData, false, uint64(4096), data(1024)), chunk(nbd.ChunkHole, true, uint64(5120), uint32(3072))}, nil),
		chunk(nbd.ChunkHole, true, uint64(4096), uint32(4096)),
		chunk(nbd.ChunkNone, true),
		chunk(nbd.ChunkError, true, uint32(5), uint16(3), "bad"),
		chunk(nbd.ChunkErrorOffset, true, uint32(5), uint16(0), uint64(5000)),
		nbd.SimpleReply{Errno: nbd.EIO, Cookie: 1}.Append(nil),
		status(true, 1<<20, 0),
		status(true, 1<<32-1, 3),
		status(false, 4096, 3, 1<<20-4096, 0),
		status(true, 1<<31, 2, 1<<31, 0),
		nbd.Chunk{Type: nbd.ChunkData, Cookie: 1, Len: 1<<32 - 1}.Append(nil),
		bytes.Repeat(chunk(nbd.ChunkData, false, uint64(4096), data(16)), 3),
	)
	f.Fuzz(func(t *testing.T, replies []byte) {
		s, err := open(t, fakeGreeting(), replies)
		if err != nil {
			t.Fatal(err)
		}
		p := bytes.Repeat([]byte{1}, 4096)
		if err := s.read(p, 4096); errors.Is(err, io.EOF) {
			t.Errorf("an end of the disk inside of it: %v", err)
		}
		s.close()
		if s, err = open(t, fakeGreeting(), replies); err != nil {
			t.Fatal(err)
		}
		defer s.close()
		got, err := s.query(t.Context(), 0, fakeSize)
		if err == nil && got == nil {
			t.Error("neither an allocation nor an error")
		}
	})
}

// FuzzGreeting performs a handshake with a server that sends random bytes.
func FuzzGreeting(f *testing.F) {
	whole := fakeGreeting()
	head := be(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(3))
	fuzzseed.Add(f, whole, whole[:16], whole[:18], whole[:40],
		be(uint64(nbd.Magic), uint64(nbd.OptionMagic), uint16(0), uint64(fakeSize), uint16(1), make([]byte, 124)),
		be(uint64(nbd.Magic), uint64(0x00420281861253), uint64(fakeSize), uint32(1), make([]byte, 124)),
		be(head, rep(nbd.OptStructuredReply, nbd.RepErrUnsupported, nil), rep(nbd.OptGo, nbd.RepErrUnsupported, []byte("no")), uint64(fakeSize), uint16(1)),
		be(head, rep(nbd.OptStructuredReply, nbd.RepAck, nil), nbd.OptionReply{Option: nbd.OptSetMetaContext, Type: nbd.RepMetaContext, Len: 1<<32 - 1}.Append(nil)),
		be(head, rep(nbd.OptStructuredReply, nbd.RepAck, []byte("data"))),
		be(head, rep(nbd.OptGo, nbd.RepInfo, be(uint16(nbd.InfoExport), uint64(1<<63), uint16(1))), rep(nbd.OptGo, nbd.RepAck, nil)),
		be(head, rep(nbd.OptStructuredReply, nbd.RepErrTLSRequired, nil)),
		[]byte("SSH-2.0-OpenSSH_9.2\r\n"),
	)
	f.Fuzz(func(t *testing.T, greeting []byte) {
		uri, err := nbd.ParseURI("nbd://fake")
		if err != nil {
			t.Fatal(err)
		}
		fake := newFake(greeting, nil)
		fake.ask.Do(func() { close(fake.asked) }) // let the fake send its replies and end
		c, n, err := negotiate(t.Context(), fake, uri, nil, time.Minute)
		if err != nil {
			if errors.Is(err, io.EOF) {
				t.Errorf("an end of file is no reason: %v", err)
			}
			return
		}
		s := &server{negotiated: n, life: life.Life{Context: t.Context(), Name: "nbd://fake"}, conns: []*conn{c}}
		if n.size < 0 {
			t.Errorf("size %d", n.size)
		}
		s.close()
	})
}
