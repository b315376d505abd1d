package vmdk

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/source"
)

const (
	sectorSize = 512
	headerSize = sectorSize
	headSize   = 4 << 10 // bytes at the start of a file that show what kind it is

	// maxGrain and maxPackedGrain are the largest sizes of uncompressed and compressed
	// grains. They limit the memory that a reader allocates for a grain. VMware and
	// qemu write grains of 64 KiB.
	maxGrain       = 16 << 20 // bytes, of grains that are not compressed
	maxPackedGrain = 1 << 20  // bytes, of grains before they are compressed
	maxTable       = 64 << 10 // entries in a grain table; VMware and qemu write 512

	// The footer is searched in the last bytes of the file. footerSearch is the number of
	// these bytes.
	footerSearch = 64 << 10 // bytes

	gdAtEnd = 1<<64 - 1 // the gdOffset of a header whose footer has the real one
)

// These are the flags of a header ("Virtual Disk Format 5.0", Hosted Sparse Extent
// Header).
const (
	flagNewline    = 1 << 0  // the header has valid bytes by which a transfer in text mode is detected
	flagRedundant  = 1 << 1  // there is a redundant grain directory
	flagZeroGrain  = 1 << 2  // the entry 1 in a table means a grain of zeros
	flagCompressed = 1 << 16 // grains are compressed
	flagMarkers    = 1 << 17 // each grain begins with a marker
)

// The type header is the SparseExtentHeader of "Virtual Disk Format 5.0". Offsets and sizes are
// in sectors.
type header struct {
	version, flags                   uint32
	capacity, grain                  uint64
	descriptorOffset, descriptorSize uint64
	tableEntries                     uint32
	redundantOffset, directoryOffset uint64
	overhead                         uint64
	compression                      uint16
	newline                          [4]byte
}

func parseHeader(b []byte) header {
	le := binary.LittleEndian
	return header{
		version:          le.Uint32(b[4:]),
		flags:            le.Uint32(b[8:]),
		capacity:         le.Uint64(b[12:]),
		grain:            le.Uint64(b[20:]),
		descriptorOffset: le.Uint64(b[28:]),
		descriptorSize:   le.Uint64(b[36:]),
		tableEntries:     le.Uint32(b[44:]),
		redundantOffset:  le.Uint64(b[48:]),
		directoryOffset:  le.Uint64(b[56:]),
		overhead:         le.Uint64(b[64:]),
		newline:          [4]byte(b[73:77]),
		compression:      le.Uint16(b[77:]),
	}
}

// readHeader reads the header at the start of f. It checks only that the magic and the
// version are known, and that the bytes were not changed by a transfer in text mode,
// such as that of FTP.
func readHeader(f source.Disk) (header, error) {
	var b [headerSize]byte
	if f.Size() < headerSize {
		return header{}, fmt.Errorf("the header at offset 0 needs %d bytes, but the file has %d bytes: the file is truncated", headerSize, f.Size())
	}
	if err := image.ReadFull(f, b[:], 0); err != nil {
		return header{}, err
	}
	if string(b[:4]) != magicSparse {
		return header{}, fmt.Errorf("the file is no sparse extent: found %q at offset 0, want %q", b[:4], magicSparse)
	}
	h := parseHeader(b[:])
	return h, h.checkStart()
}

func (h *header) checkStart() error {
	if h.flags&flagNewline != 0 && h.newline != [4]byte{'\n', ' ', '\r', '\n'} {
		return fmt.Errorf("header offset 73: found bytes %x, want 0a200d0a: a transfer in text mode (FTP) damaged the file, transfer it again in binary mode", h.newline)
	}
	if h.version < 1 || h.version > 3 {
		return fmt.Errorf("header offset 4: version %d, want 1, 2 or 3", h.version)
	}
	return nil
}

// readDescriptor returns the text of the descriptor that is embedded in f. The caller
// has checked that the header has an offset and a size of the descriptor.
func (h *header) readDescriptor(f source.Disk) ([]byte, error) {
	size := int64(min(h.descriptorSize, maxDescriptor/sectorSize+1)) * sectorSize // one sector more than allowed, so that parseDescriptor notices it
	if h.descriptorOffset > uint64(f.Size())/sectorSize || int64(h.descriptorOffset)*sectorSize > f.Size()-size {
		return nil, fmt.Errorf("the descriptor at sector %d has %d sectors, but the file has %d bytes: the file is truncated", h.descriptorOffset, h.descriptorSize, f.Size())
	}
	text := make([]byte, size)
	return text, image.ReadFull(f, text, int64(h.descriptorOffset)*sectorSize)
}

