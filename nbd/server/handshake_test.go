package server_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

const fixed, noZeroes = uint32(nbd.FixedNewstyle), uint32(nbd.NoZeroes)

func TestClientFlags(t *testing.T) {
	s := newServer(t, one("disk", newDisk(64<<10)), server.Options{})
	for _, flags := range []uint32{4, 0x80000003, 1 << 16} {
		dial(t, s, flags).closed()
	}
	for flags := range uint32(4) {
		c := dial(t, s, flags)
		if flags&fixed == 0 {
			c.want(nbd.OptList, nil, nbd.RepErrInvalid)
		}
		c.write(nbd.AppendOption(nil, nbd.OptExportName, []byte("disk")))
		b := c.full(10)
		if size := binary.BigEndian.Uint64(b); size != 64<<10 {
			t.Errorf("flags %d: size %d", flags, size)
		}
		if f := binary.BigEndian.Uint16(b[8:]); f != 0x50f {
			t.Errorf("flags %d: transmission flags %#x, want 0x50f", flags, f)
		}
		if flags&noZeroes == 0 && !bytes.Equal(c.full(124), make([]byte, 124)) {
			t.Errorf("flags %d: no padding", flags)
		}
		c.reads(content(64<<10), 0, 512)
	}
}

// goData returns the data of an option INFO or GO.
func goData(name string, infos ...nbd.InfoType) []byte { return nbd.AppendGo(nil, name, infos...) }

func TestOptions(t *testing.T) {
	s := newServer(t, one("disk", newDisk(64<<10)), server.Options{})
	long := strings.Repeat("n", 5000)
	u32 := func(n uint32, b string) []byte { return append(binary.BigEndian.AppendUint32(nil, n), b...) }
	for _, c := range []struct {
		name   string
		option nbd.Option
		data   []byte
		want   nbd.OptionReplyType
	}{
		{"unknown option", 0x7777, []byte("hello"), nbd.RepErrUnsupported},
		{"unknown option, long", 0x7777, make([]byte, 1<<20), nbd.RepErrUnsupported},
		{"peek", 4, nil, nbd.RepErrUnsupported},
		{"extended headers", 11, nil, nbd.RepErrUnsupported},
		{"list", nbd.OptList, nil, nbd.RepAck},
		{"list with data", nbd.OptList, []byte("x"), nbd.RepErrInvalid},
		{"TLS that is off", nbd.OptStartTLS, nil, nbd.RepErrUnsupported},
		{"structured replies with data", nbd.OptStructuredReply, []byte("x"), nbd.RepErrInvalid},
		{"info", nbd.OptInfo, goData("disk"), nbd.RepAck},
		{"info, unknown type", nbd.OptInfo, goData("disk", 0x4242), nbd.RepAck},
		{"info truncated", nbd.OptInfo, []byte("abc"), nbd.RepErrInvalid},
		{"info without count", nbd.OptInfo, u32(4, "disk"), nbd.RepErrInvalid},
		{"info, name past the data", nbd.OptInfo, u32(99, "ab\x00\x00"), nbd.RepErrInvalid},
		{"info, name of 4 GiB - 1", nbd.OptInfo, u32(1<<32-1, "ab\x00\x00"), nbd.RepErrInvalid},
		{"info, too many", nbd.OptInfo, u32(0, "\x00\x09"), nbd.RepErrInvalid},
		{"info, data left", nbd.OptInfo, append(goData("disk"), 1), nbd.RepErrInvalid},
		{"info, name too long", nbd.OptInfo, goData(long), nbd.RepErrInvalid},
		{"info, name with NUL", nbd.OptInfo, goData("di\x00sk"), nbd.RepErrInvalid},
		{"info, name no UTF-8", nbd.OptInfo, goData("\xff"), nbd.RepErrInvalid},
		{"info, unknown", nbd.OptInfo, goData("other"), nbd.RepErrUnknown},
		{"info, too big", nbd.OptInfo, make([]byte, 70_000), nbd.RepErrTooBig},
		{"go, unknown", nbd.OptGo, goData("other"), nbd.RepErrUnknown},
		{"go truncated", nbd.OptGo, []byte("abc"), nbd.RepErrInvalid},
		{"list contexts before structured replies", nbd.OptListMetaContext, nbd.AppendMetaContext(nil, "disk"), nbd.RepErrInvalid},
		{"set contexts before structured replies", nbd.OptSetMetaContext, nbd.AppendMetaContext(nil, "disk", nbd.BaseAllocation), nbd.RepErrInvalid},
	} {
		t.Run(c.name, func(t *testing.T) {
			client := dial(t, s, 3)
			client.want(c.option, c.data, c.want)
			client.alive()
			client.enter("disk")
			client.reads(content(64<<10), 0, 512)
		})
	}
	t.Run("structured replies twice", func(t *testing.T) {
		c := dial(t, s, 3)
		c.structure()
		c.want(nbd.OptStructuredReply, nil, nbd.RepErrInvalid)
		c.alive()
	})
	t.Run("abort", func(t *testing.T) {
		for _, data := range []string{"", "junk"} {
			c := dial(t, s, 3)
			c.want(nbd.OptAbort, []byte(data), nbd.RepAck)
			c.closed()
		}
	})
	t.Run("unknown by EXPORT_NAME", func(t *testing.T) {
		for _, name := range []string{"other", long, "\xff"} {
			c := dial(t, s, 3)
			c.write(nbd.AppendOption(nil, nbd.OptExportName, []byte(name)))
			c.closed()
		}
	})
	t.Run("bad magic", func(t *testing.T) {
		c := dial(t, s, 3)
		c.write(make([]byte, 16))
		c.closed()
	})
	t.Run("absurd length", func(t *testing.T) {
		c := dial(t, s, 3)
		c.write(binary.BigEndian.AppendUint64(nil, nbd.OptionMagic), u32(0x7777, "\xff\xff\xff\xff"))
		c.closed()
	})
	t.Run("too many", func(t *testing.T) {
		c := dial(t, s, 3)
		for range 256 {
			c.want(0x7777, nil, nbd.RepErrUnsupported)
		}
		c.closed()
	})
}

