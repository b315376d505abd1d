package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"net"
	"os"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// disk is a writable disk in memory. It records the calls other than reads and writes.
type disk struct {
	*sourcetest.Memory
	mu    sync.RWMutex
	calls []string
	slow  bool // zeroing is as slow as writing
	fail  error
}

func newDisk(size int) *disk {
	return &disk{Memory: &sourcetest.Memory{Bytes: content(size)}}
}

// content returns size bytes with a hole in the second quarter and no zero bytes elsewhere.
func content(size int) []byte {
	b := make([]byte, size)
	rand.NewChaCha8([32]byte{3}).Read(b)
	for i := range b {
		b[i] |= 1
	}
	clear(b[size/4 : size/2])
	return b
}

// settled returns the content of the disk. The caller must have received all replies to
// writes.
func (d *disk) settled() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.Bytes
}

// change calls how while no call to the disk is in progress.
func (d *disk) change(how func()) {
	d.mu.Lock()
	defer d.mu.Unlock()
	how()
}

func (d *disk) Extents(ctx context.Context, off, n int64) iter.Seq2[source.Extent, error] {
	d.mu.RLock()
	defer d.mu.RUnlock()
	return (&sourcetest.Memory{Bytes: d.Bytes, ExtentList: d.ExtentList}).Extents(ctx, off, n)
}

func (d *disk) ReadAt(p []byte, off int64) (int, error) {
	d.mu.RLock()
	defer d.mu.RUnlock()
	if d.fail != nil {
		return 0, d.fail
	}
	return d.Memory.ReadAt(p, off)
}

func (d *disk) note(format string, args ...any) error {
	d.calls = append(d.calls, fmt.Sprintf(format, args...))
	return d.fail
}

func (d *disk) WriteAt(p []byte, off int64) (int, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.fail != nil {
		return 0, d.fail
	}
	return copy(d.Bytes[off:off+int64(len(p))], p), nil
}

func (d *disk) ZeroAt(_ context.Context, off, n int64, flags source.ZeroFlags) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if flags.Has(source.FastOnly) && d.slow {
		return fmt.Errorf("zero: %w", errors.ErrUnsupported)
	}
	clear(d.Bytes[off : off+n])
	return d.note("zero %d+%d trim=%v fast=%v", off, n, flags.Has(source.MayTrim), flags.Has(source.FastOnly))
}

func (d *disk) Trim(_ context.Context, off, n int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.note("trim %d+%d", off, n)
}

func (d *disk) Flush(context.Context) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.note("flush")
}

func (d *disk) took() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	calls := d.calls
	d.calls = nil
	return calls
}

// one returns a list of one export.
func one(name string, d source.Disk) server.Exports {
	return server.Fixed{{Export: server.Export{Name: name, Description: "a disk for tests"}, Disk: d}}
}

func newServer(t testing.TB, exports server.Exports, o server.Options) *server.Server {
	t.Helper()
	s, err := server.New(exports, o)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// client is a connection to a server on which tests can send any bytes.
type client struct {
	t testing.TB
	net.Conn
	structured bool
	cookie     uint64
	size       uint64
	flags      nbd.TransmissionFlags
}

// dial connects to a server over a pair of sockets and reads the greeting. The server serves
// the connection until the test ends.
func dial(t testing.TB, s *server.Server, flags uint32) *client {
	t.Helper()
	c := connect(t, s)
	c.greet(flags)
	return c
}

func connect(t testing.TB, s *server.Server) *client {
	t.Helper()
	ours, theirs := pair(t)
	served := make(chan struct{})
	go func() {
		defer close(served)
		s.ServeConn(context.Background(), theirs)
	}()
	t.Cleanup(func() {
		ours.Close()
		<-served
	})
	return &client{t: t, Conn: ours, cookie: 0x1000}
}

// pair returns the two ends of a Unix domain socket.
func pair(t testing.TB) (a, b net.Conn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]net.Conn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		if ends[i], err = net.FileConn(f); err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	return ends[0], ends[1]
}

// ready returns a client in the transmission phase.
func ready(t testing.TB, s *server.Server, export string, structured bool) *client {
	t.Helper()
	c := dial(t, s, 3)
	if structured {
		c.structure()
		if got := c.meta(nbd.OptSetMetaContext, export, nbd.BaseAllocation); len(got) != 1 {
			t.Fatalf("contexts: %v", got)
		}
	}
	c.enter(export)
	return c
}

