package qcow2_test

import (
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
)

// TestBadHeaders opens images whose headers are damaged or describe features that
// are not supported.
func TestBadHeaders(t *testing.T) {
	feature := func(kind, bit byte, name string) string {
		return string([]byte{kind, bit}) + name + strings.Repeat("\x00", 46-len(name))
	}
	for _, c := range []struct {
		name   string
		im     image
		damage func(l *layout)
		want   string
	}{
		{"empty", image{}, func(l *layout) { l.file = nil }, "the file is empty"},
		{"no magic", image{}, func(l *layout) { l.put32(0, 0x51464900) }, `found "QFI\x00" at offset 0, want "QFI\xfb"`},
		{"short", image{}, func(l *layout) { l.file = l.file[:71] }, "the file has 71 bytes, but a qcow2 header has 72: the file is truncated"},
		{"short 3", image{}, func(l *layout) { l.file = l.file[:103] }, "a qcow2 header of version 3 has at least 104: the file is truncated"},
		{"version 1", image{version: 1}, nil, "of QCOW version 1"},
		{"version 4", image{version: 4}, nil, "version 4 at offset 4, want 2 or 3"},
		{"cluster 256", image{}, func(l *layout) { l.put32(20, 8) }, "cluster_bits 8 at offset 20, want 9 to 21"},
		{"cluster 4M", image{}, func(l *layout) { l.put32(20, 22) }, "cluster_bits 22"},
		{"cluster absurd", image{}, func(l *layout) { l.put32(20, 1<<31) }, "cluster_bits 2147483648"},
		{"header short", image{}, func(l *layout) { l.put32(100, 96) }, "header_length 96 at offset 100"},
		{"header odd", image{}, func(l *layout) { l.put32(100, 107) }, "header_length 107"},
		{"header long", image{bits: 9}, func(l *layout) { l.put32(100, 520) }, "header_length 520"},
		{"size absurd", image{}, func(l *layout) { l.put64(24, 1<<63) }, "size 9223372036854775808 at offset 24"},
		{"size for L1", image{}, func(l *layout) { l.put64(24, 1<<40) }, "l1_size 1 at offset 36: a disk of 1099511627776 bytes with clusters of 65536 bytes needs 2048 entries"},
		{"L1 absurd", image{}, func(l *layout) { l.put32(36, 4<<20+1) }, "l1_size 4194305 at offset 36, want at most 4194304"},
		{"L1 misaligned", image{}, func(l *layout) { l.put64(40, 65536+512) }, "l1_table_offset 66048 at offset 40"},
		{"L1 nowhere", image{}, func(l *layout) { l.put64(40, 0) }, "l1_table_offset 0"},
		{"L1 outside", image{}, func(l *layout) { l.put64(40, 1<<30) }, "the file is truncated or damaged"},
		{"L1 far outside", image{}, func(l *layout) { l.put64(40, 1<<63-1<<16) }, "l1_table_offset"},
		{"AES", image{}, func(l *layout) { l.put32(32, 1) }, "encrypted with AES"},
		{"LUKS", image{}, func(l *layout) { l.put32(32, 2) }, "encrypted with LUKS"},
		{"encrypted anyhow", image{}, func(l *layout) { l.put32(32, 3) }, "crypt_method 3"},
		{"refcounts", image{}, func(l *layout) { l.put32(96, 7) }, "refcount_order 7 at offset 96"},
		{"corrupt", image{features: 2}, nil, "marked as corrupt (incompatible feature bit 1): its tables may be wrong; make a copy of the image, and repair the copy with qemu-img check -r all"},
		{"unknown features", image{features: 1<<7 | 1<<63, names: feature(1, 7, "other") + feature(0, 7, "time travel") + feature(0, 63, strings.Repeat("x", 46))}, nil,
			`incompatible_features at offset 72 has bit 7 ("time travel"), bit 63 ("` + strings.Repeat("x", 46) + `") set`},
		{"unknown feature", image{features: 1 << 5}, nil, "has bit 5 set"},
		{"small subclusters", image{bits: 13, features: 1 << 4}, nil, "cluster_bits 13 at offset 20, want at least 14"},
		{"compression unsaid", image{}, func(l *layout) { l.put8(104, 1) }, "compression_type is 1 at offset 104"},
		{"compression said", image{features: 1 << 3}, nil, "compression_type is 0"},
		{"compression unknown", image{features: 1 << 3}, func(l *layout) { l.put8(104, 2) }, "compression_type 2 at offset 104, want 0 (zlib) or 1 (zstd)"},
		{"data file unnamed", image{features: 1 << 2}, nil, "the header extension with the name of that file is missing"},
		{"backing name long", image{backing: strings.Repeat("x", 1024)}, nil, "backing_file_size 1024 at offset 16, want at most 1023"},
		{"backing name outside", image{}, func(l *layout) { l.put64(8, 1<<40) }, "backing_file_offset 1099511627776 at offset 8"},
		{"backing name inside", image{}, func(l *layout) { l.put64(8, 100) }, "backing_file_offset 100"},
		{"backing name at the end", image{}, func(l *layout) { l.put64(8, 65530); l.put32(16, 7) }, "backing_file_size 7"},
		{"extension long", image{}, func(l *layout) { l.put32(116, 0xffffffff) }, "header extension 0x12345678 at offset 112 has 4294967295 bytes"},
		{"format long", image{format: strings.Repeat("x", 2000)}, nil, "a name of 2000 bytes"},
		{"format zero", image{format: "raw\x00"}, nil, `the name "raw\x00" has a zero byte`},
	} {
		c.im.size = 100 << 16
		l := c.im.build()
		if c.damage != nil {
			c.damage(l)
		}
		path := write(t, t.TempDir(), "x.qcow2", l.file)
		if _, err := opened(t, path); err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasPrefix(err.Error(), path) {
			t.Errorf("%s: %v, want %q", c.name, err, c.want)
		}
	}
}

