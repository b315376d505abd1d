package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// both runs a test with and without structured replies.
func both(t *testing.T, run func(t *testing.T, structured bool)) {
	t.Run("structured", func(t *testing.T) { run(t, true) })
	t.Run("simple", func(t *testing.T) { run(t, false) })
}

const diskSize = 40 << 20

// TestRequests sends valid and invalid requests of all kinds. Each must get the right reply, and
// the connection must stay usable.
func TestRequests(t *testing.T) {
	const (
		MiB = 1 << 20
		end = diskSize
	)
	all := ^uint32(0)
	both(t, func(t *testing.T, structured bool) {
		d := newDisk(diskSize)
		s := newServer(t, one("disk", d), server.Options{Writable: true})
		df := func() nbd.Errno {
			if structured {
				return 0
			}
			return nbd.EINVAL // the server did not advertise the flag
		}()
		status := func(e nbd.Errno) nbd.Errno {
			if structured {
				return e
			}
			return nbd.EINVAL
		}
		for _, c := range []struct {
			name  string
			cmd   nbd.Command
			flags nbd.CommandFlags
			off   uint64
			n     uint32
			data  int
			want  nbd.Errno
		}{
			{"read", nbd.CmdRead, 0, 0, 512, 0, 0},
			{"read a byte", nbd.CmdRead, 0, 1, 1, 0, 0},
			{"read nothing", nbd.CmdRead, 0, 0, 0, 0, 0},
			{"read nothing at the end", nbd.CmdRead, 0, end, 0, 0, 0},
			{"read nothing past the end", nbd.CmdRead, 0, end + 1, 0, 0, nbd.EINVAL},
			{"read to the end", nbd.CmdRead, 0, end - 7, 7, 0, 0},
			{"read at the end", nbd.CmdRead, 0, end, 512, 0, nbd.EINVAL},
			{"read across the end", nbd.CmdRead, 0, end - 256, 512, 0, nbd.EINVAL},
			{"read that overflows", nbd.CmdRead, 0, math.MaxUint64 - 511, 1024, 0, nbd.EINVAL},
			{"read at 2^63", nbd.CmdRead, 0, 1 << 63, 512, 0, nbd.EINVAL},
			{"read 32 MiB", nbd.CmdRead, 0, 5, 32 * MiB, 0, 0},
			{"read more than 32 MiB", nbd.CmdRead, 0, 0, 32*MiB + 1, 0, nbd.EINVAL},
			{"read 4 GiB - 1", nbd.CmdRead, 0, 0, all, 0, nbd.EINVAL},
			{"read in one piece", nbd.CmdRead, nbd.FlagDF, 0, 64 << 10, 0, df},
			{"read 3 MiB in one piece", nbd.CmdRead, nbd.FlagDF, 11, 3*MiB + 1, 0, df},
			{"read, FUA", nbd.CmdRead, nbd.FlagFUA, 0, 512, 0, 0},
			{"read, unknown flag", nbd.CmdRead, 0x8000, 0, 512, 0, nbd.EINVAL},
			{"read, flag of another", nbd.CmdRead, nbd.FlagReqOne, 0, 512, 0, nbd.EINVAL},
			{"unknown command", 99, 0, 0, 512, 0, nbd.EINVAL},
			{"resize", 8, 0, 0, 512, 0, nbd.EINVAL},
			{"write", nbd.CmdWrite, 0, 0, 512, 512, 0},
			{"write, FUA", nbd.CmdWrite, nbd.FlagFUA, 0, 512, 512, 0},
			{"write, DF", nbd.CmdWrite, nbd.FlagDF, 0, 512, 512, nbd.EINVAL},
			{"write nothing", nbd.CmdWrite, 0, 0, 0, 0, 0},
			{"write at the end", nbd.CmdWrite, 0, end, 512, 512, nbd.ENOSPC},
			{"write across the end", nbd.CmdWrite, 0, end - 256, 512, 512, nbd.ENOSPC},
			{"write that overflows", nbd.CmdWrite, 0, math.MaxUint64 - 511, 1024, 1024, nbd.ENOSPC},
			{"write 3 bytes", nbd.CmdWrite, 0, 5, 3, 3, 0},
			{"write 32 MiB", nbd.CmdWrite, 0, 3, 32 * MiB, 32 * MiB, 0},
			{"write more than 32 MiB", nbd.CmdWrite, 0, 0, 32*MiB + 512, 32*MiB + 512, nbd.EINVAL},
			{"write 64 MiB", nbd.CmdWrite, 0, 0, 64 * MiB, 64 * MiB, nbd.ENOSPC},
			{"flush", nbd.CmdFlush, 0, 0, 0, 0, 0},
			{"flush, FUA", nbd.CmdFlush, nbd.FlagFUA, 0, 0, 0, 0},
			{"flush of a range", nbd.CmdFlush, 0, 0, 512, 0, nbd.EINVAL},
			{"flush at an offset", nbd.CmdFlush, 0, 512, 0, 0, nbd.EINVAL},
			{"trim", nbd.CmdTrim, 0, 0, 64 << 10, 0, 0},
			{"trim the disk", nbd.CmdTrim, 0, 0, end, 0, 0},
			{"trim nothing", nbd.CmdTrim, 0, 0, 0, 0, 0},
			{"trim past the end", nbd.CmdTrim, 0, end, 512, 0, nbd.EINVAL},
			{"trim 4 GiB - 1", nbd.CmdTrim, 0, 0, all, 0, nbd.EINVAL},
			{"trim, FAST_ZERO", nbd.CmdTrim, nbd.FlagFastZero, 0, 512, 0, nbd.EINVAL},
			{"zero", nbd.CmdWriteZeroes, 0, 1, 64 << 10, 0, 0},
			{"zero, NO_HOLE", nbd.CmdWriteZeroes, nbd.FlagNoHole, 0, 512, 0, 0},
			{"zero, FAST_ZERO", nbd.CmdWriteZeroes, nbd.FlagFastZero, 0, 512, 0, 0},
			{"zero the disk", nbd.CmdWriteZeroes, 0, 0, end, 0, 0},
			{"zero nothing", nbd.CmdWriteZeroes, 0, 0, 0, 0, 0},
			{"zero past the end", nbd.CmdWriteZeroes, 0, end - 511, 512, 0, nbd.ENOSPC},
			{"zero 4 GiB - 1", nbd.CmdWriteZeroes, 0, 0, all, 0, nbd.ENOSPC},
			{"zero, REQ_ONE", nbd.CmdWriteZeroes, nbd.FlagReqOne, 0, 512, 0, nbd.EINVAL},
			{"cache", nbd.CmdCache, 0, 0, 64 << 10, 0, 0},
			{"cache the disk", nbd.CmdCache, 0, 0, end, 0, 0},
			{"cache past the end", nbd.CmdCache, 0, end, 1, 0, nbd.EINVAL},
			{"cache, flag", nbd.CmdCache, nbd.FlagFastZero, 0, 512, 0, nbd.EINVAL},
			{"status", nbd.CmdBlockStatus, 0, 0, 64 << 10, 0, status(0)},
			{"status of one", nbd.CmdBlockStatus, nbd.FlagReqOne, 1, 1000, 0, status(0)},
			{"status of the disk", nbd.CmdBlockStatus, 0, 0, end, 0, status(0)},
			{"status of nothing", nbd.CmdBlockStatus, 0, 0, 0, 0, nbd.EINVAL},
			{"status past the end", nbd.CmdBlockStatus, 0, end, 512, 0, nbd.EINVAL},
			{"status across the end", nbd.CmdBlockStatus, 0, end - 512, 1024, 0, nbd.EINVAL},
			{"status of 4 GiB - 1", nbd.CmdBlockStatus, 0, 0, all, 0, nbd.EINVAL},
		} {
			t.Run(c.name, func(t *testing.T) {
				client := ready(t, s, "disk", structured)
				a := client.do(c.cmd, c.flags, c.off, c.n, content(c.data))
				if a.errno != c.want {
					t.Errorf("%v %s, want %v", a.errno, a.text, c.want)
				}
				if c.cmd == nbd.CmdRead && c.want == 0 && !bytes.Equal(a.data, d.settled()[c.off:c.off+uint64(c.n)]) {
					t.Error("other bytes")
				}
				if c.flags&nbd.FlagDF != 0 && structured && !slices.Equal(slices.DeleteFunc(a.kinds, func(k nbd.ChunkType) bool { return k == nbd.ChunkNone }), []nbd.ChunkType{nbd.ChunkData}) && c.want == 0 {
					t.Errorf("chunks %v", a.kinds)
				}
				client.reads(d.settled(), 4096, 512)
				client.send(nbd.CmdDisconnect, 0, 0, 0, nil)
				client.closed()
			})
		}
	})
}

