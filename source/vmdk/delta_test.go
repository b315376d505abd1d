package vmdk_test

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

// delta describes an extent that the tests make, in a format that ESXi uses for
// snapshots: vmfsSparse (COWD) or seSparse.
type delta struct {
	se       bool
	grain    int64            // sectors; 0: 1, seSparse 8
	table    int64            // sectors of a grain table; 0: 32, which COWD has always, seSparse 64
	capacity int64            // sectors
	grains   map[int64][]byte // by number; nil bytes, in seSparse alone: zeros, odd ones unmapped by the guest
	order    []int64          // of the grains in the file; nil: ascending
}

func (x delta) defaults() delta {
	if x.grain == 0 {
		x.grain = 1
		if x.se {
			x.grain = 8
		}
	}
	if x.table == 0 {
		x.table = 32
		if x.se {
			x.table = 64
		}
	}
	if x.order == nil {
		x.order = slices.Sorted(maps.Keys(x.grains))
	}
	return x
}

func (x delta) entrySize() int64 {
	if x.se {
		return 8
	}
	return 4
}

func (x delta) entries() int64 { return x.table * sector / x.entrySize() }

// image returns an image with the fields that content and checkExtents need.
func (x delta) image() image {
	x = x.defaults()
	return image{grain: x.grain, capacity: x.capacity, grains: x.grains}
}

// gte is the offset in the file of the table entry of grain g.
func (x delta) gte(l *layout, g int64) int64 {
	x = x.defaults()
	return l.tables[g/x.entries()] + g%x.entries()*x.entrySize()
}

func (x delta) build() *layout {
	x = x.defaults()
	l := &layout{grains: map[int64]int64{}}
	l.tables = make([]int64, ((x.capacity-1)/x.grain)/x.entries()+1)
	if x.se {
		x.buildSE(l)
	} else {
		x.buildCOWD(l)
	}
	return l
}

// room appends n bytes of zeros at a multiple of unit, and returns their offset.
func (l *layout) room(n, unit int64) int64 {
	l.file = append(l.file, make([]byte, -int64(len(l.file))&(unit-1))...)
	at := int64(len(l.file))
	l.file = append(l.file, make([]byte, n)...)
	return at
}

// buildCOWD builds a COWD extent. Each table is just before its first grain.
func (x delta) buildCOWD(l *layout) {
	l.room(4*sector, 1)
	l.gd = l.room(4*int64(len(l.tables)), sector)
	for _, g := range x.order {
		i := g / x.entries()
		if l.tables[i] == 0 {
			l.tables[i] = l.room(x.table*sector, sector)
			l.put32(l.gd+i*4, uint32(l.tables[i]/sector))
		}
		l.grains[g] = l.room(x.grain*sector, sector)
		copy(l.file[l.grains[g]:], x.grains[g])
		l.put32(x.gte(l, g), uint32(l.grains[g]/sector))
	}
	copy(l.file, "COWD")
	for i, v := range []int64{1, 3, x.capacity, x.grain, l.gd / sector, int64(len(l.tables)), l.room(0, sector) / sector} {
		l.put32(int64(4+4*i), uint32(v))
	}
}

// The offsets of fields of a seSparse header.
const (
	seVolatileAt, seDirectoryAt, seTablesAt, seGrainsAt = 80, 128, 144, 192
)

