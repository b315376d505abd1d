package vmdk_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/source/vmdk"
)

var writeSeeds = flag.Bool("write-seeds", false, "write the seeds of the fuzz targets into testdata")

// nowhere is an Opener that accepts any name of an extent, and has no parents.
func nowhere(_ context.Context, _, name, format string) (source.Disk, error) {
	if format != "raw" {
		return nil, errors.New("no parents here")
	}
	return sourcetest.Pattern(1<<20, source.Extent{Len: 1 << 20}), nil
}

// fuzzFolder is a vmdk.Folder that has one parent, by its UUID.
type fuzzFolder struct{}

func (fuzzFolder) Names(context.Context) ([]string, error) { return []string{"p.vmdk"}, nil }

func (fuzzFolder) Peek(context.Context, string) (source.Disk, error) {
	return &sourcetest.Memory{Bytes: []byte("# Disk DescriptorFile\nddb.uuid.image=\"a\"\n")}, nil
}

// use opens an image of the fuzzer, reads parts of it, at most 8 MiB, and asks for its
// extents. Reads in pieces must return the same bytes as one read.
func use(t *testing.T, f source.Disk) { useWith(t, f, nowhere) }

func useWith(t *testing.T, f source.Disk, opener source.Opener) {
	d, err := vmdk.Open(t.Context(), "fuzz.vmdk", f, opener, vmdk.Options{Folder: fuzzFolder{}})
	if err != nil {
		if !strings.Contains(err.Error(), "fuzz.vmdk") {
			t.Errorf("the error does not name the file: %v", err)
		}
		return
	}
	defer d.Close()
	size := d.Size()
	if size <= 0 {
		t.Fatalf("size %d", size)
	}
	next, n := int64(0), 0
	for e, err := range source.Covered(t.Context(), d, 0, size) {
		if err != nil {
			if strings.Contains(err.Error(), "want an extent that starts") || strings.Contains(err.Error(), "end at") && !strings.Contains(err.Error(), "fuzz.vmdk") {
				t.Fatal(err)
			}
			break
		}
		next = e.End()
		if e.Kind == source.Zero && n < 16 {
			p := bytes.Repeat([]byte{1}, int(min(e.Len, 4096)))
			if _, err := d.ReadAt(p, e.Off); err != nil && err != io.EOF || !bytes.Equal(p, make([]byte, len(p))) {
				t.Fatalf("%+v reads as %x, %v", e, p[:min(len(p), 32)], err)
			}
		}
		if n++; n > 1<<16 {
			break
		}
	}
	whole, pieces := make([]byte, 256<<10), make([]byte, 256<<10)
	for _, off := range []int64{0, next / 2 &^ 511, max(0, size-int64(len(whole)))} {
		want, err := d.ReadAt(whole, off)
		if err != nil && err != io.EOF {
			continue
		}
		if int64(want) != min(int64(len(whole)), size-off) {
			t.Fatalf("ReadAt at %d of %d: %d bytes, %v", off, size, want, err)
		}
		for at := 0; at < want; at += 7000 {
			k := min(7000, want-at)
			if _, err := d.ReadAt(pieces[at:at+k], off+int64(at)); err != nil && err != io.EOF {
				t.Fatalf("a piece at %d of what could be read: %v", off+int64(at), err)
			}
		}
		if !bytes.Equal(whole[:want], pieces[:want]) {
			t.Fatalf("what is read at %d in pieces differs", off)
		}
	}
	n = 0
	for m, err := range source.Map(t.Context(), d, 0, size) {
		if err != nil {
			if strings.Contains(err.Error(), "want a mapping that starts") {
				t.Fatal(err)
			}
			break
		}
		if m.File != nil && m.Kind == source.Data && n < 16 {
			p, q := make([]byte, min(m.Len, 4096)), make([]byte, min(m.Len, 4096))
			if _, err := m.File.ReadAt(q, m.Pos); err != nil {
				t.Fatalf("%+v: %v", m, err)
			}
			if _, err := d.ReadAt(p, m.Off); err != nil && err != io.EOF || !bytes.Equal(p, q) {
				t.Fatalf("%+v reads as other bytes, %v", m, err)
			}
		}
		if n++; n > 1<<16 {
			break
		}
	}
	_ = d.Info()
}

