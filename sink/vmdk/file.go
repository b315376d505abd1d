package vmdk

import (
	"encoding/binary"
	"errors"
	"io"
	"math"
)

// These constants define the layout that VMware's tools write and that vSphere
// expects.
const (
	sectorSize = 512
	grainSize  = 64 << 10 // bytes

	tableEntries = 512
	tableSize    = tableEntries * 4

	descriptorSector  = 1
	descriptorSectors = 20
	firstGrainSector  = 128 // overHead of the header: the sectors before hold header and descriptor
)

// Flags and values of a header ("Virtual Disk Format 5.0", Hosted Sparse Extent
// Header).
const (
	flagNewline    = 1 << 0  // the bytes that detect a text-mode transfer are valid
	flagCompressed = 1 << 16 // grains are compressed
	flagMarkers    = 1 << 17 // each grain begins with a marker

	version     = 3 // vSphere requires this version for streamOptimized
	deflate     = 1
	gdAtEnd     = math.MaxUint64 // gdOffset of the header if the footer has the offset
	newlines    = "\n \r\n"
	magic       = "KDMV"
	grainMarker = 12 // bytes of a marker before the compressed data of a grain
)

// These are the types of markers before metadata. Markers before grains have no
// type ("Virtual Disk Format 5.0", Stream-Optimized Compressed Sparse Extents,
// Markers).
const (
	markerTable     = 1
	markerDirectory = 2
	markerFooter    = 3
)

// maxPacked is the maximum size of a compressed grain that Place accepts, in bytes.
// This limit comes from qemu, which cannot read larger grains. Encode never reaches
// it, because data that cannot be compressed grows by less than 64 bytes.
const maxPacked = 2 * grainSize

// chunk is the number of bytes that are written to the file with one call.
const chunk = 1 << 20

var errTooLong = errors.New("the file of a VMDK can have at most 2 TiB, and the compressed disk is larger: write a raw or qcow2 target instead")

// The type file writes the file of an image, from its beginning to its end.
type file struct {
	out  io.WriterAt
	size int64  // size of the disk, bytes
	pos  int64  // offset in the file of the next byte
	buf  []byte // the bytes before pos that are not written yet

	table     [tableSize]byte // the grain table that is being filled
	number    int64           // number of that table
	used      bool            // the table has a grain
	directory []byte          // grain directory
}

func newFile(out io.WriterAt, size int64) *file {
	const tableSpan = tableEntries * grainSize
	tables := (size-1)/tableSpan + 1
	return &file{out: out, size: size, buf: make([]byte, 0, chunk), directory: make([]byte, tables*4)}
}

// The method begin writes the part of the file that comes before the grains.
func (f *file) begin(descriptor string) error {
	header := f.header(gdAtEnd)
	if err := f.write(header[:]); err != nil {
		return err
	}
	if err := f.write([]byte(descriptor)); err != nil {
		return err
	}
	return f.zeros(firstGrainSector*sectorSize - f.pos)
}

// The method header returns a SparseExtentHeader. A file has this structure
// twice: at its beginning (the header) and near its end (the footer).
func (f *file) header(directory uint64) (b [sectorSize]byte) {
	le := binary.LittleEndian
	copy(b[:], magic)
	le.PutUint32(b[4:], version)
	le.PutUint32(b[8:], flagNewline|flagCompressed|flagMarkers)
	le.PutUint64(b[12:], uint64(f.size/sectorSize))
	le.PutUint64(b[20:], grainSize/sectorSize)
	le.PutUint64(b[28:], descriptorSector)
	le.PutUint64(b[36:], descriptorSectors)
	le.PutUint32(b[44:], tableEntries)
	// Bytes 48 to 55 stay zero. They are for the offset of the redundant grain
	// directory, which this package does not write.
	le.PutUint64(b[56:], directory)
	le.PutUint64(b[64:], firstGrainSector)
	copy(b[73:], newlines)
	le.PutUint16(b[77:], deflate)
	return b
}