func (x delta) buildSE(l *layout) {
	l.room(sector, 1)
	place := func(field, n int64) int64 {
		at := l.room(n, sector)
		l.put64(field, uint64(at/sector))
		l.put64(field+8, uint64((n+sector-1)/sector))
		return at
	}
	volatile := place(seVolatileAt, sector)
	place(96, 2*sector)  // journal header
	place(112, 4*sector) // journal
	l.gd = place(seDirectoryAt, int64(len(l.tables))*8)
	tables := place(seTablesAt, int64(len(l.tables)+1)*x.table*sector)
	place(160, sector) // free bitmap
	place(176, sector) // backmap
	first := l.room(0, x.grain*sector)
	used := uint64(0)
	for _, g := range x.order {
		i := g / x.entries()
		if l.tables[i] == 0 {
			l.tables[i] = tables + int64(used)*x.table*sector
			l.put64(l.gd+i*8, 1<<60|used)
			used++
		}
		entry := uint64(2-g&1) << 60
		if b := x.grains[g]; b != nil {
			l.grains[g] = l.room(x.grain*sector, x.grain*sector)
			copy(l.file[l.grains[g]:], b)
			entry = seEntry(uint64(l.grains[g]-first) / uint64(x.grain*sector))
		}
		l.put64(x.gte(l, g), entry)
	}
	l.put64(seGrainsAt, uint64(first/sector))
	l.put64(seGrainsAt+8, uint64((int64(len(l.file))-first)/sector))
	for i, v := range []int64{0xcafebabe, 0x200000001, x.capacity, x.grain, x.table} {
		l.put64(int64(8*i), uint64(v))
	}
	l.put64(volatile, 0xcafecafe)
	l.put64(volatile+8, used)
	l.put64(volatile+16, 17)
}

// seEntry returns the entry of a grain table for the grain with the number index in the
// file.
func seEntry(index uint64) uint64 { return 3<<60 | index&0xfff<<48 | index>>12 }

// described writes the delta and its descriptor, and returns the path of the
// descriptor. parent is the name of the parent's descriptor, or "" for no parent. The
// CID of an image is the length of its name.
func (x delta) described(t testing.TB, dir, name, parent string) (path string, l *layout) {
	t.Helper()
	l = x.build()
	extent, createType, kind := strings.TrimSuffix(name, ".vmdk")+"-delta.vmdk", "vmfsSparse", "VMFSSPARSE"
	if x.se {
		extent, createType, kind = strings.TrimSuffix(name, ".vmdk")+"-sesparse.vmdk", "seSparse", "SESPARSE"
	}
	write(t, dir, extent, l.file)
	text := fmt.Sprintf("%screateType=%q\nRW %d %s %q\n", head(name, parent), createType, x.capacity, kind, extent)
	return write(t, dir, name, []byte(text)), l
}

// head returns the beginning of a descriptor.
func head(name, parent string) string {
	if parent == "" {
		return fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=%08x\nparentCID=ffffffff\n", len(name))
	}
	return fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=%08x\nparentCID=%08x\nparentFileNameHint=%q\n", len(name), len(parent), parent)
}

// over returns the content of the disk if the content of its parent is below.
func (im image) over(below []byte) []byte {
	all := slices.Clone(below)
	for g, b := range im.grains {
		at := all[min(g*im.grain*sector, int64(len(all))):]
		if b == nil {
			clear(at[:min(int64(len(at)), im.grain*sector)])
		}
		copy(at, b)
	}
	return all
}

// span returns count consecutive numbers, beginning with first.
func span(first, count int64) []int64 {
	var all []int64
	for i := range count {
		all = append(all, first+i)
	}
	return all
}

// backwards returns n in reverse order.
func backwards(n []int64) []int64 {
	n = slices.Clone(n)
	slices.Reverse(n)
	return n
}