// seeds adds the seeds, and also writes them to files if the flag writeSeeds is set.
func seeds(f *testing.F, all [][]byte) {
	if *writeSeeds {
		dir := filepath.Join("testdata", "fuzz", f.Name())
		if err := os.MkdirAll(dir, 0o777); err != nil {
			f.Fatal(err)
		}
		for i, seed := range all {
			text := "go test fuzz v1\n[]byte(" + strconv.Quote(string(seed)) + ")\n"
			if err := os.WriteFile(filepath.Join(dir, fmt.Sprintf("seed-%02d", i)), []byte(text), 0o666); err != nil {
				f.Fatal(err)
			}
		}
	}
}

func FuzzDescriptor(f *testing.F) {
	const first = "# Disk DescriptorFile\n"
	var all [][]byte
	for _, text := range []string{
		fmt.Sprintf(monolithic, 100),
		first + "version=1\nencoding=\"UTF-8\"\nCID=0172e8a4\nparentCID=ffffffff\ncreateType=\"vmfs\"\nRW 4096 VMFS \"vmfs_thick-flat.vmdk\"\nddb.adapterType = \"lsilogic\"\nddb.geometry.cylinders = \"2\"\n",
		first + "CID=1\nRW 100 FLAT \"f001.vmdk\" 0\nRW 100 FLAT \"f002.vmdk\" 5\nRW 7 ZERO\n",
		first + "encoding=\"windows-1252\"\nRW 10 FLAT \"stra\xdfe \x80\" 0\n",
		first + "encoding=\"GBK\"\nRW 10 FLAT \"\xd6\xd0\" 0\n",
		first + "CID=2\nparentCID=1\nparentFileNameHint=\"base.vmdk\"\nRW 10 ZERO\n",
		first + "CID=2\nparentCID=ffffffff\nRW 10 SPARSE \"s001\"\n",
		first + "createType=\"fullDevice\"\nRW 63 FLAT \"/dev/sda\" 0 uuid \\\\.\\PhysicalDrive0\n",
		first + "encryption.keySafe = \"vmware:key\"\n",
		"\xef\xbb\xbf\r\n# disk DESCRIPTORfile\r\n  rw\t5  zero \r\nNOACCESS 5 FLAT \"x\"\r\n",
		"version=1\nRW 18014398509481983 ZERO\nRW 18014398509481983 ZERO\n",
		first + "RW -1 FLAT \"x\"\nRW 1 FLAT x\nRW\nRW 1\nRW 1 FLAT \"x\n=\n",
		first + "RW 5 ZERO\n\x00\xff\xff",
		first + "CID=3735928559\nparentCID=4294967295\nRW 5 ZERO\n\x1a",
		first + "CID=xyz\nRW 5 ZERO\nddb.uuid.image=\"b\"\nddb.uuid.parent=\"A\"\nddb.uuid.parentmodification=\"c\"\n",
		first + "RW 5 ZERO\nddb.uuid.parent=\"00000000-0000-0000-0000-000000000000\"\n",
		first + "CID=2\nparentCID=1\nparentFileNameHint=\"C:\\VMs\\base.vmdk\"\nRW 10 ZERO\n",
		first + "RW 10 FLAT \"\\\\nas\\vms\\d-flat.vmdk\" 0\nRW 10 VMFS \"vsan://5f3c\"\n",
		first + "RW 16 ZERO\nddb.logicalSectorSize = \"4096\"\nddb.physicalSectorSize = \"513\"\n",
	} {
		all = append(all, []byte(text))
	}
	seeds(f, all)
	f.Fuzz(func(t *testing.T, text []byte) {
		use(t, &sourcetest.Memory{Bytes: text})
	})
}

