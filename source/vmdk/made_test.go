package vmdk_test

import (
	"bytes"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
)

// TestMadeImages reads images with features that qemu-img does not write.
func TestMadeImages(t *testing.T) {
	stream := func(im image) image {
		im.compressed, im.descriptor = true, strings.Replace(monolithic, "monolithicSparse", "streamOptimized", 1)
		return im
	}
	for _, c := range []struct {
		name string
		im   image
	}{
		{"version 2", image{version: 2, capacity: 1000, grains: grains(65536, 1, 3, 4)}},
		{"version 3", image{version: 3, capacity: 1000, grains: grains(65536, 0, 2)}},
		{"empty", image{capacity: 100000}},
		{"empty without tables", image{capacity: 100000, noTables: true}},
		{"one sector", image{capacity: 1, grains: grains(512, 0)}},
		{"grain of 1 sector", image{grain: 1, capacity: 3000, grains: grains(512, 0, 1, 2, 7, 511, 512, 513, 1024, 2999)}},
		{"grain of 8 sectors", image{grain: 8, capacity: 9001, grains: grains(4096, 0, 1, 2, 7, 511, 512, 513, 1024)}},
		{"grain of 16 MiB", image{grain: 32768, capacity: 40000, grains: grains(16<<20, 0)}},
		{"tables of 3 entries", image{entries: 3, capacity: 5000, grains: grains(65536, 0, 2, 3, 4, 11, 20)}},
		{"tables of 4096 entries", image{entries: 4096, grain: 8, capacity: 50000, grains: grains(4096, 0, 4095, 4096, 5000)}},
		{"tables left out", image{noTables: true, grain: 8, capacity: 50000, grains: grains(4096, 1024, 1025, 5000)}},
		{"marked zeros", image{capacity: 3000, grains: map[int64][]byte{0: nil, 1: random(1, 65536), 2: nil, 3: nil, 7: random(7, 65536)}}},
		{"redundant", image{redundant: true, capacity: 3000, grains: grains(65536, 3, 1)}},
		{"last grain", image{capacity: 200, grains: grains(65536, 0, 1)}},
		{"stream", stream(image{capacity: 4096, grains: grains(65536, 0, 1, 2, 9, 31)})},
		{"stream with a footer", stream(image{footer: true, capacity: 4096, grains: grains(65536, 0, 1, 2, 9, 31)})},
		{"stream of version 3", stream(image{version: 3, footer: true, noTables: true, entries: 4, capacity: 3900, grains: grains(65536, 0, 1, 2, 3, 4, 5, 6, 7, 20, 21, 30)})},
		{"stream without markers", stream(image{noMarkers: true, capacity: 4096, grains: grains(65536, 0, 1, 2, 9, 31)})},
		{"stream with the last grain whole", stream(image{capacity: 200, grains: grains(65536, 0, 1)})},
		{"stream with the last grain cut", stream(image{capacity: 200, grains: map[int64][]byte{0: random(5, 65536), 1: random(6, 72*512)}})},
		{"stream of small grains", stream(image{grain: 8, capacity: 9001, grains: grains(4096, 0, 1, 2, 7, 511, 512, 513, 1024)})},
		{"stream of large grains", stream(image{grain: 2048, capacity: 9000, grains: grains(1<<20, 0, 1, 3)})},
		{"stream with marked zeros", stream(image{capacity: 2000, grains: map[int64][]byte{0: nil, 1: random(1, 65536), 2: nil, 3: random(3, 65536)}})},
	} {
		t.Run(c.name, func(t *testing.T) {
			im := c.im.defaults()
			if im.descriptor == "" {
				im.descriptor = monolithic
			}
			path := write(t, t.TempDir(), "x.vmdk", im.build().file)
			want := im.content()
			d := mustOpen(t, path)
			checkExtents(t, im, d)
			if !bytes.Equal(content(t, d), want) {
				t.Fatal("another content")
			}
			if len(want) < 1<<20 { // the suite reads a disk many times
				conforms(t, path, want)
			}
		})
	}
}