// TestBroken sends bytes after which the beginning of the next request is not known. The server
// must close the connection.
func TestBroken(t *testing.T) {
	d := newDisk(64 << 10)
	s := newServer(t, one("disk", d), server.Options{Writable: true})
	other := ready(t, s, "disk", true)
	for name, b := range map[string][]byte{
		"magic":          append([]byte{0x12, 0x34, 0x56, 0x78}, make([]byte, 24)...),
		"absurd write":   nbd.Request{Type: nbd.CmdWrite, Len: math.MaxUint32}.Append(nil),
		"half a request": nbd.Request{Type: nbd.CmdRead, Len: 1}.Append(nil)[:20],
		"half a write":   append(nbd.Request{Type: nbd.CmdWrite, Len: 4096}.Append(nil), 1, 2, 3),
	} {
		t.Run(name, func(t *testing.T) {
			before := slices.Clone(d.settled())
			c := ready(t, s, "disk", true)
			c.write(b)
			c.Conn.(interface{ CloseWrite() error }).CloseWrite()
			c.closed()
			if !bytes.Equal(d.settled(), before) {
				t.Error("something was written")
			}
			other.reads(d.settled(), 0, 4096)
		})
	}
}

func TestReadOnly(t *testing.T) {
	both(t, func(t *testing.T, structured bool) {
		for name, s := range map[string]*server.Server{
			"server": newServer(t, one("", newDisk(64<<10)), server.Options{}),
			"disk":   newServer(t, one("", &sourcetest.Memory{Bytes: content(64 << 10)}), server.Options{Writable: true}),
		} {
			t.Run(name, func(t *testing.T) {
				c := ready(t, s, "", structured)
				if c.flags&nbd.ReadOnly == 0 || c.flags&(nbd.SendTrim|nbd.SendWriteZeroes|nbd.SendFastZero) != 0 {
					t.Errorf("flags %#x", c.flags)
				}
				for _, r := range []struct {
					cmd   nbd.Command
					flags nbd.CommandFlags
				}{{nbd.CmdWrite, 0}, {nbd.CmdWrite, nbd.FlagFUA}, {nbd.CmdTrim, 0}, {nbd.CmdWriteZeroes, 0}, {nbd.CmdWriteZeroes, nbd.FlagFastZero}} {
					data := []byte(nil)
					if r.cmd == nbd.CmdWrite {
						data = make([]byte, 4096)
					}
					if a := c.do(r.cmd, r.flags, 0, 4096, data); a.errno != nbd.EPERM {
						t.Errorf("%v: %v, want EPERM", r.cmd, a.errno)
					}
				}
				if a := c.do(nbd.CmdFlush, 0, 0, 0, nil); a.errno != 0 {
					t.Errorf("flush: %v", a.errno)
				}
				c.reads(content(64<<10), 0, 64<<10)
			})
		}
	})
}