// findHeader returns the header from which the offset of the grain directory is taken. This
// is the header at the start of f, or the footer, a copy of the header near the end of f.
// If findHeader returns the footer, its second result is the offset of the footer in bytes,
// otherwise 0. If the grains have markers, the returned header may lack the offset of a
// grain directory, because the grains can then be found without it.
func findHeader(f source.Disk) (h header, footer int64, err error) {
	h, err = readHeader(f)
	if err != nil || h.directoryOffset != gdAtEnd && (h.directoryOffset != 0 || !h.marked()) {
		return h, 0, err
	}
	last, footer, err := readFooter(f)
	if footer == 0 && h.directoryOffset == 0 {
		return h, 0, nil
	}
	if err == nil && last.directoryOffset == gdAtEnd && !last.marked() {
		err = fmt.Errorf("footer at offset %d: there is no grain directory, because gdOffset is %#x in the footer, and the header has no valid gdOffset either", footer, last.directoryOffset)
	}
	return last, footer, err
}

// readFooter returns the footer of f and its offset in bytes. The footer is a copy of the
// header. It is in the last sector of the file that does not consist of zeros. After the
// footer come the end-of-stream marker, which is a sector of zeros, and perhaps zeros that
// a transfer added. If there is no footer, readFooter returns an error and the offset 0.
func readFooter(f source.Disk) (h header, offset int64, err error) {
	end := f.Size() / sectorSize * sectorSize
	b := make([]byte, min(footerSearch, end-headerSize))
	start := end - int64(len(b))
	if err := image.ReadFull(f, b, start); err != nil {
		return header{}, 0, err
	}
	for i := len(b) - sectorSize; i >= 0; i -= sectorSize {
		sector := b[i : i+sectorSize]
		if zero.Is(sector) {
			continue
		}
		offset = start + int64(i)
		if !bytes.HasPrefix(sector, []byte(magicSparse)) {
			return header{}, 0, fmt.Errorf("there is no footer with the offset of the grain directory: found %q at offset %d, in the last sector before the end-of-stream marker, want %q: the file of %d bytes is truncated, or its writer did not close it", sector[:4], offset, magicSparse, f.Size())
		}
		h = parseHeader(sector)
		if err := h.checkStart(); err != nil {
			return header{}, offset, fmt.Errorf("footer at offset %d: %w", offset, err)
		}
		return h, offset, nil
	}
	return header{}, 0, fmt.Errorf("no footer in the last %d bytes of the file of %d bytes, although the header says that a footer has the offset of the grain directory: the file is truncated", len(b), f.Size())
}

// The method check returns an error unless those fields of the header that are needed to find a
// grain have valid values. The values are not valid if they refer to a range of the file that
// lies after the end of the file. The parameter fileSize is the size of the file in bytes.
func (h *header) check(fileSize int64) error {
	if h.capacity == 0 || h.capacity > maxSectors {
		return fmt.Errorf("the header has a capacity of %d sectors, want 1 to %d", h.capacity, int64(maxSectors))
	}
	limit := uint64(maxGrain / sectorSize)
	switch h.compression {
	case 0:
		if h.flags&flagCompressed != 0 {
			return fmt.Errorf("flags %#x in the header say that grains are compressed, but compressAlgorithm is 0 (none)", h.flags)
		}
	case 1:
		limit = maxPackedGrain / sectorSize
	default:
		return fmt.Errorf("compressAlgorithm %d is not known, want 0 (none) or 1 (deflate)", h.compression)
	}
	if h.grain == 0 || h.grain > limit || bits.OnesCount64(h.grain) != 1 {
		return fmt.Errorf("the header has a grain size of %d sectors, want a power of two from 1 to %d", h.grain, limit)
	}
	if h.tableEntries == 0 || h.tableEntries > maxTable {
		return fmt.Errorf("the header has %d entries in a grain table, want 1 to %d (512 is usual)", h.tableEntries, maxTable)
	}
	if h.overhead > uint64(fileSize)/sectorSize {
		return fmt.Errorf("the metadata (overHead) ends at sector %d, but the file has %d bytes: the file is truncated", h.overhead, fileSize)
	}
	return nil
}

// The method compressed reports whether grains are compressed. Like qemu it looks at the header
// field that names the algorithm, and not at flagCompressed, which some writers do not set.
func (h *header) compressed() bool { return h.compression != 0 }

// The method marked reports whether each grain, grain table and grain directory in the file has
// a marker in front of it. Such a file can be read without a grain directory.
func (h *header) marked() bool { return h.compressed() && h.flags&flagMarkers != 0 }

// hasDirectory reports whether the header has the offset of a grain directory.
func (h *header) hasDirectory() bool { return h.directoryOffset != 0 && h.directoryOffset != gdAtEnd }

// The method directory returns the offset in bytes of a grain directory that, according to the
// header, begins at the given sector. It returns an error if no grain directory can begin at
// this sector.
func (h *header) directory(what string, sector uint64, fileSize int64) (int64, error) {
	if sector == 0 {
		return 0, fmt.Errorf("the header has no %s (its sector is 0)", what)
	}
	need := tableCount(h.capacity, h.grain, uint64(h.tableEntries)) << sectorEntryShift
	if sector > uint64(fileSize)/sectorSize || int64(sector)*sectorSize > fileSize-need {
		return 0, fmt.Errorf("the %s at sector %d needs %d bytes, but the file has %d bytes: the file is truncated", what, sector, need, fileSize)
	}
	return int64(sector) * sectorSize, nil
}