func TestInfo(t *testing.T) {
	d := newDisk(1 << 20)
	d.Description = source.Info{ClusterSize: 64 << 10}
	for _, o := range []nbd.Option{nbd.OptInfo, nbd.OptGo} {
		for _, writable := range []bool{false, true} {
			s := newServer(t, one("disk", d), server.Options{Writable: writable})
			c := dial(t, s, 3)
			got := c.info(o, "disk", nbd.InfoExport, nbd.InfoName, nbd.InfoDescription, nbd.InfoBlockSize, nbd.InfoBlockSize)
			if len(got) != 4 || string(got[nbd.InfoName]) != "disk" || string(got[nbd.InfoDescription]) != "a disk for tests" {
				t.Errorf("%v: %v", o, got)
			}
			sizes, err := nbd.ParseBlockSizes((*[nbd.BlockSizesSize]byte)(got[nbd.InfoBlockSize]))
			if want := (nbd.BlockSizes{Min: 1, Preferred: 64 << 10, Max: 32 << 20}); err != nil || sizes != want {
				t.Errorf("%v: block sizes %+v, %v, want %+v", o, sizes, err, want)
			}
			want := nbd.TransmissionFlags(0x50f)
			if writable {
				want = 0xd6d
			}
			if c.size != 1<<20 || c.flags != want {
				t.Errorf("%v: %d bytes, flags %#x, want %#x", o, c.size, c.flags, want)
			}
			if o == nbd.OptGo {
				continue
			}
			c.structure()
			if got := c.info(o, "disk"); len(got) != 1 {
				t.Errorf("unasked information %v", got)
			}
			if c.flags != want|nbd.SendDF {
				t.Errorf("flags %#x with structured replies, want %#x", c.flags, want|nbd.SendDF)
			}
		}
	}
}

