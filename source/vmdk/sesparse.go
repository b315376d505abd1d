package vmdk

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/zero"
)

// VMware has not published the seSparse format. The authors of qemu examined files that
// ESXi 6.5 had written. The code in this file reads what qemu reads (block/vmdk.c,
// vmdk_open_se_sparse) and refuses everything else.
const (
	seVersion       = 0x0000000200000001
	seVolatileMagic = 0xcafecafe

	// seMaxTableSize is the largest size of a grain table in sectors. ESXi writes
	// tables of 64 sectors.
	seMaxTableSize = maxTable * seEntrySize / sectorSize
	// seMaxTables is the largest number of grain tables. With the usual sizes of grains
	// and tables, this is enough for disks of 512 TiB. The largest disk of ESXi has 62
	// TiB.
	seMaxTables = 1 << 25

	seEntryShift = 3 // base-2 logarithm of seEntrySize
	seEntrySize  = 1 << seEntryShift
)

// These are the values of the upper four bits of an entry of a grain table.
const (
	seAbsent    = 0
	seUnmapped  = 1 // the guest unmapped the grain; like qemu, this package reads zeros
	seZeros     = 2
	seAllocated = 3
)

// seSparse is the index of a seSparse extent, the delta disk of ESXi 6.5 and later.
// Such an extent has no redundant grain directory.
type seSparse struct{ tables }

// seEntries is the entryFormat of seSparse. An entry is a little-endian number of 64
// bits. The upper four bits say of which kind the entry is. The other bits are the
// number of a table or a grain, counted in the order of the file.
type seEntries struct {
	tablesAt   int64 // offset of grain table 0 in the file, bytes
	tables     int64 // number of tables that the file has room for
	tableSize  int64 // bytes in a table
	grainsAt   int64 // offset of grain 0 in the file, bytes
	grainShift uint  // base-2 logarithm of the size of a grain in bytes
	fileSize   int64 // bytes
}

// seHeader is the first sector of a seSparse extent. All fields are little-endian
// numbers of 64 bits.
type seHeader [sectorSize]byte

func (h *seHeader) field(off int) uint64 { return binary.LittleEndian.Uint64(h[off:]) }

func (h *seHeader) capacity() uint64  { return h.field(16) } // sectors
func (h *seHeader) grain() uint64     { return h.field(24) } // sectors
func (h *seHeader) tableSize() uint64 { return h.field(32) } // sectors

// perTable returns the number of entries in a grain table.
func (h *seHeader) perTable() uint64 { return h.tableSize() * sectorSize / seEntrySize }

// newSESparse is the sparseReader for files that begin with the magic of seSparse.
func newSESparse(f *grainFile, extentSize int64) (*sparse, error) {
	var h seHeader
	if f.fileSize < int64(len(h)) {
		return nil, fmt.Errorf("the seSparse header at offset 0 needs %d bytes, but the file has %d bytes: the file is truncated", len(h), f.fileSize)
	}
	if err := image.ReadFull(f.file, h[:], 0); err != nil {
		return nil, err
	}
	if err := h.check(); err != nil {
		return nil, err
	}
	layout, err := h.layout(f.fileSize)
	if err != nil {
		return nil, err
	}
	if err := checkVolatile(f, layout.volatile.start); err != nil {
		return nil, err
	}
	g, err := newGeometry(h.capacity(), h.grain(), extentSize)
	if err != nil {
		return nil, err
	}
	tableSize := int64(h.tableSize()) * sectorSize
	entries := &seEntries{
		tablesAt: layout.tables.start, tables: (layout.tables.end - layout.tables.start) / tableSize, tableSize: tableSize,
		grainsAt: layout.grainsAt, grainShift: g.grainShift, fileSize: f.fileSize,
	}
	x := &seSparse{newTables(f, g, entries, seEntryShift, h.perTable())}
	x.primary = directory{what: "grain directory", at: layout.directory.start}
	x.metadata = []region{{"header", 0, sectorSize}, layout.volatile, layout.directory, layout.tables}
	if x.checkable() {
		err = x.indexDirectory(&x.primary, func(int64, int64) {})
	}
	return &sparse{grainFile: f, geometry: g, index: x}, err
}

