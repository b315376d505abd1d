package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"math"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/fuzzseed"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// said is the connection of a client that has already sent all its bytes.
type said struct {
	text *bytes.Reader
	mu   sync.Mutex
	got  bytes.Buffer
}

func (c *said) Read(p []byte) (int, error) { return c.text.Read(p) }
func (c *said) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.got.Write(p)
}
func (*said) Close() error                     { return nil }
func (*said) LocalAddr() net.Addr              { return nil }
func (*said) RemoteAddr() net.Addr             { return nil }
func (*said) SetDeadline(time.Time) error      { return nil }
func (*said) SetReadDeadline(time.Time) error  { return nil }
func (*said) SetWriteDeadline(time.Time) error { return nil }

// huge is a disk of more than 4 GiB of zeros. Writes do not change it. Its extents end near
// 4 GiB.
type huge struct{ *sourcetest.Memory }

const hugeSize = 9<<30 + 777

func newHuge() huge {
	return huge{&sourcetest.Memory{Content: zeros{}, Length: hugeSize, ExtentList: []source.Extent{
		{Len: 512}, {Off: 512, Len: 512, Kind: source.Inherited},
		{Off: 1024, Len: 4<<30 - 1025, Kind: source.Zero, Absent: true},
		{Off: 4<<30 - 1, Len: 1}, {Off: 4 << 30, Len: 1, Kind: source.Zero},
		{Off: 4<<30 + 1, Len: 4<<30 + 511}, {Off: 8<<30 + 512, Len: hugeSize - 8<<30 - 512, Kind: source.Zero},
	}}}
}

func (huge) WriteAt(p []byte, _ int64) (int, error)                         { return len(p), nil }
func (huge) ZeroAt(_ context.Context, _, _ int64, _ source.ZeroFlags) error { return nil }
func (huge) Trim(context.Context, int64, int64) error                       { return nil }
func (huge) Flush(context.Context) error                                    { return nil }

// FuzzHandshake sends random bytes in the handshake. The server must send the greeting and
// complete replies until the transmission phase.
func FuzzHandshake(f *testing.F) {
	flags := []byte{0, 0, 0, 3}
	option := func(o nbd.Option, data []byte) []byte { return nbd.AppendOption(nil, o, data) }
	all := func(parts ...[]byte) []byte { return bytes.Join(append([][]byte{flags}, parts...), nil) }
	head := func(o nbd.Option, n uint32) []byte {
		return binary.BigEndian.AppendUint32(option(o, nil)[:12], n)
	}
	sr := option(nbd.OptStructuredReply, nil)
	fuzzseed.Add(f,
		all(sr, option(nbd.OptSetMetaContext, nbd.AppendMetaContext(nil, "", nbd.BaseAllocation)), option(nbd.OptGo, nbd.AppendGo(nil, "", 0, 1, 2, 3, 3, 0x4242))),
		all(option(nbd.OptExportName, []byte("disk"))),
		append([]byte{0, 0, 0, 0}, option(nbd.OptExportName, nil)...),
		append([]byte{0, 0, 0, 1}, option(nbd.OptExportName, []byte("\xff"))...),
		all(option(nbd.OptList, nil), option(nbd.OptList, []byte("x")), option(nbd.OptAbort, nil)),
		all(sr, sr, option(nbd.OptListMetaContext, nbd.AppendMetaContext(nil, "", "base:", "qemu:", "x"))),
		all(option(nbd.OptInfo, []byte("\xff\xff\xff\xff\x00\x00"))),
		all(option(nbd.OptInfo, []byte("\x00\x00\x00\x00\xff\xff"))),
		all(sr, option(nbd.OptSetMetaContext, []byte("\x00\x00\x00\x00\xff\xff\xff\xff\x00\x00\x00\x00"))),
		all(sr, option(nbd.OptSetMetaContext, []byte("\x00\x00\x00\x00\x00\x00\x00\x01\xff\xff\xff\xffba"))),
		all(head(nbd.OptGo, math.MaxUint32)),
		all(head(0x7777, 32<<20)),
		all(option(nbd.OptStartTLS, nil), option(nbd.OptList, nil)),
		[]byte{0x80, 0, 0, 3},
		[]byte("GET / HTTP/1.1\r\n"),
	)
	f.Fuzz(func(t *testing.T, text []byte) {
		s := newServer(t, one("", newHuge()), server.Options{})
		c := &said{text: bytes.NewReader(text)}
		s.ServeConn(t.Context(), c)
		b := c.got.Bytes()
		if len(b) < 18 || binary.BigEndian.Uint64(b) != nbd.Magic {
			t.Fatalf("greeting: %x", b)
		}
		for b = b[18:]; len(b) >= nbd.OptionReplySize; {
			r, err := nbd.ParseOptionReply((*[nbd.OptionReplySize]byte)(b))
			if err != nil {
				return // EXPORT_NAME begins the transmission phase without a reply
			}
			b = b[nbd.OptionReplySize:]
			if uint64(r.Len) > uint64(len(b)) {
				t.Fatalf("%+v, and only %d bytes follow", r, len(b))
			}
			b = b[r.Len:]
			if r.Option == nbd.OptGo && r.Type == nbd.RepAck {
				return
			}
		}
	})
}

