package vmdk_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"testing"

	"github.com/vddkcp/vddkcp/source"
)

// TestBadDeltas opens deltas with wrong fields.
func TestBadDeltas(t *testing.T) {
	cowd := delta{capacity: 10000, grains: grains(512, 0, 1, 2, 4100, 9000)}
	se := delta{se: true, capacity: 100000, grains: grains(4096, 0, 1, 2, 4100, 9000)}
	for _, c := range []struct {
		name   string
		x      delta
		damage func(*layout)
		want   []string
	}{
		{"truncated header", cowd, cut(func(*layout) int64 { return 1000 }), []string{"COWD header at offset 0 needs 2048 bytes, but the file has 1000"}},
		{"version 0", cowd, func(l *layout) { l.put32(4, 0) }, []string{"offset 4: version 0, want 1"}},
		{"version 2", cowd, func(l *layout) { l.put32(4, 2) }, []string{"offset 4: version 2, want 1"}},
		{"capacity 0", cowd, func(l *layout) { l.put32(12, 0) }, []string{"offset 12: capacity of 0 sectors"}},
		{"capacity below the descriptor's", cowd, func(l *layout) { l.put32(12, 9999) }, []string{"capacity of 9999 sectors", "descriptor gives the extent 10000"}},
		{"capacity above the descriptor's", cowd, func(l *layout) { l.put32(12, 10001) }, []string{"capacity of 10001 sectors", "descriptor gives the extent 10000"}},
		{"capacity beyond the directory", cowd, func(l *layout) { l.put32(12, 1<<32-1) }, []string{"offset 24: the grain directory has 3 entries, want 1048576 or more"}},
		{"grain size 0", cowd, func(l *layout) { l.put32(16, 0) }, []string{"offset 16: grain size of 0 sectors, want a power of two from 1 to 32768"}},
		{"grain size no power of two", cowd, func(l *layout) { l.put32(16, 3) }, []string{"offset 16: grain size of 3 sectors"}},
		{"grain size absurd", cowd, func(l *layout) { l.put32(16, 1<<31) }, []string{"grain size of 2147483648 sectors"}},
		{"no directory", cowd, func(l *layout) { l.put32(20, 0) }, []string{"offset 20: the grain directory at sector 0 lies in the header"}},
		{"directory in the header", cowd, func(l *layout) { l.put32(20, 3) }, []string{"offset 20: the grain directory at sector 3 lies in the header"}},
		{"directory past the end", cowd, func(l *layout) { l.put32(20, 1<<32-1) }, []string{"grain directory at sector 4294967295 needs 12 bytes, but the file has"}},
		{"directory truncated", cowd, cut(func(l *layout) int64 { return l.gd + 11 }), []string{"grain directory at sector 4 needs 12 bytes, but the file has 2059"}},
		{"directory too short", cowd, func(l *layout) { l.put32(24, 2) }, []string{"offset 24: the grain directory has 2 entries, want 3"}},
		{"directory absurd", cowd, func(l *layout) { l.put32(24, 1<<32-1) }, []string{"grain directory at sector 4 needs 17179869180 bytes, but the file has"}},
		{"table past the end", cowd, func(l *layout) { l.put32(l.gd+4, 1<<32-1) }, []string{"grain table 1 at offset 2199023255040, according to the grain directory's entry at offset 2052: the table needs 16384 bytes and would end at offset 2199023271424, but the file has"}},
		{"table truncated", cowd, cut(func(l *layout) int64 { return l.tables[2] + 4*(10000-8192) - 1 }), []string{"grain table 2 at offset", "needs 7232 bytes"}},
		{"table in the header", cowd, func(l *layout) { l.put32(l.gd, 1) }, []string{"grain table 0 at offset 512, according to the grain directory's entry at offset 2048: the table lies in the header, bytes 0 to 2048"}},
		{"table in the directory", cowd, func(l *layout) { l.put32(l.gd, 4) }, []string{"grain table 0 at offset 2048", "lies in the grain directory, bytes 2048 to 2060"}},
		{"grain past the end", cowd, func(l *layout) { l.put32(l.tables[1]+4*4, 1<<32-1) }, []string{"grain at disk offset 2099200, stored at offset 2199023255040", "the file is truncated or damaged"}},
		{"grain truncated", cowd, func(l *layout) { l.file = l.file[:len(l.file)-1] }, []string{"grain at disk offset 4608000, stored at offset", "truncated"}},
		{"grain in the header", cowd, func(l *layout) { l.put32(l.tables[0], 1) }, []string{"grain at disk offset 0, stored at offset 512", "lies in the header, bytes 0 to 2048"}},
		{"grain in the directory", cowd, func(l *layout) { l.put32(l.tables[0]+4, 4) }, []string{"grain at disk offset 512, stored at offset 2048", "lies in the grain directory"}},
		{"grain in its table", cowd, func(l *layout) { l.put32(l.tables[0]+8, uint32(l.tables[0]/sector+31)) }, []string{"grain at disk offset 1024", "lies in the grain table"}},

		{"se: truncated header", se, cut(func(*layout) int64 { return 500 }), []string{"seSparse header at offset 0 needs 512 bytes, but the file has 500"}},
		{"se: version 1", se, func(l *layout) { l.put64(8, 1) }, []string{"offset 8: version 0x1, want 0x200000001"}},
		{"se: version 2.2", se, func(l *layout) { l.put64(8, 0x200000002) }, []string{"offset 8: version 0x200000002, want 0x200000001"}},
		{"se: capacity 0", se, func(l *layout) { l.put64(16, 0) }, []string{"offset 16: capacity of 0 sectors"}},
		{"se: capacity absurd", se, func(l *layout) { l.put64(16, 1<<63) }, []string{"offset 16: capacity of 9223372036854775808 sectors"}},
		{"se: capacity of too many tables", se, func(l *layout) { l.put64(16, 1<<53) }, []string{"offset 16: a capacity of 9007199254740992 sectors needs"}},
		{"se: capacity below the descriptor's", se, func(l *layout) { l.put64(16, 99999) }, []string{"capacity of 99999 sectors", "descriptor gives the extent 100000"}},
		{"se: capacity above the descriptor's", se, func(l *layout) { l.put64(16, 100008) }, []string{"capacity of 100008 sectors", "descriptor gives the extent 100000"}},
		{"se: grain size 0", se, func(l *layout) { l.put64(24, 0) }, []string{"offset 24: grain size of 0 sectors"}},
		{"se: grain size no power of two", se, func(l *layout) { l.put64(24, 12) }, []string{"offset 24: grain size of 12 sectors"}},
		{"se: grain size absurd", se, func(l *layout) { l.put64(24, 1<<63) }, []string{"offset 24: grain size of 9223372036854775808 sectors"}},
		{"se: table size 0", se, func(l *layout) { l.put64(32, 0) }, []string{"offset 32: grain tables of 0 sectors, want 1 to 1024"}},
		{"se: table size absurd", se, func(l *layout) { l.put64(32, 1<<60) }, []string{"offset 32: grain tables of 1152921504606846976 sectors"}},
		{"se: flags", se, func(l *layout) { l.put64(40, 2) }, []string{"offset 40: flags is 0x2, want 0"}},
		{"se: reserved", se, func(l *layout) { l.put64(72, 1) }, []string{"offset 72: a reserved field is 0x1, want 0"}},
		{"se: padding", se, func(l *layout) { l.file[511] = 1 }, []string{"offset 208: the 304 bytes up to the end of the header are not zeros"}},
		{"se: volatile header past the end", se, func(l *layout) { l.put64(seVolatileAt, 1<<30) }, []string{"volatile header at offset 549755813888 needs 512 bytes"}},
		{"se: volatile header absurd", se, func(l *layout) { l.put64(seVolatileAt, 1<<63) }, []string{"offset 80: the volatile header at sector 9223372036854775808, of 1 sectors, would end past 8 EiB"}},
		{"se: volatile header in the header", se, func(l *layout) { l.put64(seVolatileAt, 0) }, []string{"the header, bytes 0 to 512", "the volatile header, from byte 0 on, overlap"}},
		{"se: no volatile header", se, func(l *layout) { l.put64(512, 0) }, []string{"volatile header at offset 512: found 0x0, want 0xcafecafe"}},
		{"se: journal to replay", se, func(l *layout) { l.put64(512+24, 1) }, []string{"volatile header at offset 512: the journal must be replayed", "is 0x1, want 0", "let ESXi open and close the disk"}},
		{"se: volatile padding", se, func(l *layout) { l.file[1023] = 1 }, []string{"volatile header at offset 512", "are not zeros"}},
		{"se: directory past the end", se, func(l *layout) { l.put64(seDirectoryAt, 1<<30) }, []string{"grain directory at offset 549755813888 needs 512 bytes, but the file has"}},
		{"se: directory absurd", se, func(l *layout) { l.put64(seDirectoryAt+8, 1<<63) }, []string{"offset 128: the grain directory at sector 8, of 9223372036854775808 sectors, would end past 8 EiB"}},
		{"se: directory too short", se, func(l *layout) { l.put64(seDirectoryAt+8, 0) }, []string{"offset 136: the grain directory has 0 bytes, want 32 or more"}},
		{"se: directory in the volatile header", se, func(l *layout) { l.put64(seDirectoryAt, 1) }, []string{"volatile header", "grain directory", "overlap"}},
		{"se: directory truncated", se, cut(func(l *layout) int64 { return l.gd + 100 }), []string{"grain directory at offset 4096 needs 512 bytes, but the file has 4196"}},
		{"se: tables over the directory", se, func(l *layout) { l.put64(seTablesAt, 3); l.put64(seTablesAt+8, 64) }, []string{"grain tables, bytes 1536 to", "grain directory, from byte", "overlap"}},
		{"se: tables absurd", se, func(l *layout) { l.put64(seTablesAt+8, 1<<60) }, []string{"offset 144: the grain tables at sector 9, of 1152921504606846976 sectors, would end past 8 EiB"}},
		{"se: grains in the tables", se, func(l *layout) { l.put64(seGrainsAt, 70) }, []string{"grain tables", "grains, from byte 35840 on, overlap"}},
		{"se: directory entry unknown", se, func(l *layout) { l.put64(l.gd+8, 2<<60) }, []string{"grain directory's entry at offset 4104, of grain table 1", "the value of the entry is 0x2000000000000000, want 0 (no grain table), or 0x1000000000000000 plus the number of a grain table"}},
		{"se: directory entry without a mark", se, func(l *layout) { l.put64(l.gd+8, 1) }, []string{"entry at offset 4104", "the value of the entry is 0x1, want 0"}},
		{"se: table out of the room", se, func(l *layout) { l.put64(l.gd+8, 1<<60|5) }, []string{"entry at offset 4104", "grain table 5 of the file, but the file has room for 5"}},
		{"se: table far out", se, func(l *layout) { l.put64(l.gd+8, 1<<61-1) }, []string{"entry at offset 4104", "the file has room for 5"}},
		{"se: table truncated", delta{se: true, capacity: 100000, grains: grains(4096, 4100)}, cut(func(l *layout) int64 { return l.tables[1] + 1 }), []string{"grain table 1 at offset", "needs 32768 bytes"}},
		{"se: entry unknown", se, func(l *layout) { l.put64(l.tables[0]+8, 4<<60|7) }, []string{"grain at disk offset 4096, stored at an unknown offset", "0x4000000000000007"}},
		{"se: entry unknown, all bits", se, func(l *layout) { l.put64(l.tables[0]+8, 1<<64-1) }, []string{"grain at disk offset 4096, stored at an unknown offset", "0xffffffffffffffff"}},
		{"se: entry of no kind", se, func(l *layout) { l.put64(l.tables[0]+16, 7) }, []string{"grain at disk offset 8192", "0x7,"}},
		{"se: grain past the end", se, func(l *layout) { l.put64(l.tables[0]+16, seEntry(5)) }, []string{"grain at disk offset 8192, stored at offset", "the file is truncated or damaged"}},
		{"se: grain far past the end", se, func(l *layout) { l.put64(l.tables[0]+16, 1<<62-1) }, []string{"grain at disk offset 8192", "0x3fffffffffffffff, which means grain 1152921504606846975 of the file"}},
		{"se: grain truncated", se, func(l *layout) { l.file = l.file[:len(l.file)-1] }, []string{"grain at disk offset 36864000, stored at offset", "truncated"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			path, l := c.x.described(t, dir, "disk.vmdk", "")
			c.damage(l)
			extent := filepath.Join(dir, "disk-delta.vmdk")
			if c.x.se {
				extent = filepath.Join(dir, "disk-sesparse.vmdk")
			}
			write(t, dir, filepath.Base(extent), l.file)
			wantError(t, readError(t, path), extent, append(c.want, extent)...)
			// Extents must not report zeros for a range that cannot be read.
			d, err := open(t, path)
			if err != nil {
				return
			}
			p := make([]byte, 4096)
			for e, err := range source.Covered(t.Context(), d, 0, d.Size()) {
				if err != nil {
					wantError(t, err, extent, c.want...)
					return
				}
				for off := e.Off; e.Kind == source.Zero && off < e.End(); off += 1 << 20 {
					if _, err := d.ReadAt(p[:min(int64(len(p)), e.End()-off)], off); err != nil && err != io.EOF {
						t.Fatalf("%+v reads as %v", e, err)
					}
				}
			}
		})
	}
}

