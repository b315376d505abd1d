package vmdk

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/source"
)

// VMware has not published the seSparse format. What is known of it is what
// qemu reads (block/vmdk.c, vmdk_open_se_sparse), which its authors got from
// files that ESXi 6.5 wrote. So what is not known is refused.
const (
	seVersion       = 0x0000000200000001
	seVolatileMagic = 0xcafecafe

	// seMaxTableSize bounds a grain table, in sectors; ESXi writes 64.
	seMaxTableSize = maxTable * 8 / sectorSize
	// seMaxTables bounds the grain directory. With the usual sizes it is for
	// 512 TiB, and ESXi ends at 62.
	seMaxTables = 1 << 25
)

// The upper four bits of a grain table's entry.
const (
	seAbsent    = 0
	seUnmapped  = 1 // by the guest; qemu too takes it as zeros
	seZeros     = 2
	seAllocated = 3
)

// nowhere is past the end of all files.
const nowhere = 1 << 62

// seSparse is what is known of a seSparse extent beside what is known of all.
type seSparse struct {
	tablesAt  int64 // offset in the file of grain table 0, bytes
	tables    int64 // that there is room for
	tableSize int64 // bytes
	grainsAt  int64 // offset in the file of grain 0, bytes
}

// openSESparse takes f, which begins with the magic of a seSparse extent, as
// the extent that has want bytes of the disk.
func openSESparse(name string, f source.Disk, want int64) (*sparse, error) {
	s := &sparse{name: name, file: f, fileSize: f.Size(), fileKind: kindSESparse, entryShift: 3}
	if err := s.initSESparse(want); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

func (s *sparse) initSESparse(want int64) error {
	var b [sectorSize]byte
	if s.fileSize < int64(len(b)) {
		return fmt.Errorf("the seSparse header at offset 0 needs %d bytes, the file has %d: it is truncated", len(b), s.fileSize)
	}
	if err := image.ReadFull(s.file, b[:], 0); err != nil {
		return err
	}
	field := func(off int) uint64 { return binary.LittleEndian.Uint64(b[off:]) }
	if v := field(8); v != seVersion {
		return fmt.Errorf("seSparse header offset 8: version %#x, want %#x", v, uint64(seVersion))
	}
	tableSize := field(32)
	s.header = header{capacity: field(16), grain: field(24), tableEntries: uint32(min(tableSize, seMaxTableSize) * sectorSize / 8)}
	if s.capacity == 0 || s.capacity > maxSectors {
		return fmt.Errorf("seSparse header offset 16: capacity of %d sectors, want 1 to %d", s.capacity, int64(maxSectors))
	}
	if err := checkGrain("seSparse header offset 24", s.grain); err != nil {
		return err
	}
	if tableSize == 0 || tableSize > seMaxTableSize {
		return fmt.Errorf("seSparse header offset 32: grain tables of %d sectors, want 1 to %d (64 is usual)", tableSize, seMaxTableSize)
	}
	if s.tables() > seMaxTables {
		return fmt.Errorf("seSparse header offset 16: a capacity of %d sectors is absurd: it needs %d grain tables, want %d or fewer", s.capacity, s.tables(), seMaxTables)
	}
	for _, unknown := range []struct {
		what string
		off  int
	}{{"flags", 40}, {"a reserved field", 48}, {"a reserved field", 56}, {"a reserved field", 64}, {"a reserved field", 72}} {
		if v := field(unknown.off); v != 0 {
			return fmt.Errorf("seSparse header offset %d: %s is %#x, want 0: what it means is not known", unknown.off, unknown.what, v)
		}
	}
	if !zero.Is(b[208:]) {
		return fmt.Errorf("seSparse header offset 208: the %d bytes up to its end are not zeros: what they mean is not known", sectorSize-208)
	}
	return s.initRegions(want, field)
}

// initRegions takes the rest of a header, whose field at a byte offset is
// field: where things are in the file.
func (s *sparse) initRegions(want int64, field func(off int) uint64) error {
	at := func(what string, off int, least uint64) (region, error) {
		start, n := field(off), max(least, field(off+8))
		if start > maxSectors || n > maxSectors-start {
			return region{}, fmt.Errorf("seSparse header offset %d: the %s at sector %d, of %d sectors, is absurd", off, what, start, n)
		}
		return region{what, int64(start) * sectorSize, int64(start+n) * sectorSize}, nil
	}
	volatile, err := at("volatile header", 80, 1)
	if err != nil {
		return err
	}
	directory, err := at("grain directory", 128, 0)
	if err != nil {
		return err
	}
	tables, err := at("grain tables", 144, 0)
	if err != nil {
		return err
	}
	grains, err := at("grains", 192, 1)
	if err != nil {
		return err
	}
	grains.end = grains.start + 1 // nobody says whether the size may be out of date
	s.metadata = []region{{"header", 0, sectorSize}, volatile, directory, tables}
	if err := disjoint(append(slices.Clone(s.metadata), grains)); err != nil {
		return err
	}
	if need := s.tables() * 8; directory.end-directory.start < need {
		return fmt.Errorf("seSparse header offset 136: the grain directory has %d bytes, want %d or more for the capacity of %d sectors", directory.end-directory.start, need, s.capacity)
	}
	if directory.end > s.fileSize {
		return fmt.Errorf("the grain directory at offset %d needs %d bytes, the file has %d: it is truncated", directory.start, directory.end-directory.start, s.fileSize)
	}
	s.primary.what, s.primary.at = "grain directory", directory.start
	s.se.tableSize = int64(s.tableEntries) * 8
	s.se.tables = (tables.end - tables.start) / s.se.tableSize
	s.se.tablesAt, s.se.grainsAt = tables.start, grains.start
	if err := s.checkVolatile(volatile.start); err != nil {
		return err
	}
	if err := s.fit(want); err != nil {
		return err
	}
	return s.indexTables()
}

// checkVolatile reads the volatile header, at off: whether the tables are valid.
func (s *sparse) checkVolatile(off int64) error {
	var b [sectorSize]byte
	if off > s.fileSize-int64(len(b)) {
		return fmt.Errorf("the volatile header at offset %d needs %d bytes, the file has %d: it is truncated", off, len(b), s.fileSize)
	}
	if err := image.ReadFull(s.file, b[:], off); err != nil {
		return err
	}
	if magic := binary.LittleEndian.Uint64(b[:]); magic != seVolatileMagic {
		return fmt.Errorf("volatile header at offset %d: found %#x, want %#x", off, magic, uint64(seVolatileMagic))
	}
	if replay := binary.LittleEndian.Uint64(b[24:]); replay != 0 {
		return fmt.Errorf("volatile header at offset %d: its journal must be replayed first (offset 24 is %#x, want 0): the disk is in use, or was copied while it was, or its host failed; let ESXi open and close it (power the machine on and off, or vmkfstools -i), or copy a snapshot's parent", off, replay)
	}
	if !zero.Is(b[32:]) {
		return fmt.Errorf("volatile header at offset %d: the %d bytes from offset 32 up to its end are not zeros: what they mean is not known", off, sectorSize-32)
	}
	return nil
}

// seTable returns where the grain table of an entry of the directory is, in
// bytes; 0: nowhere.
func (s *sparse) seTable(entry uint64) (int64, error) {
	if entry == 0 {
		return 0, nil
	}
	if entry>>60 != 1 {
		return 0, fmt.Errorf("found %#x, want 0 or %#x and more", entry, uint64(1)<<60)
	}
	if index := entry & (1<<60 - 1); index >= uint64(s.se.tables) {
		return 0, fmt.Errorf("found %#x, grain table %d of the file, which has room for %d", entry, index, s.se.tables)
	}
	return s.se.tablesAt + int64(entry&(1<<60-1))*s.se.tableSize, nil
}

// seKind is kind for the entries of seSparse. What is none that is known is
// called data, so that a copy comes to the error of reading it.
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

// seIndex is the number of a grain in the file: the lower 12 bits of it are
// above the others.
func seIndex(entry uint64) uint64 { return entry>>48&0xfff | entry&(1<<48-1)<<12 }

func (s *sparse) sePlace(entry uint64) int64 {
	index := seIndex(entry)
	if entry>>60 != seAllocated || index > uint64(nowhere-s.se.grainsAt)>>s.grainShift {
		return nowhere
	}
	return s.se.grainsAt + int64(index)<<s.grainShift
}

// seError is why the entry of grain g leads nowhere.
func (s *sparse) seError(entry uint64, g int64) error {
	if entry>>60 != seAllocated {
		return s.errorf(g, "its grain table has the entry %#x, want 0 (not here) or one that begins with the digit 1 or 2 (zeros) or 3 (data), of 16: the grain table is damaged", entry)
	}
	return s.errorf(g, "its grain table has the entry %#x, grain %d of the file, which has %d bytes: the grain table is damaged", entry, seIndex(entry), s.fileSize)
}