func (c *client) greet(flags uint32) {
	c.t.Helper()
	b := c.full(18)
	if binary.BigEndian.Uint64(b) != nbd.Magic || binary.BigEndian.Uint64(b[8:]) != nbd.OptionMagic || binary.BigEndian.Uint16(b[16:]) != 3 {
		c.t.Fatalf("greeting: %x", b)
	}
	c.write(binary.BigEndian.AppendUint32(nil, flags))
}

func (c *client) structure() {
	c.t.Helper()
	c.want(nbd.OptStructuredReply, nil, nbd.RepAck)
	c.structured = true
}

func (c *client) write(b ...[]byte) {
	c.t.Helper()
	if _, err := c.Write(bytes.Join(b, nil)); err != nil {
		c.t.Fatalf("sending: %v", err)
	}
}

func (c *client) full(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c, b); err != nil {
		c.t.Fatalf("reading %d bytes: %v", n, err)
	}
	return b
}

// closed checks that the server closes the connection without sending anything more.
func (c *client) closed() {
	c.t.Helper()
	rest, err := io.ReadAll(c)
	if len(rest) > 0 || err != nil && !errors.Is(err, unix.ECONNRESET) {
		c.t.Errorf("got %x, %v, want the end", rest, err)
	}
}

type optionReply struct {
	kind nbd.OptionReplyType
	data []byte
}

// ask sends an option and returns the replies to it.
func (c *client) ask(o nbd.Option, data []byte) []optionReply {
	c.t.Helper()
	c.write(nbd.AppendOption(nil, o, data))
	return c.replies(o)
}

func (c *client) replies(o nbd.Option) (all []optionReply) {
	c.t.Helper()
	for {
		h, err := nbd.ParseOptionReply((*[nbd.OptionReplySize]byte)(c.full(nbd.OptionReplySize)))
		if err != nil || h.Option != o || h.Len > 1<<20 {
			c.t.Fatalf("reply to %v: %+v, %v", o, h, err)
		}
		all = append(all, optionReply{h.Type, c.full(int(h.Len))})
		if h.Type == nbd.RepAck || h.Type.IsError() {
			return all
		}
	}
}

// want sends an option and checks the type of the last reply.
func (c *client) want(o nbd.Option, data []byte, kind nbd.OptionReplyType) []optionReply {
	c.t.Helper()
	all := c.ask(o, data)
	if got := all[len(all)-1].kind; got != kind {
		c.t.Errorf("%v: %v, want %v", o, got, kind)
	}
	return all
}

// alive checks that the server still answers options.
func (c *client) alive() {
	c.t.Helper()
	c.want(nbd.OptList, nil, nbd.RepAck)
}

// meta negotiates metadata contexts and returns their names and IDs.
func (c *client) meta(o nbd.Option, export string, queries ...string) map[string]uint32 {
	c.t.Helper()
	got := map[string]uint32{}
	for _, r := range c.want(o, nbd.AppendMetaContext(nil, export, queries...), nbd.RepAck) {
		if r.kind == nbd.RepMetaContext {
			name := string(r.data[4:])
			if _, twice := got[name]; twice {
				c.t.Errorf("context %s twice", name)
			}
			got[name] = binary.BigEndian.Uint32(r.data)
		}
	}
	return got
}

// enter chooses an export, which begins the transmission phase.
func (c *client) enter(export string, infos ...nbd.InfoType) map[nbd.InfoType][]byte {
	c.t.Helper()
	got := c.info(nbd.OptGo, export, infos...)
	return got
}

func (c *client) info(o nbd.Option, export string, infos ...nbd.InfoType) map[nbd.InfoType][]byte {
	c.t.Helper()
	got := map[nbd.InfoType][]byte{}
	for _, r := range c.want(o, nbd.AppendGo(nil, export, infos...), nbd.RepAck) {
		if r.kind == nbd.RepInfo {
			t := nbd.InfoType(binary.BigEndian.Uint16(r.data))
			if _, twice := got[t]; twice {
				c.t.Errorf("information %d twice", t)
			}
			got[t] = r.data[2:]
		}
	}
	b := got[nbd.InfoExport]
	if len(b) != 10 {
		c.t.Fatalf("information about the export: %x", b)
	}
	c.size, c.flags = binary.BigEndian.Uint64(b), nbd.TransmissionFlags(binary.BigEndian.Uint16(b[8:]))
	return got
}

// send sends a request and returns its cookie.
func (c *client) send(cmd nbd.Command, flags nbd.CommandFlags, off uint64, n uint32, data []byte) uint64 {
	c.t.Helper()
	c.cookie++
	c.write(nbd.Request{Flags: flags, Type: cmd, Cookie: c.cookie, Off: off, Len: n}.Append(nil), data)
	return c.cookie
}