// TestDeltaAlone opens the files of extents instead of their descriptors, which is
// refused.
func TestDeltaAlone(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		name string
		se   bool
		want []string
	}{
		{"vm-000001-delta.vmdk", false, []string{"a vmfsSparse (COWD) extent", "part of a disk", `probably "` + dir + `/vm-000001.vmdk"`}},
		{"vm-000001-sesparse.vmdk", true, []string{"a seSparse extent", "part of a disk", `probably "` + dir + `/vm-000001.vmdk"`}},
		{"x", false, []string{"a vmfsSparse (COWD) extent", "open the .vmdk file that describes the disk"}},
	} {
		path := write(t, dir, c.name, delta{se: c.se, capacity: 100}.build().file)
		_, err := open(t, path)
		wantError(t, err, path, c.want...)
	}
}

// TestMissingDelta opens descriptors whose delta files do not exist.
func TestMissingDelta(t *testing.T) {
	for kind, extent := range map[string]string{"VMFSSPARSE": "vm-delta.vmdk", "SESPARSE": "vm-sesparse.vmdk"} {
		dir := t.TempDir()
		path := write(t, dir, "vm.vmdk", fmt.Appendf(nil, "# Disk DescriptorFile\nRW 100 %s %q\n", kind, extent))
		_, err := open(t, path)
		wantError(t, err, path, "line 2", `extent "`+extent+`"`, filepath.Join(dir, extent)+": no such file")
	}
}

