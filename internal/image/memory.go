package image

import (
	"sync"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/source"
)

const (
	// PageSize is the number of bytes of a page: the part of a table that is read and cached at
	// a time. The entries of a page cover 1 GiB of the disk if its grains have 64 KiB.
	PageSize = 64 << 10

	pageSets, pageWays = 16, 4 // 4 MiB of pages

	unitSlots = 4
)

// Memory caches the parts of a chain of images that are needed often: pages of tables, the
// places of tables, and a few units, which are grains or clusters that were decompressed. The
// pages and the places have a fixed largest size, whatever the images contain. There are at most
// unitSlots units, and the image decides how large a unit is. The zero value is ready to use. It
// is safe for concurrent use.
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

// page is a cached page: a part of a table of an image.
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

// NewFile returns a number for a file. A Memory caches parts of several files and identifies
// them by these numbers. The other methods take the number as their parameter file.
func (m *Memory) NewFile() uint64 { return m.files.Add(1) }

// Share limits the memory that the files of a chain need for the places of their tables. places
// belongs to one more file. All files that share m may have at most MaxSpans ranges together. If
// this limit would be exceeded, Share removes the last ranges from places.
func (m *Memory) Share(places *Places) {
	places.keep(int(MaxSpans - m.spans.Load()))
	m.spans.Add(int64(places.count()))
}

// Page returns a page of f, which has size bytes, and reads it if it is not cached. number is
// the number of the page, and file the number of f from NewFile. The caller must not change the
// page.
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

// set returns the set of pages to which a page of a file belongs.
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

// Piece fills p with bytes of a decompressed unit, from the given offset in the unit on. If the
// unit is not cached, Piece calls unpack, which must fill its parameter with the decompressed
// unit. size is the number of bytes of the decompressed unit. Then Piece caches the unit, because
// the next read probably needs it, too.
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

// growth is a number of bytes. Grow rounds the size of a new buffer up to a multiple of it.
const growth = 64 << 10

// Grow returns a buffer of n bytes with undefined content. It uses the memory of b if that is
// large enough, and otherwise new memory.
func Grow(b []byte, n int64) []byte {
	if int64(cap(b)) < n {
		b = make([]byte, (n+growth-1)&^(growth-1))
	}
	return b[:n]
}
