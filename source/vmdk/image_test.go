package vmdk_test

import (
	"bytes"
	"compress/zlib"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
)

const sector = 512

// image describes a sparse extent that the tests make, with features that qemu-img does
// not write.
type image struct {
	version    uint32           // 0: 1
	grain      int64            // sectors; 0: 128
	entries    int64            // of a grain table; 0: 512
	capacity   int64            // sectors
	grains     map[int64][]byte // by number; nil bytes: marked as zeros
	redundant  bool
	compressed bool
	noMarkers  bool
	footer     bool
	bare       bool   // no grain tables, nothing but markers; with footer, one without a directory
	tight      bool   // no room behind the descriptor
	noTables   bool   // grain tables without a grain are left out
	descriptor string // "": none; "%d" is the capacity
}

// layout has the offsets of the parts of an image in its file, in bytes.
type layout struct {
	file   []byte
	header int64 // the one that has the grain directory
	gd     int64
	rgd    int64 // 0: none
	tables []int64
	grains map[int64]int64
}

func (l *layout) put32(off int64, v uint32) { binary.LittleEndian.PutUint32(l.file[off:], v) }
func (l *layout) put64(off int64, v uint64) { binary.LittleEndian.PutUint64(l.file[off:], v) }

// gte is the offset in the file of the table entry of grain g.
func (im image) gte(l *layout, g int64) int64 { return l.tables[g/im.entries] + g%im.entries*4 }

// defaults returns im with the default values of the fields that are zero.
func (im image) defaults() image {
	im.version = max(im.version, 1)
	if im.grain == 0 {
		im.grain = 128
	}
	if im.entries == 0 {
		im.entries = 512
	}
	return im
}

const monolithic = "# Disk DescriptorFile\nversion=1\nCID=1234abcd\nparentCID=ffffffff\ncreateType=\"monolithicSparse\"\nRW %d SPARSE \"x.vmdk\"\nddb.adapterType = \"ide\"\n"

// content returns the expected content of the disk.
func (im image) content() []byte {
	im = im.defaults()
	all := make([]byte, im.capacity*sector)
	for g, b := range im.grains {
		copy(all[g*im.grain*sector:], b)
	}
	return all
}

func (im image) build() *layout {
	im = im.defaults()
	l := &layout{grains: map[int64]int64{}}
	pad := func(unit int64) {
		for int64(len(l.file))%unit != 0 {
			l.file = append(l.file, 0)
		}
	}
	end := func() int64 { pad(sector); return int64(len(l.file)) }
	le := binary.LittleEndian
	l.file = make([]byte, sector)
	descriptorSize := int64(0)
	if im.descriptor != "" {
		text := im.descriptor
		if bytes.Contains([]byte(text), []byte("%d")) {
			text = fmt.Sprintf(text, im.capacity)
		}
		l.file = append(l.file, text...)
		descriptorSize = max(20, end()/sector-1)
		if im.tight {
			descriptorSize = end()/sector - 1
		}
		l.file = append(l.file, make([]byte, (descriptorSize+1)*sector-end())...)
	}
	nGrains := (im.capacity-1)/im.grain + 1
	nTables := (nGrains-1)/im.entries + 1
	has := make([]bool, nTables)
	for g := range im.grains {
		has[g/im.entries] = true
	}
	marker := func(kind, sectors uint32) {
		if im.compressed && !im.noMarkers {
			m := make([]byte, sector)
			le.PutUint64(m, uint64(sectors))
			le.PutUint32(m[12:], kind)
			end()
			l.file = append(l.file, m...)
		}
	}
	var copies [][]int64 // of tables
	metadata := func() int64 {
		if im.bare {
			return 0
		}
		tables := make([]int64, nTables)
		for i := range tables {
			if !im.noTables || has[i] {
				marker(1, uint32((im.entries*4+sector-1)/sector))
				tables[i] = end()
				l.file = append(l.file, make([]byte, im.entries*4)...)
			}
		}
		marker(2, uint32((nTables*4+sector-1)/sector))
		gd := end()
		for _, at := range tables {
			l.file = le.AppendUint32(l.file, uint32(at/sector))
		}
		end()
		copies = append(copies, tables)
		l.tables, l.gd = tables, gd
		return gd
	}
	if !im.footer {
		if im.redundant {
			l.rgd = metadata()
		}
		metadata()
	}
	if !im.compressed {
		pad(im.grain * sector)
	}
	overhead := end() / sector
	for g := range nGrains {
		b := im.grains[g]
		if b == nil {
			continue
		}
		l.grains[g] = end()
		if !im.compressed {
			l.file = append(append(l.file, b...), make([]byte, im.grain*sector-int64(len(b)))...)
			continue
		}
		var packed bytes.Buffer
		w := zlib.NewWriter(&packed)
		w.Write(b)
		w.Close()
		if !im.noMarkers {
			l.file = le.AppendUint64(l.file, uint64(g*im.grain))
			l.file = le.AppendUint32(l.file, uint32(packed.Len()))
		}
		l.file = append(l.file, packed.Bytes()...)
	}
	if im.footer {
		metadata()
	}
	for g, b := range im.grains {
		for _, tables := range copies {
			v := uint32(1)
			if b != nil {
				v = uint32(l.grains[g] / sector)
			}
			l.put32(tables[g/im.entries]+g%im.entries*4, v)
		}
	}
	h := make([]byte, sector)
	copy(h, "KDMV")
	flags := uint32(1)
	if l.rgd != 0 {
		flags |= 2
	}
	for _, b := range im.grains {
		if b == nil {
			flags |= 4
		}
	}
	if im.compressed {
		flags |= 1 << 16
		le.PutUint16(h[77:], 1)
		if !im.noMarkers {
			flags |= 1 << 17
		}
	}
	le.PutUint32(h[4:], im.version)
	le.PutUint32(h[8:], flags)
	le.PutUint64(h[12:], uint64(im.capacity))
	le.PutUint64(h[20:], uint64(im.grain))
	if descriptorSize > 0 {
		le.PutUint64(h[28:], 1)
		le.PutUint64(h[36:], uint64(descriptorSize))
	}
	le.PutUint32(h[44:], uint32(im.entries))
	le.PutUint64(h[48:], uint64(l.rgd/sector))
	le.PutUint64(h[56:], uint64(l.gd/sector))
	le.PutUint64(h[64:], uint64(overhead))
	copy(h[73:], "\n \r\n")
	copy(l.file, h)
	if im.footer {
		le.PutUint64(l.file[56:], 1<<64-1)
		marker(3, 1)
		l.header = end()
		l.file = append(l.file, h...)
	}
	if im.footer || im.bare {
		end()
		l.file = append(l.file, make([]byte, sector)...)
	}
	end()
	return l
}

// random returns n bytes that compress to about half their size.
func random(seed uint64, n int64) []byte {
	r := rand.New(rand.NewPCG(seed, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32()) & 15
	}
	return b
}

// grains makes grains of random bytes.
func grains(size int64, numbers ...int64) map[int64][]byte {
	m := map[int64][]byte{}
	for _, g := range numbers {
		m[g] = random(uint64(g), size)
	}
	return m
}

// write writes a file of the test's folder, and returns its path.
func write(t testing.TB, dir, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