var madeDeltas = []struct {
	name string
	delta
}{
	{"empty", delta{capacity: 10000}},
	{"one sector", delta{capacity: 1, grains: grains(512, 0)}},
	{"one table", delta{capacity: 1500, grains: grains(512, 0, 1, 2, 3, 9, 700, 1498, 1499)}},
	{"full", delta{capacity: 1500, grains: grains(512, span(0, 1500)...)}},
	{"tables at their ends", delta{capacity: 4096*3 + 100, grains: grains(512, 4095, 4096, 8191, 8192, 4096*3, 4096*3+99)}},
	{"absent tables", delta{capacity: 4096*20 + 1, grains: grains(512, 4096*5, 4096*5+1, 4096*20)}},
	{"out of order", delta{capacity: 1200, grains: grains(512, span(100, 600)...), order: slices.Concat(backwards(span(200, 200)), span(100, 100), span(500, 200), span(400, 100))}},
	{"grains of 8 sectors", delta{grain: 8, capacity: 9001, grains: grains(4096, 0, 1, 2, 77, 1124)}},
	{"grains of 128 sectors", delta{grain: 128, capacity: 1300, grains: grains(65536, 1, 2, 9), order: []int64{9, 2, 1}}},
	{"se: empty", delta{se: true, capacity: 10000}},
	{"se: one sector", delta{se: true, capacity: 1, grains: grains(4096, 0)}},
	{"se: one table", delta{se: true, capacity: 1500, grains: grains(4096, 0, 1, 2, 9, 60, 186, 187)}},
	{"se: zeros", delta{se: true, capacity: 1500, grains: map[int64][]byte{0: nil, 1: random(1, 4096), 2: nil, 3: nil, 5: nil, 6: random(6, 4096), 187: nil}}},
	{"se: full", delta{se: true, capacity: 1500, grains: grains(4096, span(0, 188)...)}},
	{"se: tables at their ends", delta{se: true, capacity: 32768*3 + 100, grains: grains(4096, 4095, 4096, 8191, 8192, 4096*3, 4096*3+12), order: []int64{8192, 4096, 4095, 4096 * 3, 8191, 4096*3 + 12}}},
	{"se: absent tables", delta{se: true, capacity: 32768*9 + 1, grains: grains(4096, 4096*5, 4096*5+1, 4096*9)}},
	{"se: out of order", delta{se: true, capacity: 1500, grains: grains(4096, span(10, 150)...), order: slices.Concat(backwards(span(60, 50)), span(10, 50), span(110, 50))}},
	{"se: more grains than 12 bits count", delta{se: true, capacity: 8 * 4200, grains: grains(4096, span(0, 4200)...), order: slices.Concat(span(2000, 2200), span(0, 2000))}},
	{"se: grains of 64 KiB", delta{se: true, grain: 128, capacity: 1300, grains: grains(65536, 1, 2, 9, 10), order: []int64{9, 10, 2, 1}}},
	{"se: grains of 1 sector", delta{se: true, grain: 1, table: 1, capacity: 700, grains: grains(512, 0, 1, 63, 64, 200, 699)}},
	{"se: tables of 512 KiB", delta{se: true, grain: 1, table: 1024, capacity: 70000, grains: grains(512, 8191, 8192, 16383, 65535, 65536, 69999)}},
}

// TestMadeDeltas reads deltas without a parent.
func TestMadeDeltas(t *testing.T) {
	for _, c := range madeDeltas {
		t.Run(c.name, func(t *testing.T) {
			path, _ := c.described(t, t.TempDir(), "disk.vmdk", "")
			im := c.image()
			d := mustOpen(t, path)
			checkExtents(t, im, d)
			want := im.content()
			if !bytes.Equal(content(t, d), want) {
				t.Fatal("another content")
			}
			if i := d.Info(); i.ClusterSize != im.grain*sector {
				t.Errorf("grains of %d bytes, want %d", i.ClusterSize, im.grain*sector)
			}
			if len(want) < 1<<20 {
				conforms(t, path, want)
			}
		})
	}
}

// TestMadeDeltasOfQemu compares the content of the deltas with the content that
// qemu-img reads.
func TestMadeDeltasOfQemu(t *testing.T) {
	peer.Need(t, "qemu-img")
	for _, c := range madeDeltas {
		if x := c.defaults(); x.se && (x.grain != 8 || x.table != 64) {
			continue // qemu reads no other
		}
		t.Run(c.name, func(t *testing.T) {
			path, _ := c.described(t, t.TempDir(), "disk.vmdk", "")
			if !bytes.Equal(agrees(t, path), c.image().content()) {
				t.Error("qemu-img reads another content than was written")
			}
		})
	}
}