// TestPreferred checks the preferred block size for disks whose cluster size is not allowed as
// a block size.
func TestPreferred(t *testing.T) {
	for cluster, want := range map[int64]uint32{0: 4096, 512: 4096, 4096: 4096, 96 << 10: 4096, 1 << 20: 1 << 20, 1 << 30: 32 << 20} {
		d := newDisk(1 << 20)
		d.Description = source.Info{ClusterSize: cluster}
		c := dial(t, newServer(t, one("", d), server.Options{}), 3)
		sizes, err := nbd.ParseBlockSizes((*[nbd.BlockSizesSize]byte)(c.enter("", nbd.InfoBlockSize)[nbd.InfoBlockSize]))
		if err != nil || sizes.Preferred != want {
			t.Errorf("clusters of %d: preferred %d, %v, want %d", cluster, sizes.Preferred, err, want)
		}
	}
	// The sector size for guests takes precedence over the cluster size.
	for sector, want := range map[int64]uint32{0: 64 << 10, 512: 64 << 10, 4096: 4096, 4097: 64 << 10, 1 << 40: 64 << 10} {
		d := newDisk(1 << 20)
		d.Description = source.Info{ClusterSize: 64 << 10, GuestSector: sector}
		c := dial(t, newServer(t, one("", d), server.Options{}), 3)
		sizes, err := nbd.ParseBlockSizes((*[nbd.BlockSizesSize]byte)(c.enter("", nbd.InfoBlockSize)[nbd.InfoBlockSize]))
		if err != nil || sizes.Preferred != want {
			t.Errorf("sectors of %d: preferred %d, %v, want %d", sector, sizes.Preferred, err, want)
		}
	}
}

func TestMetaContexts(t *testing.T) {
	const base, depth = nbd.BaseAllocation, "qemu:allocation-depth"
	d := newDisk(64 << 10)
	chain := newDisk(64 << 10)
	chain.Description = source.Info{Chain: []string{"top", "bottom"}}
	s := newServer(t, server.Fixed{
		{Export: server.Export{Name: "disk"}, Disk: d},
		{Export: server.Export{Name: "chain"}, Disk: chain},
	}, server.Options{})
	list, set := nbd.OptListMetaContext, nbd.OptSetMetaContext
	for _, c := range []struct {
		option  nbd.Option
		export  string
		queries []string
		want    []string
	}{
		{list, "disk", nil, []string{base}},
		{list, "disk", []string{"base:"}, []string{base}},
		{list, "disk", []string{"qemu:"}, nil},
		{list, "disk", []string{"x-foo:bar", "nocolon", ""}, nil},
		{list, "chain", nil, []string{base, depth}},
		{list, "chain", []string{"qemu:"}, []string{depth}},
		{list, "chain", []string{depth, "base:"}, []string{base, depth}},
		{set, "disk", nil, nil},
		{set, "disk", []string{"base:"}, nil},
		{set, "disk", []string{base, "x-j:k", base}, []string{base}},
		{set, "disk", []string{"base:nosuch", depth}, nil},
		{set, "chain", []string{depth, base}, []string{base, depth}},
	} {
		t.Run(fmt.Sprint(c.option, c.export, c.queries), func(t *testing.T) {
			client := dial(t, s, 3)
			client.structure()
			got := client.meta(c.option, c.export, c.queries...)
			if len(got) != len(c.want) {
				t.Errorf("%v, want %v", got, c.want)
			}
			ids := map[uint32]bool{}
			for _, name := range c.want {
				id, ok := got[name]
				if !ok || ids[id] && c.option == set || c.option == list && id != 0 {
					t.Errorf("%v, want %v", got, c.want)
				}
				ids[id] = true
			}
		})
	}
	// A context is valid for the export for which it was negotiated, until the next
	// SET_META_CONTEXT.
	noStatus := func(t *testing.T, prepare func(c *client)) {
		c := dial(t, s, 3)
		c.structure()
		c.meta(set, "disk", base)
		prepare(c)
		c.enter("disk")
		if a := c.do(nbd.CmdBlockStatus, 0, 0, 4096, nil); a.errno != nbd.EINVAL {
			t.Errorf("%v, want EINVAL", a.errno)
		}
		c.reads(content(64<<10), 0, 512)
	}
	t.Run("of another export", func(t *testing.T) { noStatus(t, func(c *client) { c.meta(set, "chain", base) }) })
	t.Run("set to none", func(t *testing.T) { noStatus(t, func(c *client) { c.meta(set, "disk") }) })
	t.Run("failed: unknown export", func(t *testing.T) {
		noStatus(t, func(c *client) { c.want(set, nbd.AppendMetaContext(nil, "other", base), nbd.RepErrUnknown) })
	})
	t.Run("failed: lengths", func(t *testing.T) {
		noStatus(t, func(c *client) {
			b := nbd.AppendMetaContext(nil, "disk", base)
			c.want(set, b[:len(b)-1], nbd.RepErrInvalid)
			c.want(set, append(b, 0), nbd.RepErrInvalid)
			c.want(set, binary.BigEndian.AppendUint32(nbd.AppendGo(nil, "disk")[:8], 1<<32-1), nbd.RepErrInvalid)
		})
	})
	t.Run("failed: too big", func(t *testing.T) {
		noStatus(t, func(c *client) { c.want(set, make([]byte, 70_000), nbd.RepErrTooBig) })
	})
}