// The method grain writes one grain, which is already compressed, and has the
// number g in the disk. Grains with lower numbers must have been written before.
func (f *file) grain(g int64, enc []byte) error {
	if number := g / tableEntries; number != f.number {
		if err := f.endTable(); err != nil {
			return err
		}
		f.number = number
	}
	sector, err := f.sector()
	if err != nil {
		return err
	}
	var marker [grainMarker]byte
	binary.LittleEndian.PutUint64(marker[:], uint64(g*(grainSize/sectorSize)))
	binary.LittleEndian.PutUint32(marker[8:], uint32(len(enc)))
	if err := f.write(marker[:]); err != nil {
		return err
	}
	if err := f.write(enc); err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(f.table[g%tableEntries*4:], sector)
	f.used = true
	return f.fill()
}

// endTable writes the current grain table and starts an empty one. It does
// nothing if the table has no grain.
func (f *file) endTable() error {
	if !f.used {
		return nil
	}
	if err := f.marker(markerTable, tableSize/sectorSize); err != nil {
		return err
	}
	sector, err := f.sector()
	if err != nil {
		return err
	}
	binary.LittleEndian.PutUint32(f.directory[f.number*4:], sector)
	if err := f.write(f.table[:]); err != nil {
		return err
	}
	clear(f.table[:])
	return nil
}

// The method end writes the part of the file that comes after the grains.
func (f *file) end() error {
	if err := f.endTable(); err != nil {
		return err
	}
	sectors := (int64(len(f.directory))-1)/sectorSize + 1
	if err := f.marker(markerDirectory, sectors); err != nil {
		return err
	}
	directory := f.pos / sectorSize
	if err := f.write(f.directory); err != nil {
		return err
	}
	if err := f.fill(); err != nil {
		return err
	}
	if err := f.marker(markerFooter, 1); err != nil {
		return err
	}
	footer := f.header(uint64(directory))
	if err := f.write(footer[:]); err != nil {
		return err
	}
	if err := f.zeros(sectorSize); err != nil { // the end-of-stream marker
		return err
	}
	return f.flush()
}

// The method marker writes a marker. The marker gives the type of the metadata
// that follow it, and their number of sectors. The caller writes these metadata
// next.
func (f *file) marker(kind uint32, sectors int64) error {
	var b [sectorSize]byte
	binary.LittleEndian.PutUint64(b[:], uint64(sectors))
	binary.LittleEndian.PutUint32(b[12:], kind)
	return f.write(b[:])
}

// The method sector returns the number of the sector of the file at which the next
// write begins. Entries of grain tables and of the grain directory contain such
// numbers.
func (f *file) sector() (uint32, error) {
	sector := f.pos / sectorSize
	if sector > math.MaxUint32 {
		return 0, errTooLong
	}
	return uint32(sector), nil
}

// The method fill writes zeros up to the next sector boundary of the file.
func (f *file) fill() error {
	return f.zeros((sectorSize - f.pos%sectorSize) % sectorSize)
}

func (f *file) zeros(n int64) error {
	for n > 0 {
		p := zeroSector[:min(n, sectorSize)]
		if err := f.write(p); err != nil {
			return err
		}
		n -= int64(len(p))
	}
	return nil
}

// zeroSector is a sector of zeros. It must not be changed.
var zeroSector [sectorSize]byte

func (f *file) write(p []byte) error {
	for len(p) > 0 {
		n := copy(f.buf[len(f.buf):cap(f.buf)], p)
		f.buf, f.pos, p = f.buf[:len(f.buf)+n], f.pos+int64(n), p[n:]
		if len(f.buf) == cap(f.buf) {
			if err := f.flush(); err != nil {
				return err
			}
		}
	}
	return nil
}

func (f *file) flush() error {
	if len(f.buf) == 0 {
		return nil
	}
	_, err := f.out.WriteAt(f.buf, f.pos-int64(len(f.buf)))
	f.buf = f.buf[:0]
	return err
}