// FuzzRequests sends random bytes as requests. The server must answer each complete request
// once, with a valid reply of the right length.
func FuzzRequests(f *testing.F) {
	request := func(c nbd.Command, flags nbd.CommandFlags, off uint64, n uint32) []byte {
		return nbd.Request{Flags: flags, Type: c, Cookie: off ^ uint64(n), Off: off, Len: n}.Append(nil)
	}
	all := func(parts ...[]byte) []byte { return bytes.Join(parts, nil) }
	const most = math.MaxUint32
	fuzzseed.Add(f,
		all(request(nbd.CmdRead, 0, 0, 4096), request(nbd.CmdRead, nbd.FlagDF, 1, 511), request(nbd.CmdDisconnect, 0, 0, 0)),
		all(request(nbd.CmdBlockStatus, 0, 0, most), request(nbd.CmdBlockStatus, nbd.FlagReqOne, 1024, most)),
		all(request(nbd.CmdBlockStatus, 0, 1024, most-1024), request(nbd.CmdBlockStatus, 0, 4<<30, most), request(nbd.CmdBlockStatus, nbd.FlagReqOne, 4<<30-1, 1)),
		all(request(nbd.CmdBlockStatus, 0, 4<<30+1, most), request(nbd.CmdBlockStatus, 0, hugeSize-most, most), request(nbd.CmdBlockStatus, 0, hugeSize-most+1, most)),
		all(request(nbd.CmdTrim, 0, 5<<30, most), request(nbd.CmdWriteZeroes, nbd.FlagFastZero, 0, most), request(nbd.CmdCache, 0, 0, most)),
		all(request(nbd.CmdRead, 0, 0, most), request(nbd.CmdRead, 0, math.MaxUint64-511, 1024), request(nbd.CmdRead, 0, 1<<63, 1)),
		all(request(nbd.CmdWrite, nbd.FlagFUA, 7, 5), []byte("hello"), request(nbd.CmdFlush, 0, 0, 0)),
		request(nbd.CmdWrite, 0, 0, most),
		all(request(nbd.CmdWrite, 0, hugeSize, 3), []byte("end"), request(nbd.CmdRead, 0, hugeSize-1, 1)),
		all(request(nbd.CmdRead, 0, 0, 0), request(nbd.CmdWrite, 0, 0, 0), request(nbd.CmdTrim, 0, 0, 0), request(nbd.CmdBlockStatus, 0, 0, 0)),
		all(request(99, 0xffff, 1, 1), request(nbd.CmdFlush, 0, 1, 1)),
		bytes.Repeat(request(nbd.CmdRead, 0, 4<<30-512, 1024), 80),
		request(nbd.CmdRead, 0, 4<<30-1<<20, 3<<20)[:27],
		all(request(nbd.CmdRead, 0, 512, 2<<20), []byte("out of step")),
	)
	prefix := []byte{0, 0, 0, 3}
	prefix = nbd.AppendOption(prefix, nbd.OptStructuredReply, nil)
	prefix = nbd.AppendOption(prefix, nbd.OptSetMetaContext, nbd.AppendMetaContext(nil, "", nbd.BaseAllocation))
	prefix = nbd.AppendOption(prefix, nbd.OptGo, nbd.AppendGo(nil, ""))
	f.Fuzz(func(t *testing.T, text []byte) {
		// The requests that must be answered, by their cookies, which are made
		// unique, and the number of bytes that they read.
		open := map[uint64]nbd.Request{}
		total := 0
		broken := false
		text = bytes.Clone(text)
		for b := text; len(b) >= nbd.RequestSize; {
			r, err := nbd.ParseRequest((*[nbd.RequestSize]byte)(b))
			if err != nil || r.Type == nbd.CmdDisconnect {
				break
			}
			r.Cookie = uint64(len(open))
			binary.BigEndian.PutUint64(b[8:], r.Cookie)
			b = b[nbd.RequestSize:]
			if r.Type == nbd.CmdWrite {
				if uint64(r.Len) > uint64(len(b)) {
					broken = true
					break
				}
				b = b[r.Len:]
			}
			if r.Type == nbd.CmdRead {
				if total += int(r.Len); total > 16<<20 {
					t.Skip("too much to read")
				}
			}
			open[r.Cookie] = r
		}
		s := newServer(t, one("", newHuge()), server.Options{Writable: true})
		c := &said{text: bytes.NewReader(append(bytes.Clone(prefix), text...))}
		s.ServeConn(t.Context(), c)
		b := c.got.Bytes()[18+5*nbd.OptionReplySize+4+len(nbd.BaseAllocation)+12:]
		for len(b) > 0 {
			if len(b) < nbd.ChunkSize || binary.BigEndian.Uint32(b) != nbd.StructuredReplyMagic {
				if broken {
					return
				}
				t.Fatalf("chunk %x", b[:min(len(b), nbd.ChunkSize)])
			}
			h := nbd.ParseChunk((*[nbd.ChunkSize - 4]byte)(b[4:]))
			b = b[nbd.ChunkSize:]
			if uint64(h.Len) > uint64(len(b)) {
				if broken {
					return
				}
				t.Fatalf("%+v, and only %d bytes follow", h, len(b))
			}
			data := b[:h.Len]
			b = b[h.Len:]
			asked, ok := open[h.Cookie]
			if !ok {
				t.Fatalf("%+v, which nobody asked for", h)
			}
			check(t, asked, h, data)
			if h.Flags&nbd.ChunkDone != 0 {
				delete(open, h.Cookie)
			}
		}
		if len(open) > 0 && !broken {
			t.Fatalf("no reply to %+v", open)
		}
	})
}