// counted is a list of exports that counts the open disks.
type counted struct {
	server.Exports
	disk         source.Disk
	opens, open_ atomic.Int64
	fail         error
	wait         time.Duration
}

type countedDisk struct {
	source.Disk
	of *counted
}

func (d countedDisk) Close() error {
	d.of.open_.Add(-1)
	return nil
}

func (c *counted) Find(_ context.Context, name string) (server.Export, error) {
	if name == "other" {
		return server.Export{}, server.ErrUnknownExport
	}
	return server.Export{Name: "disk"}, nil
}

func (c *counted) Open(context.Context, string) (source.Disk, error) {
	time.Sleep(c.wait)
	c.opens.Add(1)
	if c.fail != nil {
		return nil, c.fail
	}
	if c.open_.Add(1) > 1 {
		return nil, errors.New("open twice at once")
	}
	return countedDisk{c.disk, c}, nil
}

func (c *counted) List(context.Context) ([]server.Export, error) {
	return []server.Export{{Name: "disk"}}, nil
}

// TestShared checks that a disk is opened for the first client, by any of its names, and closed
// after the last client.
func TestShared(t *testing.T) {
	e := &counted{disk: newDisk(64 << 10)}
	left := make(chan int, 10)
	s := newServer(t, e, server.Options{Left: func(others int) { left <- others }})
	a := ready(t, s, "disk", true)
	b := ready(t, s, "alias", false)
	c := dial(t, s, 3)
	c.info(nbd.OptInfo, "disk")
	c.want(nbd.OptInfo, goData("other"), nbd.RepErrUnknown)
	c.want(nbd.OptAbort, nil, nbd.RepAck)
	c.closed()
	if n := e.opens.Load(); n != 1 {
		t.Errorf("opened %d times", n)
	}
	a.Close()
	if others := <-left; others != 1 {
		t.Errorf("%d others, want 1", others)
	}
	b.reads(content(64<<10), 0, 4096)
	b.send(nbd.CmdDisconnect, 0, 0, 0, nil)
	b.closed()
	if others := <-left; others != 0 {
		t.Errorf("%d others, want none", others)
	}
	ready(t, s, "third", true).reads(content(64<<10), 0, 4096)
	if n := e.opens.Load(); n != 2 {
		t.Errorf("opened %d times, want again after all had left", n)
	}
}