// The method check checks those fields of the header that describe the disk. Fields of unknown
// meaning must be 0.
func (h *seHeader) check() error {
	if v := h.field(8); v != seVersion {
		return fmt.Errorf("seSparse header offset 8: version %#x, want %#x", v, uint64(seVersion))
	}
	if c := h.capacity(); c == 0 || c > maxSectors {
		return fmt.Errorf("seSparse header offset 16: capacity of %d sectors, want 1 to %d", c, int64(maxSectors))
	}
	if err := checkGrain("seSparse header offset 24", h.grain()); err != nil {
		return err
	}
	if n := h.tableSize(); n == 0 || n > seMaxTableSize {
		return fmt.Errorf("seSparse header offset 32: grain tables of %d sectors, want 1 to %d (64 is usual)", n, seMaxTableSize)
	}
	if n := tableCount(h.capacity(), h.grain(), h.perTable()); n > seMaxTables {
		return fmt.Errorf("seSparse header offset 16: a capacity of %d sectors needs %d grain tables, want %d or fewer", h.capacity(), n, seMaxTables)
	}
	for _, unknown := range []struct {
		what string
		off  int
	}{{"flags", 40}, {"a reserved field", 48}, {"a reserved field", 56}, {"a reserved field", 64}, {"a reserved field", 72}} {
		if v := h.field(unknown.off); v != 0 {
			return fmt.Errorf("seSparse header offset %d: %s is %#x, want 0: the meaning of other values is not known", unknown.off, unknown.what, v)
		}
	}
	if !zero.Is(h[208:]) {
		return fmt.Errorf("seSparse header offset 208: the %d bytes up to the end of the header are not zeros: their meaning is not known", sectorSize-208)
	}
	return nil
}

// seLayout says where the parts of a seSparse extent are in its file.
type seLayout struct {
	volatile, directory, tables region
	grainsAt                    int64 // offset of grain 0, bytes
}

// The method layout returns the layout that a header describes, and checks it against the size of
// the file. The caller has checked the header. fileSize is in bytes.
func (h *seHeader) layout(fileSize int64) (l seLayout, err error) {
	at := func(what string, off int, least uint64) (region, error) {
		start, n := h.field(off), max(least, h.field(off+8))
		if start > maxSectors || n > maxSectors-start {
			return region{}, fmt.Errorf("seSparse header offset %d: the %s at sector %d, of %d sectors, would end past 8 EiB", off, what, start, n)
		}
		return region{what, int64(start) * sectorSize, int64(start+n) * sectorSize}, nil
	}
	if l.volatile, err = at("volatile header", 80, 1); err != nil {
		return l, err
	}
	if l.directory, err = at("grain directory", 128, 0); err != nil {
		return l, err
	}
	if l.tables, err = at("grain tables", 144, 0); err != nil {
		return l, err
	}
	grains, err := at("grains", 192, 1)
	if err != nil {
		return l, err
	}
	l.grainsAt = grains.start
	grains.end = grains.start + 1 // the size in the header may be out of date
	all := []region{{"header", 0, sectorSize}, l.volatile, l.directory, l.tables, grains}
	if err := disjoint(slices.Clone(all)); err != nil {
		return l, err
	}
	have, need := l.directory.end-l.directory.start, tableCount(h.capacity(), h.grain(), h.perTable())*seEntrySize
	if have < need {
		return l, fmt.Errorf("seSparse header offset 136: the grain directory has %d bytes, want %d or more for the capacity of %d sectors", have, need, h.capacity())
	}
	if l.directory.end > fileSize {
		return l, fmt.Errorf("the grain directory at offset %d needs %d bytes, but the file has %d bytes: the file is truncated", l.directory.start, have, fileSize)
	}
	return l, nil
}