// TestDeltaChain reads a chain of deltas of both kinds over a flat disk, with a hosted
// sparse image and an image with two different kinds of extents on top.
func TestDeltaChain(t *testing.T) {
	peer.Need(t, "qemu-img")
	const capacity = 32768*2 + 77
	dir := t.TempDir()
	base := random(1, capacity*sector)
	clear(base[1<<20 : 3<<20])
	write(t, dir, "base-flat.vmdk", base)
	name := "base.vmdk"
	path := write(t, dir, name, fmt.Appendf(nil, "%screateType=\"vmfs\"\nRW %d VMFS \"base-flat.vmdk\"\n", head(name, ""), capacity))
	want := base
	check := func() {
		t.Helper()
		if !bytes.Equal(agrees(t, path), want) {
			t.Fatalf("%s: qemu-img reads another content than was written", path)
		}
	}
	check()
	for i, x := range []delta{
		{grains: grains(512, slices.Concat(span(0, 3), span(2040, 100), span(8000, 300), []int64{30000, capacity - 1})...)},
		{se: true, grains: grains(4096, slices.Concat(span(1, 5), span(260, 30), span(4090, 12), []int64{8201})...)},
		{grains: grains(512, slices.Concat(span(16, 8), span(2100, 3), span(33000, 70))...)},
		{se: true},
	} {
		x.capacity = capacity
		if x.se && x.grains != nil {
			maps.Copy(x.grains, map[int64][]byte{7: nil, 8: nil, 261: nil, 600: nil, 601: nil, 4095: nil})
		}
		parent := name
		name = fmt.Sprintf("disk%s.vmdk", strings.Repeat("-1", i+1))
		path, _ = x.described(t, dir, name, parent)
		want = x.image().over(want)
		check()
	}

	hosted := image{capacity: capacity, grains: grains(65536, 0, 9, 300)}.defaults()
	parent := name
	name = "hosted over deltas.vmdk"
	hosted.descriptor = head(name, parent) + "createType=\"monolithicSparse\"\nRW %d SPARSE \"hosted over deltas.vmdk\"\n"
	path = write(t, dir, name, hosted.build().file)
	want = hosted.over(want)
	check()

	first, second := delta{capacity: 32768, grains: grains(512, 1, 4096, 4097)}, delta{se: true, capacity: capacity - 32768, grains: grains(4096, 0, 5)}
	write(t, dir, "1", first.build().file)
	write(t, dir, "2", second.build().file)
	parent, name = name, "two extents over all.vmdk"
	path = write(t, dir, name, fmt.Appendf(nil, "%screateType=\"vmfsSparse\"\nRW %d SPARSE \"1\"\nRW %d SESPARSE \"2\"\n", head(name, parent), first.capacity, second.capacity))
	want = slices.Concat(first.image().over(want[:32768*sector]), second.image().over(want[32768*sector:]))
	check()
	if got := len(mustOpen(t, path).Info().Chain); got != 7 {
		t.Errorf("%d images in the chain, want 7", got)
	}
}

// TestShortDeltaChain runs the suite of source.Disk, which reads a disk often,
// on a chain of a short disk.
func TestShortDeltaChain(t *testing.T) {
	const capacity = 900
	dir := t.TempDir()
	want := random(1, capacity*sector)
	write(t, dir, "base-flat.vmdk", want)
	write(t, dir, "base.vmdk", fmt.Appendf(nil, "%sRW %d VMFS \"base-flat.vmdk\"\n", head("base.vmdk", ""), capacity))
	cowd := delta{capacity: capacity, grains: grains(512, slices.Concat(span(3, 70), span(300, 5), []int64{899})...)}
	cowd.described(t, dir, "disk-1.vmdk", "base.vmdk")
	se := delta{se: true, capacity: capacity, grains: grains(4096, 0, 8, 9, 40, 41)}
	se.grains[1], se.grains[38] = nil, nil
	path, _ := se.described(t, dir, "disk-1-1.vmdk", "disk-1.vmdk")
	conforms(t, path, se.image().over(cowd.image().over(want)))
}

