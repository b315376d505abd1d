package server_test

import (
	"bytes"
	"math"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/nbd/server"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

func TestBlockStatus(t *testing.T) {
	zero, same := source.Zero, source.Inherited
	list := []source.Extent{
		{Off: 0, Len: 10},
		{Off: 10, Len: 10, Kind: zero, Depth: 1, Absent: true},
		{Off: 20, Len: 10, Kind: zero},
		{Off: 30, Len: 10, Depth: 1},
		{Off: 40, Len: 10, Kind: same},
		{Off: 50, Len: 6 << 30},
	}
	d := &sourcetest.Memory{Content: zeros{}, Length: list[5].End(), ExtentList: list, Description: source.Info{Chain: []string{"a", "b"}}}
	s := newServer(t, one("", d), server.Options{})
	c := dial(t, s, 3)
	c.structure()
	ids := c.meta(nbd.OptSetMetaContext, "", nbd.BaseAllocation, "qemu:allocation-depth")
	c.enter("")
	base, depth := ids[nbd.BaseAllocation], ids["qemu:allocation-depth"]
	for _, q := range []struct {
		off         uint64
		n           uint32
		one         bool
		base, depth []uint32
	}{
		{0, 50, false, []uint32{10, 0, 20, 3, 10, 0, 10, 1}, []uint32{10, 1, 10, 0, 10, 1, 10, 2, 10, 1}},
		{5, 1, false, []uint32{1, 0}, []uint32{1, 1}},
		{5, 7, false, []uint32{5, 0, 2, 3}, []uint32{5, 1, 2, 0}},
		{12, 20, true, []uint32{18, 3}, []uint32{8, 0}},
		{0, 4, true, []uint32{4, 0}, []uint32{4, 1}},
		{50, math.MaxUint32, false, []uint32{math.MaxUint32, 0}, []uint32{math.MaxUint32, 1}},
		{40, math.MaxUint32, false, []uint32{10, 1, math.MaxUint32 - 10, 0}, []uint32{math.MaxUint32, 1}},
		{50 + 2<<30 + 1, math.MaxUint32, false, []uint32{math.MaxUint32, 0}, []uint32{math.MaxUint32, 1}},
		{50 + 6<<30 - 1, 1, true, []uint32{1, 0}, []uint32{1, 1}},
	} {
		var flags nbd.CommandFlags
		if q.one {
			flags = nbd.FlagReqOne
		}
		a := c.do(nbd.CmdBlockStatus, flags, q.off, q.n, nil)
		if a.errno != 0 || !slices.Equal(a.status[base], q.base) || !slices.Equal(a.status[depth], q.depth) || len(a.status) != 2 {
			t.Errorf("%d+%d: %v, want %v and %v", q.off, q.n, a, q.base, q.depth)
		}
	}
	broken := &sourcetest.Memory{Bytes: make([]byte, 50), OnExtent: func(source.Extent) error { return unix.EIO }}
	c = ready(t, newServer(t, one("", broken), server.Options{}), "", true)
	if a := c.do(nbd.CmdBlockStatus, 0, 0, 50, nil); a.errno != nbd.EIO {
		t.Errorf("a disk that can't be read: %v, want EIO", a.errno)
	}
}

type zeros struct{}

func (zeros) ReadAt(p []byte, _ int64) (int, error) {
	clear(p)
	return len(p), nil
}

// TestManyExtents queries more extents than one reply can hold.
func TestManyExtents(t *testing.T) {
	const n, each = 20_000, 512
	var data []source.Extent
	for i := range int64(n / 2) {
		data = append(data, source.Extent{Off: 2 * i * each, Len: each})
	}
	c := ready(t, newServer(t, one("", sourcetest.Pattern(n*each, data...)), server.Options{}), "", true)
	off := uint64(0)
	for asked := 0; off < n*each; asked++ {
		a := c.do(nbd.CmdBlockStatus, 0, off, uint32(n*each-off), nil)
		if a.errno != 0 || len(a.status[1]) == 0 || len(a.status[1]) > 2*4096 || asked > 10 {
			t.Fatalf("at %d: %v, %d numbers", off, a.errno, len(a.status[1]))
		}
		for b := a.status[1]; len(b) > 0; b = b[2:] {
			if want := uint32(off/each%2) * 3; b[0] != each || b[1] != want {
				t.Fatalf("at %d: %v, want %d, %d", off, b[:2], each, want)
			}
			off += uint64(b[0])
		}
	}
}

// TestWrittenAllocation queries the extents again after each write.
func TestWrittenAllocation(t *testing.T) {
	d := newDisk(1 << 20)
	d.ExtentList = []source.Extent{{Len: 1 << 20, Kind: source.Zero}}
	clear(d.Bytes)
	c := ready(t, newServer(t, one("", d), server.Options{Writable: true}), "", true)
	check := func(want ...uint32) {
		t.Helper()
		if a := c.do(nbd.CmdBlockStatus, 0, 0, 1<<20, nil); !slices.Equal(a.status[1], want) {
			t.Errorf("%v, want %v", a.status[1], want)
		}
	}
	check(1<<20, 3)
	c.reads(d.settled(), 0, 1<<20)
	for _, cmd := range []nbd.Command{nbd.CmdWrite, nbd.CmdTrim, nbd.CmdWriteZeroes} {
		d.change(func() { d.ExtentList = []source.Extent{{Len: 4096}, {Off: 4096, Len: 1<<20 - 4096, Kind: source.Zero}} })
		check(1<<20, 3) // from the cache
		var data []byte
		if cmd == nbd.CmdWrite {
			data = bytes.Repeat([]byte{9}, 4096)
		}
		if a := c.do(cmd, 0, 0, 4096, data); a.errno != 0 {
			t.Fatal(a.errno)
		}
		c.reads(d.settled(), 0, 1<<20)
		check(4096, 0, 1<<20-4096, 3)
		d.change(func() { d.ExtentList = []source.Extent{{Len: 1 << 20, Kind: source.Zero}} })
		c.do(nbd.CmdTrim, 0, 0, 1<<20, nil)
		check(1<<20, 3)
		d.change(func() { clear(d.Bytes) })
	}
}
