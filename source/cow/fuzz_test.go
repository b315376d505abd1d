package cow

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// fuzzSize is the size of a disk with two pages of the table, the second of which has
// less than a sector.
const fuzzSize = (pageBlocks+100)*minBlockSize + 512

// seed is a starting point of the fuzz targets: the beginning of the file of a layer.
type seed struct {
	name          string
	header, table []byte
	seal          bool
}

func seeds(t testing.TB) []seed {
	t.Helper()
	encode := func(h header, version uint32) []byte { return encodeAs(t, h, version) }
	good := header{Size: fuzzSize, BlockSize: minBlockSize, Source: "disk", Proof: "snapshot"}
	change := func(do func(*header)) []byte {
		h := good
		do(&h)
		return encode(h, record.Version)
	}
	h := encode(good, record.Version)
	two := append(make([]byte, slotSize), h...)
	torn := bytes.Clone(h)
	torn[len(torn)-3] ^= 8
	unknown := bytes.Replace(h, []byte(`"proof"`), []byte(`"prove"`), 1)
	table := func(do func(*page)) []byte {
		var p page
		var b [pageSize]byte
		do(&p)
		p.encode(0, &b)
		return b[:]
	}
	some := table(func(p *page) { p.set(3, 70, present); p.set(2015, 2, zeroed) })
	full := table(func(p *page) { p.set(0, pageBlocks, present) })
	bad := bytes.Clone(some)
	bad[0] |= 3
	flipped := bytes.Clone(some)
	flipped[100] ^= 1
	return []seed{
		{"empty", nil, nil, false},
		{"new", h, nil, false},
		{"some", h, some, false},
		{"full", h, full, false},
		{"second header", two, some, false},
		{"torn header", torn, nil, false},
		{"torn header sealed", torn, nil, true},
		{"unknown field", unknown, nil, true},
		{"another version", encode(good, 2), nil, false},
		{"another size", change(func(h *header) { h.Size = 1 << 62 }), nil, false},
		{"negative size", change(func(h *header) { h.Size = -1 }), nil, false},
		{"odd blocks", change(func(h *header) { h.BlockSize = 4097 }), nil, false},
		{"another disk", change(func(h *header) { h.Source = "other" }), nil, false},
		{"length", binary.LittleEndian.AppendUint32(append([]byte(magic), 1, 0, 0, 0), 1<<31), nil, false},
		{"bad state", h, bad, true},
		{"flipped", h, flipped, false},
		{"past the end", h, append(bytes.Clone(some), full...), false},
		{"text", []byte("KDMV\x01\x00\x00\x00"), nil, false},
	}
}

// TestSeeds writes the seeds again. They are kept as files, so that they can be
// reviewed.
func TestSeeds(t *testing.T) {
	dir := filepath.Join("testdata", "fuzz", "FuzzFile")
	files, _ := os.ReadDir(dir)
	if os.Getenv("VDDKCP_WRITE_SEEDS") != "" {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, s := range seeds(t) {
			text := "go test fuzz v1\n[]byte(" + strconv.Quote(string(s.header)) + ")\n[]byte(" + strconv.Quote(string(s.table)) + ")\nbool(" + strconv.FormatBool(s.seal) + ")\n"
			if err := os.WriteFile(filepath.Join(dir, "seed-"+strings.ReplaceAll(s.name, " ", "-")), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		return
	}
	if len(files) < len(seeds(t)) {
		t.Errorf("%d seeds in %s, want %d: VDDKCP_WRITE_SEEDS=1 go test -run TestSeeds", len(files), dir, len(seeds(t)))
	}
}

// FuzzFile opens a layer with any beginning. Either New refuses the file, or all
// methods agree on its content. With seal the checksums are corrected first.
func FuzzFile(f *testing.F) {
	path := filepath.Join(f.TempDir(), "x.cow")
	l, err := newLayout(fuzzSize, minBlockSize)
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, h, table []byte, sealed bool) {
		h, table = h[:min(int64(len(h)), tableStart)], table[:min(int64(len(table)), l.pages*pageSize)]
		if sealed {
			h, table = sealHeader(bytes.Clone(h)), sealTable(bytes.Clone(table))
		}
		file, err := os.Create(path)
		if err != nil {
			t.Fatal(err)
		}
		defer file.Close()
		for _, err := range []error{file.Truncate(l.data + fuzzSize), writeAll(file, h, 0), writeAll(file, table, tableStart)} {
			if err != nil {
				t.Fatal(err)
			}
		}
		base := sourcetest.Pattern(fuzzSize, source.Extent{Off: 0, Len: fuzzSize})
		base.ID = "disk"
		d, err := New(t.Context(), base, Options{File: path})
		if err != nil {
			return
		}
		defer d.Close()
		for e, err := range source.Covered(t.Context(), d, 0, fuzzSize) {
			if err != nil {
				return
			}
			p := make([]byte, min(e.Len, 512))
			if _, err := d.ReadAt(p, e.Off); err != nil && err != io.EOF {
				t.Fatalf("%+v: %v", e, err)
			}
			// The blocks in the file are zeros, and those of the base are not.
			if fromBelow := !bytes.Equal(p, make([]byte, len(p))); fromBelow != (e.Depth == 1) {
				t.Fatalf("%+v, and it holds %x", e, p[:8])
			}
		}
		// After it was written back, the table has the same content.
		for i := range d.store.pages {
			p, err := d.table.load(i)
			if err != nil {
				t.Fatal(err)
			}
			var image [pageSize]byte
			var again page
			p.encode(i, &image)
			if at, err := again.decode(i, &image, d.store.blocks); err != nil {
				t.Fatalf("page %d, byte %d: %v", i, at, err)
			}
			for w := range p.words {
				if p.words[w].Load() != again.words[w].Load() {
					t.Fatalf("page %d tells something else when it is written back", i)
				}
			}
		}
	})
}

func writeAll(f *os.File, p []byte, off int64) error {
	_, err := f.WriteAt(p, off)
	return err
}

// encodeAs returns a slot with a header of any version.
func encodeAs(t testing.TB, h header, version uint32) []byte {
	t.Helper()
	payload, err := json.Marshal(h)
	if err != nil {
		t.Fatal(err)
	}
	r := record
	r.Version = version
	return r.Encode(0, payload)
}

func sealHeader(b []byte) []byte {
	fixed := slotSize - record.Room() // bytes before the payload
	for at := 0; at+fixed <= len(b); at += slotSize {
		slot := b[at:]
		n := binary.LittleEndian.Uint32(slot[len(magic)+4:])
		if int64(n) > int64(len(slot)-fixed) {
			continue
		}
		sum := crc32.Update(crc32.Checksum(slot[:fixed-4], castagnoli), castagnoli, slot[fixed:fixed+int(n)])
		binary.LittleEndian.PutUint32(slot[fixed-4:], sum)
	}
	return b
}

func sealTable(b []byte) []byte {
	for s := int64(0); (s+1)*sectorSize <= int64(len(b)); s++ {
		if sector := b[s*sectorSize : (s+1)*sectorSize]; !bytes.Equal(sector, make([]byte, sectorSize)) {
			seal(sector, s)
		}
	}
	return b
}