func FuzzSparse(f *testing.F) {
	small := image{tight: true, grain: 1, entries: 4, capacity: 21, grains: grains(512, 0, 1, 2, 5, 9, 20), descriptor: "# Disk DescriptorFile\nCID=1\nRW %d SPARSE \"x\"\n"}
	change := func(im image, do func(*layout)) []byte {
		l := im.build()
		do(l)
		return l.file
	}
	nothing := func(*layout) {}
	redundant, marked, large, sparse, version3 := small, small, small, small, small
	redundant.redundant = true
	marked.grains = map[int64][]byte{0: nil, 1: random(1, 512), 7: nil}
	large.grain, large.capacity, large.grains = 2, 100, grains(1024, 0, 3, 12)
	sparse.noTables, sparse.capacity = true, 4000
	version3.version = 3
	seeds(f, [][]byte{
		change(small, nothing), change(redundant, nothing), change(marked, nothing), change(large, nothing), change(sparse, nothing), change(version3, nothing),
		change(redundant, func(l *layout) { l.put64(56, 0) }),
		change(redundant, func(l *layout) { clear(l.file[l.gd : l.gd+24]) }),
		change(small, func(l *layout) { l.put32(l.gd, 1<<31) }),
		change(small, func(l *layout) { l.put32(l.tables[0], 1) }),
		change(small, func(l *layout) { l.put64(12, 1<<40); l.file[0x200] = 0 }),
		change(small, func(l *layout) { l.put64(12, 1<<62); l.put64(20, 32768); l.put32(44, 65536) }),
		change(small, func(l *layout) { l.file = l.file[:len(l.file)-700] }),
		change(small, func(l *layout) { l.put64(12, 0) }),
		change(small, func(l *layout) { l.put32(l.gd, 1) }),
		change(small, func(l *layout) { l.put32(l.gd+4, uint32(l.tables[0]/sector)) }),
		change(small, func(l *layout) { l.put64(56, 1) }),
		change(redundant, func(l *layout) { l.put32(l.gd, 1) }),
		change(redundant, func(l *layout) { l.put32(l.gd, 1); l.put32(l.rgd, uint32(l.gd/sector)) }),
		change(redundant, func(l *layout) { l.put64(48, uint64(l.gd/sector)) }),
	})
	f.Fuzz(func(t *testing.T, file []byte) {
		file = bytes.Clone(file)
		copy(file, "KDMV")
		use(t, &sourcetest.Memory{Bytes: file})
	})
}

func FuzzStream(f *testing.F) {
	small := image{tight: true, compressed: true, grain: 1, entries: 4, capacity: 21, grains: grains(512, 0, 1, 2, 5, 9, 20), descriptor: "# Disk DescriptorFile\nCID=1\nRW %d SPARSE \"x\"\n"}
	change := func(im image, do func(*layout)) []byte {
		l := im.build()
		do(l)
		return l.file
	}
	nothing := func(*layout) {}
	footer, bare, large, last, zeros := small, small, small, small, small
	footer.footer = true
	bare.noMarkers = true
	large.grain, large.capacity, large.grains = 128, 300, map[int64][]byte{0: bytes.Repeat([]byte("real data "), 6554)[:65536], 2: make([]byte, 65536)}
	last.grain, last.capacity, last.grains = 8, 21, map[int64][]byte{1: random(1, 4096), 2: random(2, 5*512)}
	zeros.grain, zeros.capacity, zeros.grains = 2048, 5000, map[int64][]byte{0: make([]byte, 1<<20), 1: make([]byte, 1<<20)}
	seeds(f, [][]byte{
		change(small, nothing), change(footer, nothing), change(bare, nothing), change(large, nothing), change(last, nothing), change(zeros, nothing),
		change(footer, func(l *layout) { l.file = l.file[:len(l.file)-700] }),
		change(footer, func(l *layout) { l.file = append(l.file, make([]byte, 700)...) }),
		change(small, func(l *layout) { l.put32(l.grains[1]+8, 1500) }),
		change(small, func(l *layout) { l.put64(l.grains[1], 3) }),
		change(small, func(l *layout) { l.file[l.grains[2]+20] ^= 1 }),
		change(small, func(l *layout) { l.put32(l.tables[0], uint32(l.grains[20]/sector)) }),
		change(footer, func(l *layout) { l.put32(l.gd, 1) }),
		change(footer, func(l *layout) { l.put32(l.tables[0], uint32(l.tables[1]/sector)) }),
		change(footer, func(l *layout) { l.put64(l.header+56, uint64(l.header/sector)) }),
	})
	f.Fuzz(func(t *testing.T, file []byte) {
		file = bytes.Clone(file)
		copy(file, "KDMV")
		if len(file) >= 79 {
			file[77], file[78] = 1, 0
		}
		use(t, &sourcetest.Memory{Bytes: file})
	})
}

// useDelta calls use with a descriptor whose only extent is the file, with the capacity
// that the file records.
func useDelta(t *testing.T, file []byte, sectors uint64) {
	text := fmt.Sprintf("# Disk DescriptorFile\nRW %d SPARSE \"fuzz.vmdk\"\n", max(sectors, 1))
	useWith(t, &sourcetest.Memory{Bytes: []byte(text)}, func(context.Context, string, string, string) (source.Disk, error) {
		return &sourcetest.Memory{Bytes: file}, nil
	})
}

