package vmdk_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
	"github.com/vddkcp/vddkcp/source"
)

// TestTablesInTheWrongPlace opens images whose grain directories and tables overlap
// each other or another structure of the file. Extents must not report zeros for their
// grains.
func TestTablesInTheWrongPlace(t *testing.T) {
	plain := image{capacity: 300, entries: 128, grain: 1, grains: grains(512, 0, 1, 9, 130, 290), descriptor: monolithic}
	stream := plain
	stream.compressed = true
	footer := stream
	footer.footer = true
	both := func(l *layout, i int64, v uint32) {
		l.put32(l.gd+i*4, v)
		if l.rgd > 0 {
			l.put32(l.rgd+i*4, v)
		}
	}
	redundant := plain
	redundant.redundant = true
	for _, c := range []struct {
		name   string
		im     image
		damage func(*layout)
		want   []string
	}{
		{"table in the descriptor", plain, func(l *layout) { both(l, 1, 2) }, []string{"grain table 1 at offset 1024, according to the grain directory's entry at offset ", "lies in the descriptor, bytes 512 to 10752 of the file: the directory is damaged"}},
		{"table at the end of the descriptor", plain, func(l *layout) { both(l, 0, 20) }, []string{"grain table 0 at offset 10240", "lies in the descriptor"}},
		{"table in the descriptor, by both directories", redundant, func(l *layout) { both(l, 0, 3) }, []string{"grain table 0 at offset 1536", "lies in the descriptor"}},
		{"table in the directory", plain, func(l *layout) { both(l, 2, uint32(l.gd/sector)) }, []string{"grain table 2 at offset", "lies in the grain directory, bytes"}},
		{"table in the redundant directory", redundant, func(l *layout) { l.put32(l.gd, uint32(l.rgd/sector)); l.put32(l.rgd, 1<<30) }, []string{"grain table 0 at offset", "lies in the redundant grain directory, bytes"}},
		{"two tables at one place", plain, func(l *layout) { both(l, 1, uint32(l.tables[0]/sector)) }, []string{"overlaps another grain table: the directory is damaged"}},
		{"the last table in another", plain, func(l *layout) { both(l, 2, uint32(l.tables[0]/sector)) }, []string{"grain table 2 at offset", "overlaps the other grain tables at bytes"}},
		{"directory in the header", plain, func(l *layout) { l.put64(48, 0); l.put64(56, 1) }, []string{"the grain directory at sector 1, bytes 512 to 524 of the file, lies in the descriptor, bytes 512 to 10752: the header is damaged"}},
		{"directory in the descriptor", plain, func(l *layout) { l.put64(56, 10) }, []string{"the grain directory at sector 10", "lies in the descriptor"}},
		{"both directories in the descriptor", redundant, func(l *layout) { l.put64(48, 5); l.put64(56, 10) }, []string{"the grain directory at sector 10", "lies in the descriptor"}},
		{"grain in a table that overHead leaves out", plain, func(l *layout) { l.put64(64, 0); l.put32(l.tables[0], uint32(l.tables[1]/sector)) }, []string{"grain at disk offset 0, stored at offset", "lies in the grain tables, bytes"}},
		{"grain in the last table", plain, func(l *layout) { l.put64(64, 0); l.put32(l.tables[0], uint32(l.tables[2]/sector)) }, []string{"grain at disk offset 0, stored at offset", "lies in the grain table, bytes"}},
		{"grain in its own table", plain, func(l *layout) { l.put64(64, 0); l.put32(l.tables[0]+8, uint32(l.tables[0]/sector)) }, []string{"grain at disk offset 1024, stored at offset", "lies in the grain tables, bytes"}},
		{"grain in the descriptor", plain, func(l *layout) { l.put64(64, 0); l.put32(l.tables[0], 4) }, []string{"grain at disk offset 0, stored at offset 2048", "lies in the descriptor, bytes 512 to 10752"}},
		{"grain in the redundant directory's table", redundant, func(l *layout) {
			l.put64(64, 0)
			l.put32(l.tables[0], binary.LittleEndian.Uint32(l.file[l.rgd:]))
		}, []string{"grain at disk offset 0, stored at offset", "lies in the grain tables, bytes"}},

		{"stream: table in the descriptor", stream, func(l *layout) { both(l, 0, 2) }, []string{"grain table 0 at offset 1024", "lies in the descriptor"}},
		{"stream: grain in a table", stream, func(l *layout) { l.put64(64, 0); l.put32(l.tables[0], uint32(l.tables[1]/sector)) }, []string{"grain at disk offset 0, stored at offset", "lies in the grain tables"}},
		{"footer: table in the descriptor", footer, func(l *layout) { both(l, 0, 2) }, []string{"grain table 0 at offset 1024", "lies in the descriptor"}},
		{"footer: table in the footer", footer, func(l *layout) { both(l, 0, uint32(l.header/sector)) }, []string{"grain table 0 at offset", "lies in the footer"}},
		{"footer: directory in the descriptor", footer, func(l *layout) { l.put64(l.header+56, 9) }, []string{"the grain directory at sector 9", "lies in the descriptor"}},
		{"footer: directory in the footer", footer, func(l *layout) { l.put64(l.header+56, uint64(l.header/sector)) }, []string{"the grain directory at sector", "lies in the footer"}},
		{"footer: grain in a table", footer, func(l *layout) { l.put32(l.tables[0], uint32(l.tables[1]/sector)) }, []string{"grain at disk offset 0, stored at offset", "lies in the grain tables"}},
		{"footer: grain in the directory", footer, func(l *layout) { l.put32(l.tables[0], uint32(l.gd/sector)) }, []string{"grain at disk offset 0, stored at offset", "lies in the grain directory"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := c.im.build()
			c.damage(l)
			path := write(t, t.TempDir(), "x.vmdk", l.file)
			wantError(t, readError(t, path), path, c.want...)
			if !strings.HasPrefix(c.want[0], "grain table") {
				return
			}
			d := mustOpen(t, path)
			var err error
			for _, err = range source.Covered(t.Context(), d, 0, d.Size()) {
				if err != nil {
					break
				}
			}
			wantError(t, err, path, c.want...)
		})
	}
}