// answer is a complete reply.
type answer struct {
	cookie uint64
	errno  nbd.Errno
	text   string
	data   []byte // assembled from all chunks
	kinds  []nbd.ChunkType
	status map[uint32][]uint32 // descriptors by the ID of the context
}

// receive reads the next reply, to a read of n bytes at off. Only one request may be in
// progress, so that all chunks belong to it.
func (c *client) receive(off uint64, n int) (a answer) {
	c.t.Helper()
	a.status = map[uint32][]uint32{}
	if !c.structured {
		if m := binary.BigEndian.Uint32(c.full(4)); m != nbd.SimpleReplyMagic {
			c.t.Fatalf("reply magic %#x", m)
		}
		r := nbd.ParseSimpleReply((*[nbd.SimpleReplySize - 4]byte)(c.full(nbd.SimpleReplySize - 4)))
		a.cookie, a.errno = r.Cookie, r.Errno
		if a.errno == 0 {
			a.data = c.full(n)
		}
		return a
	}
	covered := 0
	a.data = bytes.Repeat([]byte{0xEE}, n)
	for {
		if m := binary.BigEndian.Uint32(c.full(4)); m != nbd.StructuredReplyMagic {
			c.t.Fatalf("reply magic %#x", m)
		}
		h := nbd.ParseChunk((*[nbd.ChunkSize - 4]byte)(c.full(nbd.ChunkSize - 4)))
		if h.Len > 64<<20 || a.kinds != nil && h.Cookie != a.cookie {
			c.t.Fatalf("chunk %+v", h)
		}
		a.cookie = h.Cookie
		a.kinds = append(a.kinds, h.Type)
		b := c.full(int(h.Len))
		switch h.Type {
		case nbd.ChunkData, nbd.ChunkHole:
			at := int(binary.BigEndian.Uint64(b) - off)
			if h.Type == nbd.ChunkHole {
				hole := binary.BigEndian.Uint32(b[8:])
				b = make([]byte, hole)
			} else {
				b = b[8:]
			}
			if at < 0 || len(b) == 0 || at+len(b) > n {
				c.t.Fatalf("chunk %v of %d bytes at %d of a read of %d bytes", h.Type, len(b), at, n)
			}
			covered += copy(a.data[at:], b)
		case nbd.ChunkBlockStatus:
			id := binary.BigEndian.Uint32(b)
			for b = b[4:]; len(b) > 0; b = b[4:] {
				a.status[id] = append(a.status[id], binary.BigEndian.Uint32(b))
			}
		case nbd.ChunkError:
			a.errno = nbd.Errno(binary.BigEndian.Uint32(b))
			a.text = string(b[6:])
			if int(binary.BigEndian.Uint16(b[4:])) != len(a.text) {
				c.t.Errorf("error chunk %x", b)
			}
		case nbd.ChunkNone:
			if h.Flags&nbd.ChunkDone == 0 {
				c.t.Errorf("an empty chunk that is not the last")
			}
		default:
			c.t.Fatalf("chunk %+v", h)
		}
		if h.Flags&nbd.ChunkDone == 0 {
			continue
		}
		if a.errno == 0 && covered != n {
			c.t.Errorf("%d of %d bytes were sent", covered, n)
		}
		return a
	}
}

// do sends a request and reads its reply.
func (c *client) do(cmd nbd.Command, flags nbd.CommandFlags, off uint64, n uint32, data []byte) answer {
	c.t.Helper()
	cookie := c.send(cmd, flags, off, n, data)
	read := 0
	if cmd == nbd.CmdRead && n <= nbd.MaxPayload { // the server refuses longer reads
		read = int(n)
	}
	a := c.receive(off, read)
	if a.cookie != cookie {
		c.t.Errorf("%v: cookie %#x, want %#x", cmd, a.cookie, cookie)
	}
	return a
}

// reads checks that a read succeeds and returns the content of the disk.
func (c *client) reads(disk []byte, off uint64, n uint32) {
	c.t.Helper()
	a := c.do(nbd.CmdRead, 0, off, n, nil)
	if a.errno != 0 || !bytes.Equal(a.data, disk[off:off+uint64(n)]) {
		c.t.Errorf("read of %d bytes at %d: %v %s, or other bytes", n, off, a.errno, a.text)
	}
}

func equalStrings(t testing.TB, what string, got []string, want ...string) {
	t.Helper()
	if !slices.Equal(got, want) {
		t.Errorf("%s: %q, want %q", what, got, want)
	}
}