// TestBadTables opens images with damaged table entries. A read that reaches one
// fails, and the rest of the disk can be read.
func TestBadTables(t *testing.T) {
	plain := image{size: 8 << 16, clusters: some(65536, 0, 1, 2, 3)}
	zlib := plain
	zlib.packed = "zlib"
	zstd := plain
	zstd.packed = "zstd"
	old := plain
	old.version = 2
	sub := plain
	sub.extended = true
	data := plain
	data.data = "data"
	set := func(entry uint64) func(*layout) { return func(l *layout) { l.put64(l.l2(1), entry) } }
	for _, c := range []struct {
		name   string
		im     image
		damage func(l *layout)
		want   string
	}{
		{"misaligned", plain, set(1<<63 | 4<<16 | 512), "L2 entry 0x8000000000040200 at offset 131080: the cluster is at offset 262656, want a multiple of the cluster size of 65536"},
		{"outside", plain, set(1<<63 | 1<<40), "the cluster is at offset 1099511627776 of "},
		{"in the header", plain, set(1 << 63), "the cluster is at offset 0, where the header is"},
		{"in L1", plain, set(1<<63 | 1<<16), "the cluster at offset 65536 lies in the header or the L1 table"},
		{"in the L2 table", plain, func(l *layout) { l.put64(l.l2(1), 1<<63|uint64(l.tables[0])) }, "lies in an L2 table: the table is damaged"},
		{"packed in an L2 table", zlib, func(l *layout) { l.put64(l.l2(1), 1<<62|uint64(l.tables[0]+1000)) }, ", in an L2 table: the L2 table is damaged"},
		{"reserved", plain, set(1<<63 | 4<<16 | 1<<57), "the entry has reserved bits set (0x200000000000000)"},
		{"reserved below", plain, set(1<<63 | 4<<16 | 4), "the entry has reserved bits set (0x4)"},
		{"zeros in version 2", old, set(1), "not possible in an image of version 2"},
		{"zeros with subclusters", sub, set(1), "or with subclusters"},
		{"subcluster is both", sub, func(l *layout) { l.put64(l.l2(1)+8, 1<<32|1) }, "bitmap 0x100000001 marks subclusters as both allocated and zero"},
		{"subcluster is nowhere", sub, func(l *layout) { l.put64(l.l2(1), 0) }, "allocated although there is no cluster"},
		{"data file elsewhere", data, set(1<<63 | 2<<16), "the cluster is at offset 131072 of the data file, want offset 65536"},
		{"data file packed", data, set(1<<62 | 5<<16), "which is not possible in an image with a data file"},
		{"L1 misaligned", plain, func(l *layout) { l.put64(l.l1, 1<<63|2<<16|512) }, "the L2 table is at offset 131584, want a multiple of the cluster size of 65536"},
		{"L1 outside", plain, func(l *layout) { l.put64(l.l1, 1<<63|1<<40) }, "the L2 table at offset 1099511627776 needs 64 bytes, but the file has"},
		{"L1 reserved", plain, func(l *layout) { l.put64(l.l1, 1<<62|2<<16) }, "L1 entry 0x4000000000020000 at offset 65536, for disk offset 0: the entry has reserved bits set"},
		{"L1 in itself", plain, func(l *layout) { l.put64(l.l1, 1<<16) }, "the L2 table at offset 65536 lies in the header or the L1 table"},
		{"packed outside", zlib, set(1<<62 | 1<<40), "the compressed bytes are at offset 1099511627776, but the file has"},
		{"packed in the header", zlib, set(1<<62 | 1000), "the compressed bytes are at offset 1000, in the header"},
		{"packed shorter", zlib, func(l *layout) { l.pack(1, deflated(random(1, 65535))) }, "the compressed bytes unpack to 65535 bytes, want 65536"},
		{"packed longer", zlib, func(l *layout) { l.pack(1, deflated(random(1, 65537))) }, "the compressed bytes unpack to more than a cluster (65536 bytes)"},
		{"packed wrong", zlib, func(l *layout) { l.pack(1, []byte(strings.Repeat("\xff", 600))) }, "the compressed bytes are damaged"},
		{"packed size", zlib, func(l *layout) { l.put64(l.l2(1), l.get64(l.l2(1))&(1<<54-1)|1<<62) }, "the compressed bytes are damaged"},
		{"packed cut", zlib, func(l *layout) { l.pack(1, random(1, 0)); l.append(deflated(random(1, 65536))[:900], 1) }, "damaged"},
		{"zstd shorter", zstd, func(l *layout) { l.pack(1, zstandard(random(1, 65535))) }, "the compressed bytes unpack to 65535 bytes, want 65536"},
		{"zstd longer", zstd, func(l *layout) { l.pack(1, zstandard(random(1, 65537))) }, "the compressed bytes unpack to more than a cluster (65536 bytes)"},
		{"zstd longer in two", zstd, func(l *layout) { l.pack(1, append(zstandard(random(1, 60000)), zstandard(random(1, 60000))...)) }, "the compressed bytes unpack to more than a cluster (65536 bytes)"},
		{"zstd wrong", zstd, func(l *layout) { l.pack(1, random(1, 600)) }, "not a zstd frame"},
		{"zstd cut", zstd, func(l *layout) { l.pack(1, zstandard(random(1, 65536))[:1000]) }, "is truncated at byte"},
		{"truncated", image{size: 8 << 16, clusters: some(65536, 2, 1)}, func(l *layout) { l.put64(l.l2(1), l.get64(l.l2(2))); l.file = l.file[:len(l.file)-1] }, "the cluster is at offset 262144 of "},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := c.im.build()
			c.damage(l)
			dir := t.TempDir()
			write(t, dir, "data", make([]byte, c.im.size))
			path := write(t, dir, "x.qcow2", l.file)
			d := mustOpen(t, path)
			_, err := d.ReadAt(make([]byte, 65536), 65536)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), path) {
				t.Fatalf("%v, want %q", err, c.want)
			}
			if strings.HasPrefix(c.name, "L1") {
				return
			}
			if !strings.Contains(err.Error(), "disk offset 65536") {
				t.Errorf("the error does not say where: %v", err)
			}
			if _, err := d.ReadAt(make([]byte, 65536), 5<<16); err != nil {
				t.Errorf("the rest: %v", err)
			}
			// A damaged range is reported as data, so that nobody takes it for zeros.
			for m, err := range source.Map(t.Context(), d, 65536, 65536) {
				if err != nil || m.Kind != source.Data {
					t.Errorf("%+v, %v", m, err)
				}
				if m.File != nil && m.Pos+m.Len > int64(len(l.file)) {
					t.Errorf("%+v lies outside the file", m)
				}
			}
		})
	}
}
