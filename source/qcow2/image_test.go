package qcow2_test

import (
	"bytes"
	"compress/flate"
	"encoding/binary"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// image describes an image that the tests make, with features that qemu-img does not
// write.
type image struct {
	version  uint32 // 0: 3
	bits     uint   // of a cluster; 0: 16
	size     int64
	clusters map[int64][]byte // by number; nil bytes: marked as zeros
	packed   string           // "": plain, "zlib" or "zstd"
	extended bool
	features uint64 // more of them
	backing  string
	format   string // of it
	data     string // the name of a data file
	names    string // a feature name table
}

// layout has the offsets of the parts of an image in its file, in bytes.
type layout struct {
	file   []byte
	l1     int64
	tables []int64 // 0: not there
	entry  int64   // bytes of an L2 entry
	bits   uint
}

func (l *layout) put8(off int64, v uint8)   { l.file[off] = v }
func (l *layout) put32(off int64, v uint32) { binary.BigEndian.PutUint32(l.file[off:], v) }
func (l *layout) put64(off int64, v uint64) { binary.BigEndian.PutUint64(l.file[off:], v) }
func (l *layout) get64(off int64) uint64    { return binary.BigEndian.Uint64(l.file[off:]) }

// l2 is the offset in the file of the L2 entry of cluster c.
func (l *layout) l2(c int64) int64 {
	perTable := int64(1) << l.bits / l.entry
	return l.tables[c/perTable] + c%perTable*l.entry
}

// append puts b at the next multiple of align, and returns its offset.
func (l *layout) append(b []byte, align int64) int64 {
	at := (int64(len(l.file)) + align - 1) / align * align
	l.file = append(l.file, make([]byte, at-int64(len(l.file)))...)
	l.file = append(l.file, b...)
	return at
}

func random(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 7))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte('a' + r.IntN(8)) // compresses to half
	}
	return b
}

func deflated(b []byte) []byte {
	var out bytes.Buffer
	w, _ := flate.NewWriter(&out, 6)
	w.Write(b)
	w.Close()
	return out.Bytes()
}

func zstandard(b []byte, options ...zstd.EOption) []byte {
	w, _ := zstd.NewWriter(nil, append(options, zstd.WithEncoderConcurrency(1))...)
	defer w.Close()
	return w.EncodeAll(b, nil)
}

func (im image) build() *layout {
	if im.version == 0 {
		im.version = 3
	}
	if im.bits == 0 {
		im.bits = 16
	}
	cluster := int64(1) << im.bits
	l := &layout{file: make([]byte, cluster), bits: im.bits, entry: 8}
	if im.extended {
		l.entry = 16
		im.features |= 1 << 4
	}
	perTable := cluster / l.entry
	clusters := (im.size + cluster - 1) / cluster
	n := (clusters + perTable - 1) / perTable
	l.l1 = l.append(make([]byte, n*8), cluster)
	l.tables = make([]int64, n)

	l.put32(0, 0x514649fb)
	l.put32(4, im.version)
	l.put32(20, uint32(im.bits))
	l.put64(24, uint64(im.size))
	l.put32(36, uint32(n))
	l.put64(40, uint64(l.l1))
	at := int64(72)
	if im.version == 3 {
		at = 112
		if im.data != "" {
			im.features |= 1 << 2
		}
		if im.packed == "zstd" {
			im.features |= 1 << 3
			l.put8(104, 1)
		}
		l.put64(72, im.features)
		l.put32(96, 4)
		l.put32(100, 112)
	}
	extension := func(kind uint32, text string) {
		if text == "" {
			return
		}
		l.put32(at, kind)
		l.put32(at+4, uint32(len(text)))
		copy(l.file[at+8:], text)
		at += 8 + (int64(len(text))+7)&^7
	}
	extension(0xe2792aca, im.format)
	extension(0x44415441, im.data)
	extension(0x6803f857, im.names)
	extension(0x12345678, "unknown")
	if im.backing != "" {
		at += 8
		l.put64(8, uint64(at))
		l.put32(16, uint32(len(im.backing)))
		copy(l.file[at:], im.backing)
	}

	for c := range clusters {
		b, ok := im.clusters[c]
		if !ok {
			continue
		}
		if l.tables[c/perTable] == 0 {
			t := l.append(make([]byte, cluster), cluster)
			l.tables[c/perTable] = t
			l.put64(l.l1+c/perTable*8, uint64(t)|1<<63)
		}
		switch {
		case b == nil && im.extended:
			l.put64(l.l2(c)+8, 0xffffffff<<32)
		case b == nil:
			l.put64(l.l2(c), 1)
		case im.data != "":
			l.put64(l.l2(c), uint64(c*cluster)|1<<63)
		case im.packed != "":
			p := deflated(b)
			if im.packed == "zstd" {
				p = zstandard(b)
			}
			l.pack(c, p)
		default:
			l.put64(l.l2(c), uint64(l.append(b, cluster))|1<<63)
			if im.extended {
				l.put64(l.l2(c)+8, 0xffffffff)
			}
		}
	}
	return l
}

// pack appends p as the compressed bytes of cluster c.
func (l *layout) pack(c int64, p []byte) {
	if len(l.file)%int(1<<l.bits) == 0 {
		l.file = append(l.file, 0, 0, 0) // at no round offset
	}
	l.packedAt(c, l.append(p, 1), int64(len(p)))
}

// packedAt points the entry of cluster c to n compressed bytes.
func (l *layout) packedAt(c, at, n int64) {
	sectors := (at+n-1)/512 - at/512
	l.put64(l.l2(c), 1<<62|uint64(sectors)<<(62-(l.bits-8))|uint64(at))
}

// content returns the content of the disk, without a backing file.
func (im image) content() []byte {
	bits := im.bits
	if bits == 0 {
		bits = 16
	}
	all := make([]byte, im.size)
	for c, b := range im.clusters {
		copy(all[min(c<<bits, im.size):], b)
	}
	return all
}

// some returns n random bytes for each of the given clusters, by the number of the
// cluster.
func some(n int, clusters ...int64) map[int64][]byte {
	all := map[int64][]byte{}
	for _, c := range clusters {
		all[c] = random(uint64(c), n)
	}
	return all
}

func write(t testing.TB, dir, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}