// TestDurable checks which calls each request makes to the disk, and which requests flush it.
func TestDurable(t *testing.T) {
	d := newDisk(4 << 20)
	c := ready(t, newServer(t, one("", d), server.Options{Writable: true}), "", true)
	ok := func(cmd nbd.Command, flags nbd.CommandFlags, off uint64, n uint32, want ...string) {
		t.Helper()
		var data []byte
		if cmd == nbd.CmdWrite {
			data = bytes.Repeat([]byte{7}, int(n))
		}
		if a := c.do(cmd, flags, off, n, data); a.errno != 0 {
			t.Errorf("%v: %v", cmd, a.errno)
		}
		equalStrings(t, fmt.Sprint(cmd, flags), d.took(), want...)
	}
	ok(nbd.CmdWrite, 0, 0, 4096)
	ok(nbd.CmdFlush, 0, 0, 0, "flush")
	ok(nbd.CmdWrite, nbd.FlagFUA, 0, 4096, "flush")
	ok(nbd.CmdWrite, nbd.FlagFUA, 1, 3<<20, "flush")
	ok(nbd.CmdTrim, 0, 4096, 100, "trim 4096+100")
	ok(nbd.CmdTrim, nbd.FlagFUA, 4096, 100, "trim 4096+100", "flush")
	ok(nbd.CmdWriteZeroes, 0, 10, 20, "zero 10+20 trim=true fast=false")
	ok(nbd.CmdWriteZeroes, nbd.FlagNoHole, 10, 20, "zero 10+20 trim=false fast=false")
	ok(nbd.CmdWriteZeroes, nbd.FlagFastZero, 10, 20, "zero 10+20 trim=true fast=true")
	ok(nbd.CmdWriteZeroes, nbd.FlagNoHole|nbd.FlagFUA, 10, 20, "zero 10+20 trim=false fast=false", "flush")
	ok(nbd.CmdRead, nbd.FlagFUA, 0, 100)
	d.change(func() { d.slow = true })
	if a := c.do(nbd.CmdWriteZeroes, nbd.FlagFastZero, 0, 4096, nil); a.errno != nbd.ENOTSUP {
		t.Errorf("%v, want ENOTSUP", a.errno)
	}
	ok(nbd.CmdWriteZeroes, 0, 0, 1, "zero 0+1 trim=true fast=false")
	c.reads(d.settled(), 0, 1<<20)
}

