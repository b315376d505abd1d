package vmdk

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/image"
)

const (
	cowdHeaderSize = 4 * sectorSize
	cowdVersion    = 1
	cowdEntries    = 4096 // in each grain table
)

// cowd is the index of a COWD extent, the delta disk (vmfsSparse) of older ESXi. Two documents
// describe the format: "Virtual Disk Format 5.0" in its section "ESX Server Sparse Extents",
// and "VMware Virtual Disk Format" of libvmdk in its section "The COWD sparse extent data
// file". A COWD extent differs from a hosted sparse extent in its header and in the size of its
// tables. It has no redundant grain directory.
type cowd struct{ tables }

// newCOWD is the sparseReader for files that begin with the magic of COWD. Like the readers
// of other extents, it also accepts a file whose header says that the writer did not close
// the file. It does not check the flags in the header, because their meaning is not
// documented except for the value 3.
func newCOWD(f *grainFile, extentSize int64) (*sparse, error) {
	var b [cowdHeaderSize]byte
	if f.fileSize < int64(len(b)) {
		return nil, fmt.Errorf("the COWD header at offset 0 needs %d bytes, but the file has %d bytes: the file is truncated", len(b), f.fileSize)
	}
	if err := image.ReadFull(f.file, b[:], 0); err != nil {
		return nil, err
	}
	field := func(off int) uint64 { return uint64(binary.LittleEndian.Uint32(b[off:])) }
	if v := field(4); v != cowdVersion {
		return nil, fmt.Errorf("COWD header offset 4: version %d, want %d", v, cowdVersion)
	}
	capacity, grain, sector := field(12), field(16), field(20)
	if capacity == 0 {
		return nil, fmt.Errorf("COWD header offset 12: capacity of 0 sectors, want 1 or more")
	}
	if err := checkGrain("COWD header offset 16", grain); err != nil {
		return nil, err
	}
	entries, need := int64(field(24)), tableCount(capacity, grain, cowdEntries)
	if entries < need {
		return nil, fmt.Errorf("COWD header offset 24: the grain directory has %d entries, want %d or more for the capacity of %d sectors", entries, need, capacity)
	}
	at := int64(sector) * sectorSize
	if at < cowdHeaderSize {
		return nil, fmt.Errorf("COWD header offset 20: the grain directory at sector %d lies in the header, want sector %d or more (4 is usual)", sector, cowdHeaderSize/sectorSize)
	}
	if at > f.fileSize-entries*4 {
		return nil, fmt.Errorf("the grain directory at sector %d needs %d bytes, but the file has %d bytes: the file is truncated", sector, entries*4, f.fileSize)
	}
	g, err := newGeometry(capacity, grain, extentSize)
	if err != nil {
		return nil, err
	}
	format := &sectorEntries{grain: grain}
	x := &cowd{newTables(f, g, format, sectorEntryShift, cowdEntries)}
	x.primary = directory{what: "grain directory", at: at}
	x.fixed = []region{{"header", 0, cowdHeaderSize}, {"grain directory", at, at + entries*4}}
	x.metadata = slices.Clone(x.fixed)
	if x.checkable() {
		x.overlaps = newOverlapCheck(format, x.count)
		err = x.indexDirectory(&x.primary, func(int64, int64) {})
	}
	return &sparse{grainFile: f, geometry: g, index: x}, err
}

// checkGrain returns an error if uncompressed grains cannot have the given size. The parameter
// grain is this size in sectors. The size was read from a field of the header. The parameter
// field is the name of this field, for the text of the error.
func checkGrain(field string, grain uint64) error {
	if grain == 0 || grain > maxGrain/sectorSize || bits.OnesCount64(grain) != 1 {
		return fmt.Errorf("%s: grain size of %d sectors, want a power of two from 1 to %d", field, grain, maxGrain/sectorSize)
	}
	return nil
}

// partOfDisk returns the error for a file that is only one extent of a disk, but was
// opened instead of the descriptor of the disk. ESXi names such a file like the
// descriptor, with the given suffix instead of ".vmdk".
func partOfDisk(path, what, suffix string) error {
	descriptor := "the .vmdk file that describes the disk"
	if name, ok := strings.CutSuffix(path, suffix); ok {
		descriptor += ", probably " + quote(name+".vmdk")
	}
	return fmt.Errorf("%s is only a part of a disk, a %s extent without a descriptor: open %s", path, what, descriptor)
}
