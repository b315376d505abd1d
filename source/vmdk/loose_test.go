package vmdk_test

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"github.com/vddkcp/vddkcp/internal/peer"
)

// TestLooseTable opens images in which an entry of the grain directory points to zeros
// in the metadata that belong to no structure of the file.
func TestLooseTable(t *testing.T) {
	im := image{redundant: true, entries: 4, capacity: 3000, grains: grains(65536, 0, 1, 9, 20), descriptor: monolithic}.defaults()
	plain := im
	plain.redundant = false
	empty := plain
	empty.grains = grains(65536, 0, 20) // tables 1 to 4 have nothing
	for _, c := range []struct {
		name   string
		im     image
		damage func(l *layout, padding uint32)
		want   []string // of one warning; nil: none
		wrong  bool     // the content
	}{
		{"sound", im, func(*layout, uint32) {}, nil, false},
		{"sound, one directory", plain, func(*layout, uint32) {}, nil, false},
		{"sound, empty tables", empty, func(*layout, uint32) {}, nil, false},
		{"one entry", im, func(l *layout, padding uint32) { l.put32(l.gd+8, padding) }, []string{"1 of 6 grain tables are read through the redundant grain directory", "grain table 2 is at offset", "which is not next to the previous or the following table; the redundant grain directory has another table"}, false},
		{"first and last entry", im, func(l *layout, padding uint32) { l.put32(l.gd, padding); l.put32(l.gd+20, padding+1) }, []string{"2 of 6 grain tables", "grain table 0 is at offset"}, false},
		{"redundant entry", im, func(l *layout, padding uint32) { l.put32(l.rgd+8, padding) }, nil, false},
		{"another entry of both", im, func(l *layout, padding uint32) { l.put32(l.gd+8, padding); l.put32(l.rgd, padding+1) }, []string{"1 of 6 grain tables", "grain table 2 is at offset"}, false},
		{"table of the redundant directory", im, func(l *layout, padding uint32) {
			l.put32(l.gd+8, binary.LittleEndian.Uint32(l.file[l.rgd:]))
		}, []string{"1 of 6 grain tables", "grain table 2 is at offset"}, false},
		{"one directory, last entry", plain, func(l *layout, padding uint32) { l.put32(l.gd+20, padding) }, []string{"1 of 6 grain tables are empty and do not lie next to the previous or the following table", "grain table 5, at offset"}, true},
		{"one directory, two entries", plain, func(l *layout, padding uint32) { l.put32(l.gd+8, padding); l.put32(l.gd+12, padding+3) }, []string{"2 of 6 grain tables are empty", "grain table 2, at offset"}, true},
		{"one directory, an empty table left out", plain, func(l *layout, _ uint32) { l.put32(l.gd+4, 0) }, nil, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			l := c.im.build()
			at := l.gd + 6*4
			padding := uint32((at + sector - 1) / sector) // behind the directory, below overHead
			c.damage(l, padding)
			path := write(t, t.TempDir(), "x.vmdk", l.file)
			d := mustOpen(t, path)
			checkWarnings(t, d.Warnings(), path, c.want)
			if !c.wrong {
				if !bytes.Equal(content(t, d), c.im.content()) {
					t.Error("another content")
				}
				checkExtents(t, c.im, d)
			}
		})
	}
}

// TestLooseTableOfQemu moves each entry of the directory of an image that qemu
// wrote into the padding of its metadata.
func TestLooseTableOfQemu(t *testing.T) {
	peer.Need(t, "qemu-img")
	dir := t.TempDir()
	want := make([]byte, 200<<20)
	for i := range 6 {
		copy(want[i<<25:], random(uint64(i), 1<<20))
	}
	raw, path := write(t, dir, "x.raw", want), dir+"/x.vmdk"
	peer.Run(t, "qemu-img", "convert", "-f", "raw", "-O", "vmdk", raw, path)
	whole := readFile(t, path)
	gd, rgd := int64(binary.LittleEndian.Uint64(whole[56:]))*sector, int64(binary.LittleEndian.Uint64(whole[48:]))*sector
	overhead := int64(binary.LittleEndian.Uint64(whole[64:])) * sector
	for _, i := range []int64{0, 1, 5} {
		for _, padding := range []int64{overhead - 4*sector, rgd + 17*sector, gd - 4*sector} {
			l := &layout{file: bytes.Clone(whole)}
			l.put32(gd+i*4, uint32(padding/sector))
			d := mustOpen(t, write(t, dir, "one.vmdk", l.file))
			if !bytes.Equal(content(t, d), want) {
				t.Errorf("entry %d leads to offset %d: another content", i, padding)
			}
			checkWarnings(t, d.Warnings(), "one.vmdk", []string{"of 7 grain tables are read through the redundant grain directory"})
		}
	}
}

// TestGrainsOverlap opens images in which table entries point into another grain.
func TestGrainsOverlap(t *testing.T) {
	im := image{entries: 64, grain: 8, capacity: 1000, grains: grains(4096, 0, 1, 9, 64, 70), descriptor: monolithic}.defaults()
	for _, by := range []int64{-8, -7, -1, 1, 7} {
		l := im.build()
		at := uint32(l.grains[9]/sector + by)
		l.put32(im.gte(l, 9), at)
		path := write(t, t.TempDir(), "x.vmdk", l.file)
		if by > 0 {
			l.put32(im.gte(l, 1), uint32(l.grains[9]/sector))
			write(t, t.TempDir(), "x.vmdk", l.file)
			path = write(t, t.TempDir(), "x.vmdk", l.file)
		}
		err := readError(t, path)
		wantError(t, err, path, fmt.Sprintf("grain table 0 at offset %d: two grains of 4096 bytes overlap, at offsets ", l.tables[0]), "the table is damaged")
		d := mustOpen(t, path)
		if _, err := d.ReadAt(make([]byte, 4096), 70*4096); err != nil {
			t.Errorf("a read by the other table: %v", err)
		}
	}
	// The grains may be in any order in the file.
	l := im.build()
	for i, g := range []int64{9, 0, 1} {
		l.put32(im.gte(l, g), uint32(l.grains[[]int64{0, 1, 9}[i]]/sector))
	}
	if _, err := mustOpen(t, write(t, t.TempDir(), "x.vmdk", l.file)).ReadAt(make([]byte, 4096), 4096); err != nil {
		t.Error(err)
	}
}

// TestTableBetweenNeighbours opens images without a redundant directory, in which an
// entry of the directory does not point to the table between its neighbours.
func TestTableBetweenNeighbours(t *testing.T) {
	im := image{entries: 4, capacity: 3000, grains: grains(65536, 0, 1, 9, 20), descriptor: monolithic}.defaults()
	for _, entry := range []uint32{0, 1} {
		l := im.build()
		if entry > 0 {
			entry = uint32((l.gd + 6*4 + sector - 1) / sector) // padding
		}
		l.put32(l.gd+8, entry)
		path := write(t, t.TempDir(), "x.vmdk", l.file)
		wantError(t, readError(t, path), path, fmt.Sprintf("but the table lies at offset %d, between the previous and the following table: the directory is damaged", l.tables[2]), "grain table 2")
		checkWarnings(t, mustOpen(t, path).Warnings(), path, nil)
	}
}