// TestDeltaReads tests that grains which follow each other in the file are read with
// one call.
func TestDeltaReads(t *testing.T) {
	for _, x := range []delta{
		{capacity: 4096, grains: grains(512, span(0, 4096)...)},
		{se: true, capacity: 8 * 4096, grains: grains(4096, span(0, 4096)...)},
	} {
		calls := 0
		f := &sourcetest.Memory{Bytes: x.build().file, OnRead: func(int64, int) error { calls++; return nil }}
		d := openMemory(t, x, f)
		for range source.Covered(t.Context(), d, 0, d.Size()) {
		}
		if calls > 12 {
			t.Errorf("seSparse %v: %d reads for opening and Extents", x.se, calls)
		}
		calls = 0
		p := make([]byte, 1<<20)
		if _, err := d.ReadAt(p, 512<<10); err != nil || !bytes.Equal(p, x.image().content()[512<<10:][:1<<20]) {
			t.Fatalf("another content, %v", err)
		}
		if calls != 1 {
			t.Errorf("seSparse %v: %d reads for 1 MiB of neighbours, want 1", x.se, calls)
		}
	}
}

// openMemory opens a disk that consists of the delta in f.
func openMemory(t testing.TB, x delta, f source.Disk) *vmdk.Disk {
	t.Helper()
	text := fmt.Sprintf("# Disk DescriptorFile\nRW %d VMFSSPARSE \"x\"\n", x.capacity)
	d, err := vmdk.Open(t.Context(), "x.vmdk", &sourcetest.Memory{Bytes: []byte(text)}, func(_ context.Context, _, _, _ string) (source.Disk, error) { return f, nil }, vmdk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// TestDeltaInFile tests the places that InFile returns.
func TestDeltaInFile(t *testing.T) {
	for _, x := range []delta{
		{capacity: 5000, grains: grains(512, 10, 11, 12, 40, 41, 4999), order: []int64{40, 41, 4999, 10, 11, 12}},
		{se: true, capacity: 5000, grains: grains(4096, 10, 11, 12, 40, 41, 624), order: []int64{40, 41, 624, 10, 11, 12}},
	} {
		path, l := x.described(t, t.TempDir(), "disk.vmdk", "")
		d := mustOpen(t, path)
		size := x.defaults().grain * sector
		for _, c := range []struct{ g, n int64 }{{10, 3}, {11, 2}, {12, 1}, {40, 2}} {
			f, pos, n, ok := d.InFile(c.g*size + 100)
			if !ok || pos != l.grains[c.g]+100 || n != c.n*size-100 || !strings.HasPrefix(filepath.Base(f.Name()), "disk-") {
				t.Errorf("seSparse %v, grain %d: %d, %d, %v, want %d, %d", x.se, c.g, pos, n, ok, l.grains[c.g]+100, c.n*size-100)
			}
		}
		if _, pos, n, ok := d.InFile(4999 * sector); !ok || n != sector || pos%size != 4999*sector%size {
			t.Errorf("seSparse %v, the last sector: %d, %d, %v", x.se, pos, n, ok)
		}
		for _, off := range []int64{0, 13 * size, 4800 * sector} {
			if _, _, _, ok := d.InFile(off); ok {
				t.Errorf("seSparse %v: what it lacks at %d is in the file", x.se, off)
			}
		}
	}
}

// TestDeltaExtentsEnd tests that the end of the context ends an iteration over missing
// tables.
func TestDeltaExtentsEnd(t *testing.T) {
	x := delta{capacity: 1<<32 - 1}
	l := x.build()
	f, err := raw.Open(t.Context(), write(t, t.TempDir(), "x", l.file))
	if err != nil {
		t.Fatal(err)
	}
	d := openMemory(t, x, f)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, err := range d.Extents(ctx, 0, d.Size()) {
		if err == nil || !strings.Contains(err.Error(), "canceled") {
			t.Errorf("after its end: %v", err)
		}
	}
}