// TestErrors checks the error numbers for the errors of disks.
func TestErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		want nbd.Errno
	}{
		{errors.New("out of luck"), nbd.EIO},
		{unix.EIO, nbd.EIO},
		{unix.EINVAL, nbd.EIO},
		{io.EOF, nbd.EIO},
		{unix.EROFS, nbd.EPERM},
		{unix.EACCES, nbd.EPERM},
		{fmt.Errorf("a: %w", unix.EDQUOT), nbd.ENOSPC},
		{unix.EFBIG, nbd.ENOSPC},
		{unix.ENOSPC, nbd.ENOSPC},
		{&os.PathError{Op: "read", Path: "/secret", Err: unix.ENOMEM}, nbd.ENOMEM},
		{os.ErrPermission, nbd.EPERM},
		{errors.ErrUnsupported, nbd.EIO},
		{nbd.ENOSPC, nbd.ENOSPC},
		{nbd.ESHUTDOWN, nbd.EIO},
		{nbd.EOVERFLOW, nbd.EIO},
		{server.ErrShutdown, nbd.EIO}, // comes from another server, since this one does not shut down
		{context.Canceled, nbd.EIO},
	} {
		both(t, func(t *testing.T, structured bool) {
			d := newDisk(4 << 20)
			stats := new(server.Stats)
			client := ready(t, newServer(t, one("", d), server.Options{Writable: true, Stats: stats}), "", structured)
			d.change(func() { d.fail = c.err })
			for _, r := range []struct {
				cmd nbd.Command
				n   uint32
			}{{nbd.CmdRead, 512}, {nbd.CmdWrite, 512}, {nbd.CmdWrite, 3 << 20}, {nbd.CmdFlush, 0}, {nbd.CmdTrim, 512}, {nbd.CmdWriteZeroes, 512}} {
				var data []byte
				if r.cmd == nbd.CmdWrite {
					data = make([]byte, r.n)
				}
				a := client.do(r.cmd, 0, 0, r.n, data)
				if a.errno != c.want {
					t.Errorf("%v: %v is told as %v, want %v", r.cmd, c.err, a.errno, c.want)
				}
				if strings.Contains(a.text, "secret") {
					t.Errorf("the client is told %q", a.text)
				}
			}
			if structured { // the read has several pieces, which all fail
				for _, flags := range []nbd.CommandFlags{0, nbd.FlagDF} {
					if a := client.do(nbd.CmdRead, flags, 0, 4<<20, nil); a.errno != c.want {
						t.Errorf("a long read: %v, want %v", a.errno, c.want)
					}
				}
			}
			d.change(func() { d.fail = nil })
			client.reads(d.settled(), 0, 4096)
			for _, o := range stats.Snapshot() {
				if o.Name == "write" && (o.Count != 2 || o.Failed != 2 || o.Bytes != 3<<20+512) {
					t.Errorf("counted %+v", o)
				}
			}
		})
	}
}

// TestPanic checks that a panic in a disk fails only the request.
func TestPanic(t *testing.T) {
	d := newDisk(64 << 10)
	broken := true
	d.OnRead = func(int64, int) error {
		if broken {
			panic("bug")
		}
		return nil
	}
	c := ready(t, newServer(t, one("", d), server.Options{}), "", true)
	if a := c.do(nbd.CmdRead, 0, 0, 512, nil); a.errno != nbd.EIO {
		t.Errorf("%v, want EIO", a.errno)
	}
}

