package vmdk

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

const (
	cowdHeaderSize = 4 * sectorSize
	cowdVersion    = 1
	cowdEntries    = 4096 // of a grain table, always
)

// openCOWD takes f, which begins with the magic of a vmfsSparse extent, as the
// extent that has want bytes of the disk. Such an extent is a hosted sparse one
// but for its header and the size of its tables ("Virtual Disk Format 5.0", ESX
// Server Sparse Extents; libvmdk's "VMware Virtual Disk Format", The COWD
// sparse extent data file). That its writer did not close it is ignored, as for
// the others, and so are flags, of which nothing but 3 is known.
func openCOWD(name string, f source.Disk, want int64) (*sparse, error) {
	s := &sparse{name: name, file: f, fileSize: f.Size(), fileKind: kindCOWD, entryShift: 2}
	if err := s.initCOWD(want); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

func (s *sparse) initCOWD(want int64) error {
	var b [cowdHeaderSize]byte
	if s.fileSize < int64(len(b)) {
		return fmt.Errorf("the COWD header at offset 0 needs %d bytes, the file has %d: it is truncated", len(b), s.fileSize)
	}
	if err := image.ReadFull(s.file, b[:], 0); err != nil {
		return err
	}
	field := func(off int) uint64 { return uint64(binary.LittleEndian.Uint32(b[off:])) }
	if v := field(4); v != cowdVersion {
		return fmt.Errorf("COWD header offset 4: version %d, want %d", v, cowdVersion)
	}
	s.header = header{capacity: field(12), grain: field(16), directoryOffset: field(20), tableEntries: cowdEntries}
	if s.capacity == 0 {
		return fmt.Errorf("COWD header offset 12: capacity of 0 sectors, want 1 or more")
	}
	if err := checkGrain("COWD header offset 16", s.grain); err != nil {
		return err
	}
	entries := int64(field(24))
	if entries < s.tables() {
		return fmt.Errorf("COWD header offset 24: the grain directory has %d entries, want %d or more for the capacity of %d sectors", entries, s.tables(), s.capacity)
	}
	gd := int64(s.directoryOffset) * sectorSize
	if gd < cowdHeaderSize {
		return fmt.Errorf("COWD header offset 20: the grain directory at sector %d lies in the header, want sector %d or more (4 is usual)", s.directoryOffset, cowdHeaderSize/sectorSize)
	}
	if gd > s.fileSize-entries*4 {
		return fmt.Errorf("the grain directory at sector %d needs %d bytes, the file has %d: it is truncated", s.directoryOffset, entries*4, s.fileSize)
	}
	s.primary = directory{what: "grain directory", at: gd}
	s.fixed = []region{{"header", 0, cowdHeaderSize}, {"grain directory", gd, gd + entries*4}}
	s.metadata = slices.Clone(s.fixed)
	if err := s.fit(want); err != nil {
		return err
	}
	return s.indexTables()
}

// checkGrain checks a grain size in sectors, of grains that are not compressed.
func checkGrain(where string, grain uint64) error {
	if grain == 0 || grain > maxGrain/sectorSize || bits.OnesCount64(grain) != 1 {
		return fmt.Errorf("%s: grain size of %d sectors, want a power of two from 1 to %d", where, grain, maxGrain/sectorSize)
	}
	return nil
}

// partOfDisk is the error about a file that is an extent of a disk, opened as
// if it were the disk. ESXi calls the descriptor as the extent, but for suffix.
func partOfDisk(path, what, suffix string) error {
	descriptor := "the .vmdk file that describes it"
	if name, ok := strings.CutSuffix(path, suffix); ok {
		descriptor += ", " + quote(name+".vmdk") + " by its name"
	}
	return fmt.Errorf("%s: a %s extent, which has no descriptor: it is a part of a disk, open %s", path, what, descriptor)
}