// TestDeltaReadErrors reads a disk whose file becomes shorter after the disk was
// opened.
func TestDeltaReadErrors(t *testing.T) {
	for _, x := range []delta{{capacity: 3000, grains: grains(512, 1, 2, 3)}, {se: true, capacity: 3000, grains: grains(4096, 1, 2, 3)}} {
		path, l := x.described(t, t.TempDir(), "disk.vmdk", "")
		d := mustOpen(t, path)
		content(t, d)
		extent := filepath.Join(filepath.Dir(path), "disk-delta.vmdk")
		if x.se {
			extent = filepath.Join(filepath.Dir(path), "disk-sesparse.vmdk")
		}
		if err := os.Truncate(extent, l.grains[2]+10); err != nil {
			t.Fatal(err)
		}
		_, err := d.ReadAt(make([]byte, 1<<20), 0)
		wantError(t, err, extent, "grain at disk offset", "when it was opened")
		if !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error(err)
		}
	}
}

// TestHugeDeltas opens deltas of the largest disks. Their directories have only one
// grain at the end, or tables that are holes of the file.
func TestHugeDeltas(t *testing.T) {
	for _, c := range []struct {
		se, tables bool
		capacity   int64
	}{{false, false, 1<<32 - 1}, {false, true, 1<<32 - 1}, {true, false, 62 << 40 / sector}, {true, true, 62 << 40 / sector}} {
		x := delta{se: c.se, capacity: 1, grains: map[int64][]byte{0: random(1, 512)}}.defaults()
		l := x.build()
		perTable := x.entries() * x.grain
		n := (c.capacity-1)/perTable + 1
		x.capacity = c.capacity
		// The directory moves to the end of the file. The tables are in a hole after
		// it.
		gd := l.room(0, 1<<20)
		at := (gd + n*x.entrySize() + 1<<20) / sector
		directory := &layout{file: make([]byte, n*x.entrySize())}
		for i := range n {
			switch {
			case c.se && c.tables:
				directory.put64(i*8, 1<<60|uint64(i+1))
			case c.tables:
				directory.put32(i*4, uint32(at+i*x.table))
			}
		}
		if c.se {
			l.put64(16, uint64(c.capacity))
			l.put64(seDirectoryAt, uint64(gd/sector))
			l.put64(seDirectoryAt+8, uint64((n*8+sector-1)/sector))
			l.put64(seTablesAt, uint64(at))
			l.put64(seTablesAt+8, uint64((n+1)*x.table))
			grainsAt := at + (n+1)*x.table
			directory.put64(0, 1<<60)
			l.put64(seGrainsAt, uint64(grainsAt))
		} else {
			l.put32(12, uint32(c.capacity))
			l.put32(20, uint32(gd/sector))
			l.put32(24, uint32(n))
			directory.put32(0, uint32(l.tables[0]/sector))
		}
		dir := t.TempDir()
		extent := write(t, dir, "extent", l.file)
		f, err := os.OpenFile(extent, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(directory.file, gd); err != nil {
			t.Fatal(err)
		}
		size := at*sector + (n+1)*x.table*sector
		if c.se {
			entry := binary.LittleEndian.AppendUint64(nil, seEntry(0))
			if _, err := f.WriteAt(entry, at*sector); err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(x.grains[0], size); err != nil {
				t.Fatal(err)
			}
			size += 4096
		}
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		f.Close()
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		d := mustOpen(t, write(t, dir, "x.vmdk", fmt.Appendf(nil, "# Disk DescriptorFile\nRW %d SPARSE \"extent\"\n", c.capacity)))
		g := x.grain * sector
		want := []source.Extent{{Len: g}, {Off: g, Len: c.capacity*sector - g, Kind: source.Zero, Absent: true}}
		if got := extents(t, d); !slices.Equal(got, want) {
			t.Errorf("%+v: %+v, want %+v", c, got, want)
		}
		p := make([]byte, 1<<20)
		if _, err := d.ReadAt(p, 0); err != nil || !bytes.Equal(p[:512], x.grains[0]) || !bytes.Equal(p[512:], make([]byte, len(p)-512)) {
			t.Errorf("%+v: the beginning of the disk: %v", c, err)
		}
		if _, err := d.ReadAt(p, d.Size()-int64(len(p))); err != nil && err != io.EOF || !bytes.Equal(p, make([]byte, len(p))) {
			t.Errorf("%+v: the end of the disk: %v", c, err)
		}
		runtime.ReadMemStats(&after)
		// Hardly more memory than the pages of the directory may be allocated.
		if got := int64(after.TotalAlloc - before.TotalAlloc); got > 2*n*x.entrySize()+8<<20 {
			t.Errorf("%+v: %d bytes allocated for a directory of %d", c, got, n*x.entrySize())
		}
		var held runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&held)
		if got := int64(held.HeapAlloc) - int64(before.HeapAlloc); got > 8<<20 {
			t.Errorf("%+v: %d bytes more are held", c, got)
		}
	}
}