// TestRedundantDirectoryWarns tests that there is a warning if, and only if, the
// redundant directory is used.
func TestRedundantDirectoryWarns(t *testing.T) {
	im := image{redundant: true, entries: 4, capacity: 3000, grains: grains(65536, 0, 1, 9, 20), descriptor: monolithic}.defaults()
	stream := image{redundant: true, compressed: true, entries: 4, capacity: 3000, grains: grains(65536, 0, 1, 9, 20), descriptor: monolithic}.defaults()
	for _, c := range []struct {
		name   string
		damage func(*layout)
		want   []string // of one warning; nil: none
	}{
		{"none", func(l *layout) {}, nil},
		{"no primary", func(l *layout) { l.put64(56, 0) }, []string{"all grain tables are read through the redundant grain directory at offset ", "no grain directory (its sector is 0)"}},
		{"primary past the end", func(l *layout) { l.put64(56, 1<<40) }, []string{"all grain tables are read through the redundant", "the grain directory at sector 1099511627776 needs"}},
		{"primary in the descriptor", func(l *layout) { l.put64(56, 3) }, []string{"all grain tables are read through the redundant", "lies in the descriptor"}},
		{"primary is zeros", func(l *layout) { clear(l.file[l.gd : l.gd+24]) }, []string{"the grain directory is damaged: 6 of 6 grain tables are read through the redundant grain directory; the first of them: the grain directory's entry at offset ", "of grain table 0, is 0"}},
		{"entries past the end", func(l *layout) { l.put32(l.gd, 0xfffffff0); l.put32(l.gd+8, 1<<30) }, []string{"2 of 6 grain tables", "grain table 0 at offset", "needs 16 bytes"}},
		{"entry in the descriptor", func(l *layout) { l.put32(l.gd+8, 2) }, []string{"1 of 6 grain tables", "grain table 2 at offset 1024", "lies in the descriptor"}},
		{"entry of another table", func(l *layout) { l.put32(l.gd+4, uint32(l.tables[0]/sector)) }, []string{"2 of 6 grain tables", "overlaps another grain table"}},
		{"redundant past the end", func(l *layout) { l.put64(48, 1<<40) }, nil},
		{"redundant is the primary", func(l *layout) { l.put64(48, uint64(l.gd/sector)) }, nil},
		{"redundant entries past the end", func(l *layout) { l.put32(l.rgd, 0xfffffff0) }, nil},
	} {
		for kind, im := range map[string]image{"sparse": im, "stream": stream} {
			t.Run(kind+" "+c.name, func(t *testing.T) {
				l := im.build()
				c.damage(l)
				path := write(t, t.TempDir(), "x.vmdk", l.file)
				d := mustOpen(t, path)
				if !bytes.Equal(content(t, d), im.content()) {
					t.Error("another content")
				}
				checkExtents(t, im, d)
				checkWarnings(t, d.Warnings(), path, c.want)
			})
		}
	}
	// The warnings of a child include those of its parent.
	dir := t.TempDir()
	l := im.build()
	l.put64(56, 0)
	write(t, dir, "base.vmdk", l.file)
	child := image{capacity: 3000, descriptor: strings.Replace(monolithic, "parentCID=ffffffff", "parentCID=1234abcd\nparentFileNameHint=\"base.vmdk\"", 1)}
	d := mustOpen(t, write(t, dir, "child.vmdk", child.build().file))
	checkWarnings(t, d.Warnings(), "base.vmdk", []string{"all grain tables"})
}