func FuzzCOWD(f *testing.F) {
	small := delta{capacity: 21, grains: grains(512, 0, 1, 2, 5, 9, 20)}
	change := func(x delta, do func(*layout)) []byte {
		l := x.build()
		do(l)
		return bytes.TrimRight(l.file, "\x00")
	}
	nothing := func(*layout) {}
	two, order, large, empty, huge := small, small, small, small, small
	two.capacity, two.grains = 4100, grains(512, 0, 4095, 4096)
	order.order = []int64{9, 5, 20, 2, 1, 0}
	large.grain, large.grains = 8, grains(4096, 0, 2)
	empty.grains, empty.capacity = nil, 100000
	huge.grains, huge.capacity = grains(512, 0), 1<<22
	seeds(f, [][]byte{
		change(small, nothing), change(two, nothing), change(order, nothing), change(large, nothing), change(empty, nothing), change(huge, nothing),
		change(small, func(l *layout) { l.put32(l.gd, 1) }),
		change(small, func(l *layout) { l.put32(l.gd, 1<<31) }),
		change(small, func(l *layout) { l.put32(l.tables[0], 1) }),
		change(small, func(l *layout) { l.put32(l.tables[0]+4, uint32(l.tables[0]/sector)) }),
		change(small, func(l *layout) { l.put32(l.tables[0]+8, 1<<32-1) }),
		change(small, func(l *layout) { l.put32(12, 1<<32-1) }),
		change(small, func(l *layout) { l.put32(16, 32768) }),
		change(small, func(l *layout) { l.put32(20, 3); l.put32(24, 1<<31) }),
		change(small, func(l *layout) { l.file = l.file[:l.tables[0]+20] }),
		change(two, func(l *layout) { l.put32(l.gd+4, uint32(l.tables[0]/sector)) }),
	})
	f.Fuzz(func(t *testing.T, file []byte) {
		file = append(bytes.Clone(file), make([]byte, max(16, 20<<10-len(file)))...) // room for a table that is cut
		copy(file, "COWD\x01\x00\x00\x00")
		useDelta(t, file, uint64(binary.LittleEndian.Uint32(file[12:])))
	})
}

func FuzzSESparse(f *testing.F) {
	small := delta{se: true, grain: 1, table: 1, capacity: 200, grains: map[int64][]byte{0: random(0, 512), 1: random(1, 512), 2: nil, 3: nil, 63: random(63, 512), 64: random(64, 512), 199: random(199, 512)}}
	change := func(x delta, do func(*layout)) []byte {
		l := x.build()
		do(l)
		return bytes.TrimRight(l.file, "\x00")
	}
	nothing := func(*layout) {}
	usual, order, large, empty := small, small, small, small
	usual.grain, usual.table, usual.capacity, usual.grains = 8, 64, 21, map[int64][]byte{0: random(0, 4096), 1: nil}
	order.order = []int64{199, 3, 2, 64, 63, 1, 0}
	large.grain, large.capacity, large.grains = 16, 50, grains(8192, 1, 2)
	empty.grains, empty.capacity = nil, 1000
	seeds(f, [][]byte{
		change(small, nothing), change(usual, nothing), change(order, nothing), change(large, nothing), change(empty, nothing),
		change(small, func(l *layout) { l.put64(l.gd, 2<<60) }),
		change(small, func(l *layout) { l.put64(l.gd, 1<<60|1<<40) }),
		change(small, func(l *layout) { l.put64(l.gd+8, 1<<60) }),
		change(small, func(l *layout) { l.put64(l.tables[0], 5<<60) }),
		change(small, func(l *layout) { l.put64(l.tables[0], 1<<62-1) }),
		change(small, func(l *layout) { l.put64(l.tables[0]+8, seEntry(4096)) }),
		change(small, func(l *layout) { l.put64(16, 1<<53); l.put64(24, 32768); l.put64(32, 1024) }),
		change(small, func(l *layout) { l.put64(seTablesAt, 0) }),
		change(small, func(l *layout) { l.put64(seGrainsAt, 1<<54-1) }),
		change(small, func(l *layout) { l.put64(sector+24, 1) }),
		change(small, func(l *layout) { l.file = l.file[:len(l.file)-700] }),
		change(small, func(l *layout) { l.put64(l.gd+8, 1<<60) }),
		change(small, func(l *layout) { l.put64(l.gd+8, 1<<60); l.put64(l.gd+16, 1<<60) }),
	})
	f.Fuzz(func(t *testing.T, file []byte) {
		file = append(bytes.Clone(file), make([]byte, max(16, 40<<10-len(file)))...) // room for a table that is cut
		binary.LittleEndian.PutUint64(file, 0xcafebabe)
		binary.LittleEndian.PutUint64(file[8:], 0x200000001)
		useDelta(t, file, binary.LittleEndian.Uint64(file[16:]))
	})
}

