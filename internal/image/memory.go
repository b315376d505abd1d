package image

import (
	"sync"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/source"
)

const (
	// PageSize is the number of bytes of a table that are read and cached together.
	// Such a page covers 1 GiB with grains of 64 KiB.
	PageSize = 64 << 10

	pageSets, pageWays = 16, 4 // 4 MiB of pages

	unitSlots = 4
)

// Memory caches what a chain of images needs often: pages of tables, the places of
// tables, and a few grains or clusters ("units") that were decompressed. Its size does
// not depend on any field of an image, except that there are unitSlots slots of the
// size of a unit. The zero value is ready to use. It is safe for concurrent use.
type Memory struct {
	files atomic.Uint64 // number of files that share the memory
	spans atomic.Int64  // number of ranges in the Places of these files
	sets  [pageSets]pageSet
	slots [unitSlots]unitSlot
}

// pageSet is one of the sets into which the cache of pages is divided. The file and the
// number of a page decide to which set it belongs. A new page replaces the oldest one
// of its set. A caller that still has a replaced page may continue to use it.
type pageSet struct {
	next atomic.Uint32
	ways [pageWays]atomic.Pointer[page]
}

// page is a cached page of a table of an image.
type page struct {
	file   uint64
	number int64
	data   []byte // PageSize bytes, or less at the end of the file
}

// unitSlot caches one decompressed unit. The number of a unit decides to which slot it
// belongs. The lock mu is held while a unit is decompressed, so that concurrent readers
// of a unit decompress it only once.
type unitSlot struct {
	mu   sync.Mutex
	file uint64
	unit int64
	data []byte
	full bool // data has the unit
}

// NewFile returns a new number for a file, which identifies the file in the other
// methods of Memory.
func (m *Memory) NewFile() uint64 { return m.files.Add(1) }

// Share adds the ranges of p to the number of ranges that m counts. If the ranges of
// all files together would be more than MaxSpans, it first drops some ranges of p.
func (m *Memory) Share(p *Places) {
	p.keep(int(MaxSpans - m.spans.Load()))
	m.spans.Add(int64(p.count()))
}

// Page returns page number of f, a file of size bytes, and reads it if necessary. file
// is the result of NewFile. The caller must not change the page.
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

// set returns the pageSet to which page number of file belongs.
func (m *Memory) set(file uint64, number int64) *pageSet {
	return &m.sets[(uint64(number)+file*5)%pageSets]
}

// Cached returns page number of file, or nil if it is not cached.
func (m *Memory) Cached(file uint64, number int64) []byte {
	set := m.set(file, number)
	for i := range set.ways {
		if p := set.ways[i].Load(); p != nil && p.file == file && p.number == number {
			return p.data
		}
	}
	return nil
}

// Put caches data as page number of file. data must not be empty and has at most
// PageSize bytes.
func (m *Memory) Put(file uint64, number int64, data []byte) {
	set := m.set(file, number)
	set.ways[set.next.Add(1)%pageWays].Store(&page{file, number, data})
}

// Piece fills p with bytes of the given unit of a file, from the offset in of the unit
// on. If the unit is not cached, Piece calls unpack to decompress its size bytes, and
// caches it, because the next read is likely to be of the same unit.
func (m *Memory) Piece(p []byte, file uint64, unit, in, size int64, unpack func(unit []byte) error) error {
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
	copy(p, slot.data[in:])
	return nil
}

// growth is the unit in bytes to which Grow rounds the size of a new buffer up.
const growth = 64 << 10

// Grow returns b with a length of n bytes and undefined content. It allocates a new
// buffer if b is too small.
func Grow(b []byte, n int64) []byte {
	if int64(cap(b)) < n {
		b = make([]byte, (n+growth-1)&^(growth-1))
	}
	return b[:n]
}