// checkExtents checks what is allocated in an image without a parent.
func checkExtents(t *testing.T, im image, d source.Disk) {
	t.Helper()
	for _, e := range extents(t, d) {
		for off := e.Off; off < e.End(); off += im.grain * sector {
			b, has := im.grains[off/sector/im.grain]
			want := source.Extent{Kind: source.Zero, Absent: true}
			if has {
				want = source.Extent{Kind: source.Data}
				if b == nil {
					want.Kind = source.Zero
				}
			}
			if e.Kind != want.Kind || e.Absent != want.Absent || e.Depth != 0 {
				t.Fatalf("%+v at %d, want %+v", e, off, want)
			}
		}
	}
}

// TestScatteredStream reads a stream whose grains are in another order than in the
// disk. Some of its grains are larger because of the compression.
func TestScatteredStream(t *testing.T) {
	im := image{compressed: true, capacity: 20 * 128, descriptor: monolithic}.defaults()
	im.grains = map[int64][]byte{}
	for g := range int64(20) {
		im.grains[g] = random(uint64(g), 65536)
	}
	l := im.build()
	// Each odd grain is written again at the end of the file, with a marker of its own
	// and not compressed.
	for g := int64(1); g < 20; g += 2 {
		at := int64(len(l.file))
		b := im.grains[g]
		stored := storedZlib(b, 1000) // 65 bytes of overhead for each 1000: 70 KiB
		m := make([]byte, 12)
		l.file = append(l.file, m...)
		l.put64(at, uint64(g*128))
		l.put32(at+8, uint32(len(stored)))
		l.file = append(l.file, stored...)
		l.file = append(l.file, make([]byte, -len(l.file)&511)...)
		l.put32(im.gte(l, g), uint32(at/sector))
	}
	conforms(t, write(t, t.TempDir(), "x.vmdk", l.file), im.content())
}

// storedZlib returns a zlib stream of b in stored blocks of n bytes. Empty blocks
// between them make the stream longer.
func storedZlib(b []byte, n int) []byte {
	out := []byte{0x78, 0x01}
	sum := adler(b)
	for len(b) > 0 {
		k := min(n, len(b))
		for range 12 {
			out = append(out, 0, 0, 0, 0xff, 0xff)
		}
		out = append(out, 0, byte(k), byte(k>>8), ^byte(k), ^byte(k>>8))
		out = append(out, b[:k]...)
		b = b[k:]
	}
	out = append(out, 1, 0, 0, 0xff, 0xff)
	return append(out, byte(sum>>24), byte(sum>>16), byte(sum>>8), byte(sum))
}

func adler(p []byte) uint32 {
	a, b := uint32(1), uint32(0)
	for _, c := range p {
		a = (a + uint32(c)) % 65521
		b = (b + a) % 65521
	}
	return b<<16 | a
}

// TestRedundantDirectory reads images whose primary directory is damaged.
func TestRedundantDirectory(t *testing.T) {
	im := image{redundant: true, entries: 4, capacity: 3000, grains: grains(65536, 0, 1, 9, 20), descriptor: monolithic}.defaults()
	for _, c := range []struct {
		name   string
		damage func(*layout)
	}{
		{"none", func(l *layout) {}},
		{"no primary", func(l *layout) { l.put64(56, 0) }},
		{"primary past the end", func(l *layout) { l.put64(56, 1<<40) }},
		{"primary is zeros", func(l *layout) { clear(l.file[l.gd : l.gd+24]) }},
		{"entries past the end", func(l *layout) { l.put32(l.gd, 0xfffffff0); l.put32(l.gd+8, 1<<30) }},
		{"redundant past the end", func(l *layout) { l.put64(48, 1<<40) }},
		{"redundant entries past the end", func(l *layout) { l.put32(l.rgd, 0xfffffff0) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := im.build()
			c.damage(l)
			d := mustOpen(t, write(t, t.TempDir(), "x.vmdk", l.file))
			if !bytes.Equal(content(t, d), im.content()) {
				t.Error("another content")
			}
			checkExtents(t, im, d)
		})
	}
}