// TestFailsMidway lets the disk fail in a read whose reply has already begun. The client must
// notice that the data are incomplete.
func TestFailsMidway(t *testing.T) {
	both(t, func(t *testing.T, structured bool) {
		d := newDisk(8 << 20)
		var mended atomic.Bool
		d.OnRead = func(off int64, _ int) error {
			if off >= 3<<20 && !mended.Load() {
				return unix.EIO
			}
			return nil
		}
		s := newServer(t, one("", d), server.Options{})
		c := ready(t, s, "", structured)
		if structured {
			for _, flags := range []nbd.CommandFlags{0, nbd.FlagDF} {
				if a := c.do(nbd.CmdRead, flags, 0, 5<<20, nil); a.errno != nbd.EIO {
					t.Errorf("%v, want EIO", a.errno)
				}
			}
			c.reads(d.settled(), 0, 4096)
			return
		}
		c.send(nbd.CmdRead, 0, 0, 5<<20, nil)
		b, err := io.ReadAll(c)
		if len(b) != nbd.SimpleReplySize+3<<20 {
			t.Errorf("%d bytes, %v, want the end of the connection after 3 MiB", len(b), err)
		}
		c.Close() // the last client, so that the server closes the disk
		c = ready(t, s, "", structured)
		for range 2 {
			if a := c.do(nbd.CmdRead, 0, 0, 5<<20, nil); a.errno != nbd.EIO {
				t.Errorf("again: %v, want EIO", a.errno)
			}
		}
		c.reads(d.settled(), 0, 3<<20)
		mended.Store(true)
		c.reads(d.settled(), 0, 5<<20)
	})
}

// TestInFlight sends many requests at once, in part with equal cookies.
func TestInFlight(t *testing.T) {
	both(t, func(t *testing.T, structured bool) {
		d := newDisk(1 << 20)
		c := ready(t, newServer(t, one("", d), server.Options{}), "", structured)
		const n = 1000
		cookies := map[uint64]uint64{}
		var text []byte
		for i := range uint64(n) {
			cookies[i] = i * 512
			text = nbd.Request{Type: nbd.CmdRead, Cookie: i, Off: i * 512, Len: 512}.Append(text)
		}
		go c.Write(text)
		for range n {
			off, a := uint64(0), answer{}
			// The offset of the read is known only after the cookie was read.
			if structured {
				a = c.receiveAny(512, cookies)
			} else {
				a = c.receive(0, 512)
			}
			off, known := cookies[a.cookie]
			if !known || a.errno != 0 || !bytes.Equal(a.data, d.Bytes[off:off+512]) {
				t.Fatalf("cookie %d: %v", a.cookie, a.errno)
			}
			delete(cookies, a.cookie)
		}
		text = bytes.Repeat(nbd.Request{Type: nbd.CmdRead, Cookie: 7, Len: 512}.Append(nil), 4)
		c.write(text)
		for range 4 {
			if a := c.receive(0, 512); a.cookie != 7 || !bytes.Equal(a.data, d.Bytes[:512]) {
				t.Errorf("with the same cookie: %v", a.errno)
			}
		}
	})
}

// receiveAny reads the next reply, which must have one chunk, to a read of n bytes.
func (c *client) receiveAny(n int, offsets map[uint64]uint64) (a answer) {
	c.t.Helper()
	h := nbd.ParseChunk((*[nbd.ChunkSize - 4]byte)(c.full(nbd.ChunkSize)[4:]))
	b := c.full(int(h.Len))
	a.cookie = h.Cookie
	if h.Flags != nbd.ChunkDone || binary.BigEndian.Uint64(b) != offsets[h.Cookie] {
		c.t.Fatalf("chunk %+v", h)
	}
	if h.Type == nbd.ChunkHole {
		a.data = make([]byte, n)
	} else {
		a.data = b[8:]
	}
	return a
}

// TestLeave disconnects while requests are in progress. The server must complete them.
func TestLeave(t *testing.T) {
	both(t, func(t *testing.T, structured bool) {
		for name, leave := range map[string]func(c *client){
			"disconnect": func(c *client) { c.send(nbd.CmdDisconnect, 0, 0, 0, nil) },
			"half-close": func(c *client) { c.Conn.(interface{ CloseWrite() error }).CloseWrite() },
		} {
			t.Run(name, func(t *testing.T) {
				d := newDisk(1 << 20)
				held := make(chan struct{})
				d.OnRead = func(int64, int) error { <-held; return nil }
				c := ready(t, newServer(t, one("", d), server.Options{}), "", structured)
				for range 8 {
					c.send(nbd.CmdRead, 0, 0, 512, nil)
				}
				leave(c)
				close(held)
				for range 8 {
					if a := c.receive(0, 512); a.errno != 0 || !bytes.Equal(a.data, d.Bytes[:512]) {
						t.Errorf("%v", a.errno)
					}
				}
				c.closed()
			})
		}
	})
}
