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
	headSize   = 4 << 10 // bytes of a file that tell what kind it is

	// maxGrain and maxPackedGrain bound the memory that an image can ask for.
	// VMware and qemu write 64 KiB.
	maxGrain       = 16 << 20 // bytes, not compressed
	maxPackedGrain = 1 << 20  // bytes, before compression
	maxTable       = 64 << 10 // entries of a grain table; VMware and qemu write 512

	// footerSearch is how far from the end of a stream its footer may begin.
	footerSearch = 64 << 10 // bytes

	gdAtEnd = 1<<64 - 1 // gdOffset when the footer has it
)

// The flags of a header ("Virtual Disk Format 5.0", Hosted Sparse Extent Header).
const (
	flagNewline    = 1 << 0  // the bytes that detect a text-mode transfer are valid
	flagRedundant  = 1 << 1  // there is a redundant grain directory
	flagZeroGrain  = 1 << 2  // entry 1 is a grain of zeros
	flagCompressed = 1 << 16 // grains are compressed
	flagMarkers    = 1 << 17 // each grain begins with a marker
)

// header is SparseExtentHeader of "Virtual Disk Format 5.0". Offsets and sizes
// are in sectors.
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

// readHeader reads the header at the start of f. It checks what lies at the
// start alone: the version, and that no transfer changed the bytes.
func readHeader(f source.Disk) (header, error) {
	var b [headerSize]byte
	if f.Size() < headerSize {
		return header{}, fmt.Errorf("the header at offset 0 needs %d bytes, the file has %d: it is truncated", headerSize, f.Size())
	}
	if err := image.ReadFull(f, b[:], 0); err != nil {
		return header{}, err
	}
	if string(b[:4]) != magicSparse {
		return header{}, fmt.Errorf("no sparse extent: found %q at offset 0, want %q", b[:4], magicSparse)
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

// readDescriptor returns the descriptor that is embedded in f. The header says
// that there is one.
func (h *header) readDescriptor(f source.Disk) ([]byte, error) {
	size := int64(min(h.descriptorSize, maxDescriptor/sectorSize+1)) * sectorSize // so that one that is too long is noticed
	if h.descriptorOffset > uint64(f.Size())/sectorSize || int64(h.descriptorOffset)*sectorSize > f.Size()-size {
		return nil, fmt.Errorf("its descriptor at sector %d has %d sectors, the file has %d bytes: it is truncated", h.descriptorOffset, h.descriptorSize, f.Size())
	}
	text := make([]byte, size)
	return text, image.ReadFull(f, text, int64(h.descriptorOffset)*sectorSize)
}

// findHeader returns the header that says where the grain directory is: the
// one at the start of f, or the footer, which is at the offset footer then (0:
// it is not). Neither need say so where the grains have markers.
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
		err = fmt.Errorf("footer at offset %d: it has no grain directory either (gdOffset %d)", footer, last.directoryOffset)
	}
	return last, footer, err
}

// readFooter returns the header that is the last sector but for zeros: the
// end-of-stream marker, and what a transfer may have filled up. It is at the
// offset at, which is 0 where there is none.
func readFooter(f source.Disk) (h header, at int64, err error) {
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
		at = start + int64(i)
		if !bytes.HasPrefix(sector, []byte(magicSparse)) {
			return header{}, 0, fmt.Errorf("the footer that has the grain directory must be the last sector before the end-of-stream marker; found %q at offset %d of %d: the file is truncated or was not closed", sector[:4], at, f.Size())
		}
		h = parseHeader(sector)
		if err := h.checkStart(); err != nil {
			return header{}, at, fmt.Errorf("footer at offset %d: %w", at, err)
		}
		return h, at, nil
	}
	return header{}, 0, fmt.Errorf("no footer in the last %d bytes of %d, and the header says that it has the grain directory: the file is truncated", len(b), f.Size())
}

// check checks the fields that say how to find a grain, against each other and
// the file's size in bytes.
func (h *header) check(fileSize int64) error {
	if h.capacity == 0 || h.capacity > maxSectors {
		return fmt.Errorf("capacity of %d sectors, want 1 to %d", h.capacity, int64(maxSectors))
	}
	limit := uint64(maxGrain / sectorSize)
	switch h.compression {
	case 0:
		if h.flags&flagCompressed != 0 {
			return fmt.Errorf("flags %#x say that grains are compressed, compressAlgorithm 0 that they are not", h.flags)
		}
	case 1:
		limit = maxPackedGrain / sectorSize
	default:
		return fmt.Errorf("compressAlgorithm %d is not known, want 0 (none) or 1 (deflate)", h.compression)
	}
	if h.grain == 0 || h.grain > limit || bits.OnesCount64(h.grain) != 1 {
		return fmt.Errorf("grain size of %d sectors, want a power of two from 1 to %d", h.grain, limit)
	}
	if h.tableEntries == 0 || h.tableEntries > maxTable {
		return fmt.Errorf("%d entries in a grain table, want 1 to %d (512 is usual)", h.tableEntries, maxTable)
	}
	if h.overhead > uint64(fileSize)/sectorSize {
		return fmt.Errorf("the metadata (overHead) end at sector %d, the file has %d bytes: it is truncated", h.overhead, fileSize)
	}
	return nil
}

// tables is the number of grain tables, that is of entries of the directory.
func (h *header) tables() int64 {
	perTable := uint64(h.tableEntries) * h.grain // no overflow: 2^16 * 2^15
	return int64((h.capacity-1)/perTable + 1)
}

// compressed reports whether grains are compressed. Like qemu it goes by the
// algorithm, since writers differ in the flag.
func (h *header) compressed() bool { return h.compression != 0 }

// marked reports whether each grain begins with a marker, and what is between
// the grains too: what a stream is that can be read without a grain directory.
func (h *header) marked() bool { return h.compressed() && h.flags&flagMarkers != 0 }

// hasDirectory reports whether the header says where the grain directory is.
func (h *header) hasDirectory() bool { return h.directoryOffset != 0 && h.directoryOffset != gdAtEnd }

// directory returns the offset in bytes of a grain directory at sector, or why
// it can't be there.
func (h *header) directory(what string, sector uint64, fileSize int64) (int64, error) {
	if sector == 0 {
		return 0, fmt.Errorf("no %s (sector 0)", what)
	}
	need := h.tables() * 4
	if sector > uint64(fileSize)/sectorSize || int64(sector)*sectorSize > fileSize-need {
		return 0, fmt.Errorf("the %s at sector %d needs %d bytes, the file has %d: it is truncated", what, sector, need, fileSize)
	}
	return int64(sector) * sectorSize, nil
}
