package image

import (
	"sync"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/source"
)

const (
	// PageSize is the number of bytes of a page: the part of a table that is read and cached at a
	// time. If the grains of an image have 64 KiB, the entries of a page cover 1 GiB of the disk.
	PageSize = 64 << 10

	pageSets, pageWays = 16, 4 // 4 MiB of pages

	unitSlots = 4
)

// Memory caches the parts of a chain of images that are needed often: pages of tables, the places
// of tables, and a few units. A unit is a grain or a cluster that was decompressed. The memory
// for pages and places has a fixed limit, whatever the images contain. At most four units
// (unitSlots) are cached, but the image decides how large a unit is. The zero value is ready to
// use. It is safe for concurrent use.
type Memory struct {
	files atomic.Uint64 // number of files that share the memory
	spans atomic.Int64  // number of ranges in the Places of these files
	sets  [pageSets]pageSet
	slots [unitSlots]unitSlot
}

// The cache of pages is divided into sets. The file and the number of a page determine its set.
// A new page replaces the oldest page of its set. A caller that still uses a replaced page may
// continue to do so.
type pageSet struct {
	next atomic.Uint32
	ways [pageWays]atomic.Pointer[page]
}

// The type page is a cached page: a part of a table of an image.
type page struct {
	file   uint64
	number int64
	data   []byte // PageSize bytes, or less at the end of the file
}

// unitSlot caches one decompressed unit. The number of a unit determines its slot. The lock mu is
// held while a unit is decompressed. Therefore concurrent readers of a unit decompress it only
// once.
type unitSlot struct {
	mu   sync.Mutex
	file uint64
	unit int64
	data []byte
	full bool // data has the unit
}

// NewFile returns a number that stands for a file. A Memory caches parts of several files and
// identifies them by these numbers. In the other methods, the parameter file is such a number.
func (m *Memory) NewFile() uint64 { return m.files.Add(1) }

// Share is called for each file of a chain, with the places of the tables in this file. It limits
// the memory for places: the files that use the same Memory may have at most MaxSpans ranges
// together. If the file would exceed this limit, Share removes the last ranges from its places.
func (m *Memory) Share(places *Places) {
	places.keep(int(MaxSpans - m.spans.Load()))
	m.spans.Add(int64(places.count()))
}

// Page returns one page of the file f. It reads the page if it is not cached. The parameter file
// is the number that NewFile returned for f, size is the size of f in bytes, and number is the
// number of the page. The caller must not change the page.
func (m *Memory) Page(f source.Disk, file uint64, size, number int64) ([]byte, error) {
	if data := m.Cached(file, number); data != nil {
		return data, nil
	}
	off := number * PageSize
	data := make([]byte, min(PageSize, size-off))
	if err := ReadFull(f, data, off); err != nil {
		return nil, err
	}
	m.Put(file, number, data)
	return data, nil
}

// The method set returns the set of pages to which a page of a file belongs.
func (m *Memory) set(file uint64, number int64) *pageSet {
	return &m.sets[(uint64(number)+file*5)%pageSets]
}

// Cached returns a page of a file. It returns nil if the page is not cached.
func (m *Memory) Cached(file uint64, number int64) []byte {
	set := m.set(file, number)
	for i := range set.ways {
		if p := set.ways[i].Load(); p != nil && p.file == file && p.number == number {
			return p.data
		}
	}
	return nil
}

// Put caches data as a page of a file. data has at least one byte and at most PageSize bytes.
func (m *Memory) Put(file uint64, number int64, data []byte) {
	set := m.set(file, number)
	set.ways[set.next.Add(1)%pageWays].Store(&page{file, number, data})
}

// Piece fills p with bytes of a decompressed unit. offset is the place of the first of these
// bytes in the unit, and size is the number of bytes of the whole unit. If the unit is not
// cached, Piece calls the function unpack, which must fill its parameter with the decompressed
// unit. Then Piece caches the unit, because the next read probably needs the same unit.
func (m *Memory) Piece(p []byte, file uint64, unit, offset, size int64, unpack func(unit []byte) error) error {
	slot := &m.slots[uint64(unit)%unitSlots]
	slot.mu.Lock()
	defer slot.mu.Unlock()
	if !slot.full || slot.file != file || slot.unit != unit {
		slot.full = false
		slot.data = Grow(slot.data, size)
		if err := unpack(slot.data); err != nil {
			return err
		}
		slot.file, slot.unit, slot.full = file, unit, true
	}
	copy(p, slot.data[offset:])
	return nil
}

// The constant growth is a number of bytes. Grow rounds the size of a new buffer up to a multiple
// of it.
const growth = 64 << 10

// Grow returns a buffer of n bytes with undefined content. It uses the memory of b if that is
// large enough, and otherwise new memory.
func Grow(b []byte, n int64) []byte {
	if int64(cap(b)) < n {
		b = make([]byte, (n+growth-1)&^(growth-1))
	}
	return b[:n]
}