// TestTableBehindMetadata opens an image in which an entry of the directory points to
// zeros in a grain. It looks like the entry of a table that was moved.
func TestTableBehindMetadata(t *testing.T) {
	im := image{capacity: 3000, entries: 4, grains: map[int64][]byte{0: make([]byte, 65536), 9: random(1, 65536)}, descriptor: monolithic}.defaults()
	l := im.build()
	path := write(t, t.TempDir(), "x.vmdk", l.file)
	checkWarnings(t, mustOpen(t, path).Warnings(), path, nil)
	l.put32(l.gd+8, uint32(l.grains[0]/sector))
	write(t, filepath.Dir(path), "x.vmdk", l.file)
	checkWarnings(t, mustOpen(t, path).Warnings(), path, []string{"the grain directory may be damaged: 1 of 6 grain tables lie after the end of the metadata (overHead)", fmt.Sprintf("the first of these tables is at offset %d", l.grains[0])})
}

// TestEmptyDirectory opens a stream whose header says that the grain directory is at
// zeros in a grain table, and an empty disk.
func TestEmptyDirectory(t *testing.T) {
	im := image{compressed: true, capacity: 30000, grains: grains(65536, 0, 1, 9, 20), descriptor: monolithic}.defaults()
	l := im.build()
	l.put64(56, uint64(l.tables[0]/sector)+1)
	path := write(t, t.TempDir(), "x.vmdk", l.file)
	checkWarnings(t, mustOpen(t, path).Warnings(), path, []string{"the grain directory at offset", "may be damaged: it has no grain table, but the file has"})
	for _, im := range []image{{capacity: 1 << 30, noTables: true, descriptor: monolithic}, {capacity: 1 << 30, noTables: true, compressed: true, footer: true, descriptor: monolithic}} {
		path := write(t, t.TempDir(), "x.vmdk", im.build().file)
		checkWarnings(t, mustOpen(t, path).Warnings(), path, nil)
	}
}

// checkWarnings checks that there is one warning, which names the file and contains all
// of want. If want is nil, there must be no warning.
func checkWarnings(t *testing.T, got []string, path string, want []string) {
	t.Helper()
	if want == nil {
		if len(got) != 0 {
			t.Errorf("warnings %q, want none", got)
		}
		return
	}
	if len(got) != 1 {
		t.Fatalf("warnings %q, want one", got)
	}
	for _, w := range append(slices.Clone(want), path) {
		if !strings.Contains(got[0], w) {
			t.Errorf("warning %q\nwant %q in it", got[0], w)
		}
	}
}

// TestDirectoriesOverlap opens an image whose redundant directory begins inside the
// primary one.
func TestDirectoriesOverlap(t *testing.T) {
	im := image{redundant: true, entries: 1, grain: 1, capacity: 300, grains: grains(512, 0, 1, 9, 20), descriptor: monolithic}.defaults()
	l := im.build()
	l.put64(48, uint64(l.gd/sector)+1)
	path := write(t, t.TempDir(), "x.vmdk", l.file)
	_, err := open(t, path)
	wantError(t, err, path, "the grain directory, bytes", "the redundant grain directory, from byte", "overlap")
}

// TestTablesOfQemu damages an image that qemu wrote in each sector of its
// header and descriptor.
func TestTablesOfQemu(t *testing.T) {
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	want := random(1, 2<<20)
	raw := write(t, dir, "x.raw", want)
	for _, subformat := range []string{"monolithicSparse", "streamOptimized"} {
		path := dir + "/" + subformat + ".vmdk"
		peer.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", "-o", "subformat="+subformat, raw, path)
		if d := mustOpen(t, path); !bytes.Equal(content(t, d), want) || len(d.Warnings()) != 0 {
			t.Fatalf("%s: another content, or warnings %q", subformat, d.Warnings())
		}
		whole := readFile(t, path)
		at := int64(bytes.LastIndex(whole, []byte("KDMV")))
		if binary.LittleEndian.Uint64(whole[56:]) != 1<<64-1 {
			at = 0
		}
		gd := int64(binary.LittleEndian.Uint64(whole[at+56:])) * sector
		rgd := int64(binary.LittleEndian.Uint64(whole[at+48:])) * sector
		for _, s := range []uint32{1, 2, 3, 10, 20} {
			l := &layout{file: bytes.Clone(whole)}
			l.put32(gd, s)
			one := write(t, dir, "one.vmdk", l.file)
			if rgd > 0 && rgd != gd {
				d := mustOpen(t, one)
				if !bytes.Equal(content(t, d), want) {
					t.Errorf("%s: another content by the redundant directory", subformat)
				}
				checkWarnings(t, d.Warnings(), one, []string{"lies in the descriptor"})
				l.put32(rgd, s)
			}
			both := write(t, dir, "both.vmdk", l.file)
			wantError(t, readError(t, both), both, "grain table 0", "lies in the descriptor")
		}
	}
}