// TestTrailingZeros reads a stream with zeros after its end, which a transfer may add.
func TestTrailingZeros(t *testing.T) {
	im := image{compressed: true, footer: true, capacity: 1000, grains: grains(65536, 1, 3), descriptor: monolithic}
	l := im.build()
	for _, n := range []int{1, 511, 512, 9000} {
		d := mustOpen(t, write(t, t.TempDir(), "x.vmdk", append(slices.Clone(l.file), make([]byte, n)...)))
		if !bytes.Equal(content(t, d), im.content()) {
			t.Errorf("%d bytes more: another content", n)
		}
	}
}

// TestMixedExtents reads a disk with extents of all supported types, two extents in the
// same file, and a descriptor with unusual spellings.
func TestMixedExtents(t *testing.T) {
	dir := t.TempDir()
	flat := random(1, 300*sector)
	write(t, dir, "a flat.vmdk", flat)
	write(t, dir, "vmfs-flat.vmdk", flat[:100*sector])
	im := image{capacity: 384, grains: grains(65536, 1)}
	write(t, dir, "s001.vmdk", im.build().file)
	packed := image{compressed: true, footer: true, capacity: 256, grains: grains(65536, 0, 1)}
	write(t, dir, "straße.vmdk", packed.build().file)

	want := slices.Concat(flat[10*sector:110*sector], make([]byte, 50*sector), im.content()[:300*sector], flat[:100*sector], packed.content(), flat[:300*sector], make([]byte, 7*sector))
	lines := []string{
		"# Disk DescriptorFile", "version=1", `encoding="UTF-8"`, "CID=fffffffe", "parentCID=FFFFFFFF", `createType="custom"`, "",
		"# Extent description",
		`RW 100 FLAT "a flat.vmdk" 10`, `RW 50 ZERO`, `RDONLY 300 SPARSE "s001.vmdk"`, `RW 100 VMFS "vmfs-flat.vmdk"`,
		`RW 256 SPARSE "straße.vmdk"`, `RW 300 FLAT "a flat.vmdk" 0 some-partition-uuid device`, "NOACCESS 7 ZERO", `RW 0 SPARSE "nothing.vmdk"`,
		"# Change Tracking File", `changeTrackPath="disk-ctk.vmdk"`,
		"# The Disk Data Base", "#DDB", `ddb.adapterType = "lsilogic"`, `ddb.toolsVersion = "10341"`, `ddb.unknown.key = "a = b"`,
	}
	text := strings.Join(lines, "\n") + "\n"
	odd := func(s string) string {
		s = strings.NewReplacer("RW ", "  rw\t  ", " FLAT ", "\tflat  ", " SPARSE", "  Sparse ", "ZERO", "zero  ", "CID=", "cid =  ", "encoding=", "ENCODING = ", "createType", "CreateTYPE", `"s001.vmdk"`, "s001.vmdk", `VMFS "vmfs`, `VMFS"vmfs`).Replace(s)
		return strings.ReplaceAll(s, `VMFS"`, `VMFS  "`)
	}
	for name, text := range map[string]string{
		"plain":         text,
		"CRLF":          strings.ReplaceAll(text, "\n", "\r\n"),
		"BOM":           "\xef\xbb\xbf" + text,
		"blank lines":   "\n \n\r\n" + strings.ReplaceAll(text, "\n", "\n\n"),
		"odd":           odd(text),
		"no newline":    strings.TrimSuffix(text, "\n"),
		"zeros behind":  text + strings.Repeat("\x00", 5000) + "\xff",
		"spaces":        strings.ReplaceAll(text, "\n", "  \n\t "),
		"no signature":  strings.TrimPrefix(text, "# Disk DescriptorFile\n"),
		"windows-1252":  strings.ReplaceAll(strings.Replace(text, "UTF-8", "windows-1252", 1), "ß", "\xdf"),
		"ISO-8859-1":    strings.ReplaceAll(strings.Replace(text, "UTF-8", "ISO-8859-1", 1), "ß", "\xdf"),
		"no encoding":   strings.Replace(text, "encoding=\"UTF-8\"\n", "", 1),
		"long database": text + strings.Repeat("ddb.x = \"y\"\n", 50000),
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, dir, name+".vmdk", []byte(text))
			d := mustOpen(t, path)
			if !bytes.Equal(content(t, d), want) {
				t.Fatal("another content")
			}
			if i := d.Info(); i.CID != "fffffffe" || !strings.EqualFold(i.Subformat, "custom") || i.AdapterType != "lsilogic" || i.ClusterSize != 65536 {
				t.Errorf("%+v", i)
			}
			if name == "plain" {
				conforms(t, path, want)
				in := func(name string) string { return filepath.Join(dir, name) }
				parts := []source.Part{
					{Kind: "FLAT", Size: 100 * sector, Path: in("a flat.vmdk"), Offset: 10 * sector}, {Kind: "ZERO", Size: 50 * sector},
					{Kind: "SPARSE", Size: 300 * sector, Path: in("s001.vmdk")}, {Kind: "VMFS", Size: 100 * sector, Path: in("vmfs-flat.vmdk")},
					{Kind: "SPARSE", Size: 256 * sector, Path: in("straße.vmdk")}, {Kind: "FLAT", Size: 300 * sector, Path: in("a flat.vmdk")},
					{Kind: "ZERO", Size: 7 * sector},
				}
				if i := d.Info(); !slices.Equal(i.Parts, parts) || i.ToolsVersion != "10341" {
					t.Errorf("tools version %q, parts %+v\nwant 10341, %+v", i.ToolsVersion, i.Parts, parts)
				}
			}
		})
	}
}