// check checks one chunk of the reply to a request.
func check(t *testing.T, r nbd.Request, h nbd.Chunk, data []byte) {
	t.Helper()
	switch h.Type {
	case nbd.ChunkNone:
		if len(data) > 0 {
			t.Fatalf("%+v with data", h)
		}
	case nbd.ChunkData, nbd.ChunkHole:
		off, n := binary.BigEndian.Uint64(data), uint64(len(data)-8)
		if h.Type == nbd.ChunkHole {
			n = uint64(binary.BigEndian.Uint32(data[8:]))
		}
		if r.Type != nbd.CmdRead || n == 0 || off < r.Off || off+n > r.Off+uint64(r.Len) {
			t.Fatalf("%+v: %d bytes at %d, for %+v", h, n, off, r)
		}
	case nbd.ChunkBlockStatus:
		sum := uint64(0)
		for b := data[min(4, len(data)):]; ; b = b[8:] {
			if len(b) < 8 || r.Type != nbd.CmdBlockStatus {
				t.Fatalf("%+v: %x, for %+v", h, data, r)
			}
			n := uint64(binary.BigEndian.Uint32(b))
			if sum += n; n == 0 || sum > uint64(r.Len) {
				t.Fatalf("%+v: %x, for %+v", h, data, r)
			}
			if len(b) == 8 {
				break
			}
			if r.Flags&nbd.FlagReqOne != 0 {
				t.Fatalf("%+v: more than one", h)
			}
		}
	case nbd.ChunkError:
		if e := nbd.Errno(binary.BigEndian.Uint32(data)); e != nbd.EINVAL && e != nbd.ENOSPC {
			t.Fatalf("%v for %+v", e, r)
		}
	default:
		t.Fatalf("%+v", h)
	}
}