func FuzzMarkers(f *testing.F) {
	small := bare(image{tight: true, grain: 1, capacity: 21, grains: grains(512, 0, 1, 2, 5, 9, 20)})
	small.descriptor = "# Disk DescriptorFile\nCID=1\nRW %d SPARSE \"x\"\n"
	change := func(im image, do func(*layout)) []byte {
		l := im.build()
		do(l)
		return l.file
	}
	nothing := func(*layout) {}
	footer, tables, large, last, empty, far := small, small, small, small, small, small
	footer.footer = true
	tables.bare, tables.footer = false, true
	large.grain, large.capacity, large.grains = 128, 300, map[int64][]byte{0: bytes.Repeat([]byte("real data "), 6554)[:65536], 2: make([]byte, 65536)}
	last.grain, last.capacity, last.grains = 8, 21, map[int64][]byte{1: random(1, 4096), 2: random(2, 5*512)}
	empty.grains = nil
	far.capacity, far.grains = 100_000, grains(512, 0, 2047, 2048, 4096, 50_000, 99_999)
	seeds(f, [][]byte{
		change(small, nothing), change(footer, nothing), change(tables, func(l *layout) { l.put64(l.header+56, 0) }),
		change(large, nothing), change(last, nothing), change(empty, nothing), change(far, nothing),
		change(small, func(l *layout) { l.insert(2, marker(1, 4)); l.insert(5, marker(4, 0, 1, 2, 3)) }),
		change(small, func(l *layout) { l.insert(2, marker(2, 1<<10)[:sector]) }),
		change(small, func(l *layout) { l.put32(l.grains[1]+8, 1500) }),
		change(small, func(l *layout) { l.put64(l.grains[5], 1) }),
		change(small, func(l *layout) { l.put64(l.grains[5]+8, 7<<32) }),
		change(small, func(l *layout) { l.file = l.file[:len(l.file)-700] }),
		change(small, func(l *layout) { l.file = append(l.file, make([]byte, 512)...) }),
		change(footer, func(l *layout) { l.file = append(l.file, make([]byte, 700)...) }),
		change(far, func(l *layout) { l.put64(l.grains[99_999], 1<<60) }),
	})
	f.Fuzz(func(t *testing.T, file []byte) {
		file = bytes.Clone(file)
		copy(file, "KDMV")
		if len(file) < 512 {
			return
		}
		l := layout{file: file}
		l.put64(56, 0)
		l.put32(8, binary.LittleEndian.Uint32(file[8:])&^2|0x30000)
		file[77], file[78] = 1, 0
		use(t, &sourcetest.Memory{Bytes: file})
		if bytes.Contains(file[1:], []byte("KDMV")) {
			return // there may be a footer, and tables
		}
		d, err := vmdk.Open(t.Context(), "fuzz.vmdk", &sourcetest.Memory{Bytes: file}, nowhere, vmdk.Options{})
		if err != nil {
			return
		}
		defer d.Close()
		// want becomes the set of sectors that have data, according to a simple walk of
		// the tables.
		le := binary.LittleEndian
		want := map[int64]bool{}
		grain := int64(le.Uint64(file[20:])) * sector
		first := max(1, le.Uint64(file[64:]))
		if n := le.Uint64(file[36:]); n > 0 {
			first = max(first, le.Uint64(file[28:])+n)
		}
		for pos := first * sector; ; {
			lba, size := le.Uint64(file[pos:]), uint64(le.Uint32(file[pos+8:]))
			if size > 0 {
				if off := int64(lba) * sector; off < d.Size() {
					want[off/grain] = true
				}
				pos += (12 + size + sector - 1) / sector * sector
			} else if le.Uint32(file[pos+12:]) == 0 {
				if pos+sector != uint64(len(file)) {
					t.Fatalf("the end of the stream is at %d of %d", pos, len(file))
				}
				break
			} else {
				pos += sector + lba*sector
			}
		}
		for e, err := range d.Extents(t.Context(), 0, d.Size()) {
			if err != nil {
				t.Fatal(err)
			}
			if e.Kind != source.Data {
				continue
			}
			for g := e.Off / grain; g*grain < e.End(); g++ {
				if !want[g] {
					t.Fatalf("grain %d is data", g)
				}
				delete(want, g)
			}
		}
		if len(want) > 0 {
			t.Fatalf("grains %v are not data", want)
		}
	})
}