// TestFlatTypes reads disks of all types whose extents are flat.
func TestFlatTypes(t *testing.T) {
	for _, kind := range []string{"vmfs", "vmfsThin", "vmfsPreallocated", "vmfsEagerZeroedThick", "monolithicFlat", "twoGbMaxExtentFlat", "2GbMaxExtentFlat", "somethingNew"} {
		dir := t.TempDir()
		want := random(3, 200*sector)
		write(t, dir, "x-flat.vmdk", want)
		d := mustOpen(t, write(t, dir, "x.vmdk", fmt.Appendf(nil, "# Disk DescriptorFile\nversion=3\nCID=1\nparentCID=ffffffff\ncreateType=%q\nRW 200 VMFS \"x-flat.vmdk\"\n", kind)))
		if !bytes.Equal(content(t, d), want) {
			t.Errorf("%s: another content", kind)
		}
		if f, pos, n, ok := d.InFile(77); !ok || filepath.Base(f.Name()) != "x-flat.vmdk" || pos != 77 || n > int64(len(want))-77 {
			t.Errorf("%s: InFile(77) is %v, %d, %d, %v", kind, f, pos, n, ok)
		}
	}
}

// TestDeepChain reads a chain of five images, each with a grain of its own. One grain
// is hidden by zeros, and the CIDs differ in width and case.
func TestDeepChain(t *testing.T) {
	dir := t.TempDir()
	cids := []string{"1", "0000BEEF", "0xabcdef", "12345678", "Fedcba98"}
	var want []byte
	for i := range 5 {
		parent, hint := "ffffffff", ""
		if i > 0 {
			parent, hint = strings.ToUpper(cids[i-1]), fmt.Sprintf("parentFileNameHint=\"disk %d.vmdk\"\n", i-1)
		}
		im := image{grain: 8 << i, capacity: 4096, descriptor: fmt.Sprintf("# Disk DescriptorFile\nversion=1\nCID=%s\nparentCID=%s\ncreateType=\"monolithicSparse\"\n%sRW %%d SPARSE \"x\"\n", cids[i], parent, hint)}
		im.grains = grains(8<<i*sector, int64(i), 10)
		im.grains[5] = nil
		write(t, dir, fmt.Sprintf("disk %d.vmdk", i), im.build().file)
		below := want
		want = im.content()
		for g := range int64(len(want)) / (8 << i * sector) {
			if _, has := im.grains[g]; !has && below != nil {
				copy(want[g*(8<<i*sector):(g+1)*(8<<i*sector)], below[g*(8<<i*sector):])
			}
		}
	}
	path := filepath.Join(dir, "disk 4.vmdk")
	d := mustOpen(t, path)
	if got := len(d.Info().Chain); got != 5 {
		t.Errorf("%d images in the chain", got)
	}
	depths := map[int]bool{}
	for _, e := range extents(t, d) {
		depths[e.Depth] = true
		if e.Absent && e.Depth != 4 {
			t.Errorf("%+v, want depth 4", e)
		}
	}
	if len(depths) != 5 {
		t.Errorf("depths %v", depths)
	}
	conforms(t, path, want)
}