// checkVolatile reads the volatile header, which is at the given offset. If this header
// says that the journal must be replayed, the tables are not valid, and checkVolatile
// returns an error.
func checkVolatile(f *grainFile, off int64) error {
	var b [sectorSize]byte
	if off > f.fileSize-int64(len(b)) {
		return fmt.Errorf("the volatile header at offset %d needs %d bytes, but the file has %d bytes: the file is truncated", off, len(b), f.fileSize)
	}
	if err := image.ReadFull(f.file, b[:], off); err != nil {
		return err
	}
	if magic := binary.LittleEndian.Uint64(b[:]); magic != seVolatileMagic {
		return fmt.Errorf("volatile header at offset %d: found %#x, want %#x", off, magic, uint64(seVolatileMagic))
	}
	if replay := binary.LittleEndian.Uint64(b[24:]); replay != 0 {
		return fmt.Errorf("volatile header at offset %d: the journal must be replayed first (the value at offset 24 is %#x, want 0): the disk is in use, or was in use when it was copied or when its host failed; let ESXi open and close the disk (power the virtual machine on and off, or run vmkfstools -i), or take a snapshot and copy the disk as it was before the snapshot", off, replay)
	}
	if !zero.Is(b[32:]) {
		return fmt.Errorf("volatile header at offset %d: the %d bytes from offset 32 up to the end of the header are not zeros: their meaning is not known", off, sectorSize-32)
	}
	return nil
}

func (f *seEntries) table(entry []byte) (int64, error) {
	e := binary.LittleEndian.Uint64(entry)
	if e == 0 {
		return noTable, nil
	}
	if e>>60 != 1 {
		return 0, fmt.Errorf("the value of the entry is %#x, want 0 (no grain table), or %#x plus the number of a grain table", e, uint64(1)<<60)
	}
	index := e & (1<<60 - 1)
	if index >= uint64(f.tables) {
		return 0, fmt.Errorf("the value of the entry is %#x, which means grain table %d of the file, but the file has room for %d grain tables", e, index, f.tables)
	}
	return f.tablesAt + int64(index)*f.tableSize, nil
}

func seEntry(entries []byte, i int64) uint64 {
	return binary.LittleEndian.Uint64(entries[i<<seEntryShift:])
}

// seKind returns the kind of an entry of a grain table. An invalid entry counts as
// data. A program that copies the disk therefore reads the grain, and the read returns
// the error.
func seKind(entry uint64) grainKind {
	switch entry >> 60 {
	case seAbsent:
		if entry == 0 {
			return absentGrain
		}
	case seUnmapped, seZeros:
		return zeroGrain
	}
	return dataGrain
}

// seIndex returns the number of the grain to which an entry points. The number has 60
// bits. Bits 48 to 59 of the entry are the lower 12 bits of the number, and bits 0 to 47
// of the entry are the upper 48 bits of the number.
func seIndex(entry uint64) uint64 { return entry>>48&0xfff | entry&(1<<48-1)<<12 }

// grainAt returns the offset of a grain in the file, in bytes. It returns the constant
// nowhere if the entry is not valid.
func (f *seEntries) grainAt(entry uint64) int64 {
	index := seIndex(entry)
	if entry>>60 != seAllocated || index > uint64(nowhere-f.grainsAt)>>f.grainShift {
		return nowhere
	}
	return f.grainsAt + int64(index)<<f.grainShift
}

func (f *seEntries) stretch(entries []byte, i, end int64, contiguous bool) (kind grainKind, pos, next int64) {
	first := seEntry(entries, i)
	kind, pos, next = seKind(first), f.grainAt(first), i+1
	if kind == dataGrain && contiguous {
		grain := int64(1) << f.grainShift
		for at := pos + grain; next < end && f.grainAt(seEntry(entries, next)) == at; at += grain {
			next++
		}
	} else {
		for next < end && seKind(seEntry(entries, next)) == kind {
			next++
		}
	}
	return kind, pos, next
}

func (f *seEntries) place(entries []byte, i int64) (int64, error) {
	entry := seEntry(entries, i)
	if pos := f.grainAt(entry); pos != nowhere {
		return pos, nil
	}
	if entry>>60 != seAllocated {
		return 0, fmt.Errorf("the entry of the grain in its table is %#x, with the kind %d in the upper 4 bits, want the kind 1 or 2 (zeros) or 3 (data): the grain table is damaged", entry, entry>>60)
	}
	return 0, fmt.Errorf("the entry of the grain in its table is %#x, which means grain %d of the file, but the file has only %d bytes: the grain table is damaged", entry, seIndex(entry), f.fileSize)
}