func TestOpenFails(t *testing.T) {
	e := &counted{disk: newDisk(64 << 10), fail: errors.New("no route to 10.1.2.3")}
	s := newServer(t, e, server.Options{})
	c := dial(t, s, 3)
	all := c.want(nbd.OptGo, goData("disk"), nbd.RepErrUnknown)
	if text := string(all[0].data); strings.Contains(text, "10.1.2.3") || !strings.Contains(text, "log") {
		t.Errorf("the client is told %q", text)
	}
	c.alive()
	e.fail = nil
	c.enter("disk")
	c.reads(content(64<<10), 0, 512)
}

// TestHandshakeDeadline checks that slow clients are disconnected, but not clients that wait
// for a disk that opens slowly.
func TestHandshakeDeadline(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		e := &counted{disk: &sourcetest.Memory{Bytes: make([]byte, 4096)}, wait: time.Minute}
		s := newServer(t, e, server.Options{Handshake: 10 * time.Second})
		talk := func(speak func(c net.Conn)) (alive time.Duration) {
			ours, theirs := net.Pipe()
			ended := make(chan time.Time, 1)
			start := time.Now()
			go func() {
				s.ServeConn(t.Context(), theirs)
				ended <- time.Now()
			}()
			io.ReadFull(ours, make([]byte, 18))
			speak(ours)
			at := <-ended
			ours.Close()
			return at.Sub(start)
		}
		if got := talk(func(c net.Conn) {}); got != 10*time.Second {
			t.Errorf("a client that says nothing: %v", got)
		}
		if got := talk(func(c net.Conn) {
			text := nbd.AppendOption([]byte{0, 0, 0, 3}, nbd.OptList, nil)
			for _, b := range text {
				if _, err := c.Write([]byte{b}); err != nil {
					return
				}
				time.Sleep(time.Second)
			}
		}); got != 10*time.Second {
			t.Errorf("a byte a second: %v", got)
		}
		if got := talk(func(c net.Conn) {
			time.Sleep(4 * time.Second)
			c.Write(nbd.AppendOption([]byte{0, 0, 0, 3}, nbd.OptInfo, goData("disk")))
			io.ReadFull(c, make([]byte, nbd.OptionReplySize+12+nbd.OptionReplySize))
		}); got != 70*time.Second {
			t.Errorf("with a minute of opening: %v, want 70 s", got)
		}
		if got := talk(func(c net.Conn) {
			c.Write(nbd.AppendOption([]byte{0, 0, 0, 3}, nbd.OptGo, goData("disk")))
			io.ReadFull(c, make([]byte, nbd.OptionReplySize+12+nbd.OptionReplySize))
			time.Sleep(time.Hour) // a client may be idle in the transmission phase
			c.Close()
		}); got != time.Hour+time.Minute {
			t.Errorf("an idle client: %v, want an hour and a minute", got)
		}
	})
}

func TestMaxConnections(t *testing.T) {
	s := newServer(t, one("", newDisk(64<<10)), server.Options{MaxConnections: 2})
	a, b := ready(t, s, "", true), ready(t, s, "", true)
	connect(t, s).closed()
	a.reads(content(64<<10), 0, 512)
	b.send(nbd.CmdDisconnect, 0, 0, 0, nil)
	b.closed()
	for { // retry until the server has noticed the end of the other connection
		c := connect(t, s)
		if _, err := io.ReadFull(c, make([]byte, 18)); err == nil {
			break
		}
	}
}

func TestNewRefuses(t *testing.T) {
	if _, err := server.New(one("", newDisk(1)), server.Options{TLSMode: server.TLSRequire}); err == nil {
		t.Error("TLS without certificates: no error")
	}
	if _, err := server.LoadTLS(t.TempDir(), false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no certificates: %v", err)
	}
}