// TestZeroExtentHidesParent tests that a ZERO extent of a child reads as zeros and not
// as the parent.
func TestZeroExtentHidesParent(t *testing.T) {
	dir := t.TempDir()
	base := random(9, 200*sector)
	write(t, dir, "base-flat.vmdk", base)
	write(t, dir, "base.vmdk", []byte("# Disk DescriptorFile\nCID=7\nparentCID=ffffffff\nRW 200 FLAT \"base-flat.vmdk\"\n"))
	write(t, dir, "delta.vmdk", image{capacity: 100}.build().file)
	d := mustOpen(t, write(t, dir, "child.vmdk", []byte("# Disk DescriptorFile\nCID=8\nparentCID=00000007\nparentFileNameHint=\"base.vmdk\"\nRW 100 SPARSE \"delta.vmdk\"\nRW 100 ZERO\n")))
	if want := slices.Concat(base[:100*sector], make([]byte, 100*sector)); !bytes.Equal(content(t, d), want) {
		t.Error("another content")
	}
	want := []source.Extent{{Len: 100 * sector, Depth: 1}, {Off: 100 * sector, Len: 100 * sector, Kind: source.Zero}}
	if got := extents(t, d); !slices.Equal(got, want) {
		t.Errorf("extents %+v, want %+v", got, want)
	}
	if f, pos, n, ok := d.InFile(sector); !ok || filepath.Base(f.Name()) != "base-flat.vmdk" || pos != sector || n != 99*sector {
		t.Errorf("InFile of the parent: %v, %d, %d, %v", f, pos, n, ok)
	}
}

// TestNoAccess tests that a disk with a NOACCESS extent can be opened, and that reading
// this extent fails.
func TestNoAccess(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, "f", random(1, 10*sector))
	d := mustOpen(t, write(t, dir, "x.vmdk", []byte("# Disk DescriptorFile\nCID=7\nRW 10 FLAT \"f\"\nNOACCESS 10 FLAT \"secret\"\n")))
	if parts := d.Info().Parts; len(parts) != 2 || parts[1] != (source.Part{Kind: "FLAT", Size: 10 * sector, Path: "secret"}) {
		t.Errorf("parts %+v", parts)
	}
	p := make([]byte, 10*sector)
	if _, err := d.ReadAt(p, 0); err != nil {
		t.Error(err)
	}
	if _, err := d.ReadAt(p, sector); err == nil || err == io.EOF || !strings.Contains(err.Error(), "offset 5120 is declared NOACCESS in line 4") {
		t.Errorf("error %v", err)
	}
}
