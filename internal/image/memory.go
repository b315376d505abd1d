package image

import (
	"sync"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/source"
)

const (
	// PageSize is how much of the tables is read and cached at once, in bytes:
	// the tables of 1 GiB with grains of 64 KiB.
	PageSize = 64 << 10

	pageSets, pageWays = 16, 4 // 4 MiB of pages

	unitSlots = 4
)

// Memory is what an image and those below it keep beside what is in use: pages
// of tables, the places of tables, and a few unpacked grains or clusters (units). Its size depends on
// no field of an image, but for the slots, which are as large as a unit. The
// zero value is ready. It is safe for concurrent use.
type Memory struct {
	files atomic.Uint64 // that share it so far
	spans atomic.Int64  // of their Places
	sets  [pageSets]pageSet
	slots [unitSlots]unitSlot
}

// pageSet holds the pages whose numbers fall on it. Who comes last replaces
// who came first; a page that was replaced stays valid for those that hold it.
type pageSet struct {
	next atomic.Uint32
	ways [pageWays]atomic.Pointer[page]
}

type page struct {
	file   uint64
	number int64
	data   []byte // shorter at the end of the file
}

// unitSlot holds the unit that was unpacked last of those that fall on it. Its
// lock is held while it is filled, so that readers of pieces of a unit unpack
// it once.
type unitSlot struct {
	mu   sync.Mutex
	file uint64
	unit int64
	data []byte
	full bool // data is that unit
}

// NewFile returns a number for a file, by which the memory knows it.
func (m *Memory) NewFile() uint64 { return m.files.Add(1) }

// Share makes the places of a file's tables a part of the memory: of the ranges
// of all files it keeps MaxSpans.
func (m *Memory) Share(p *Places) {
	p.keep(int(MaxSpans - m.spans.Load()))
	m.spans.Add(int64(p.count()))
}

// Page returns page number of f, which has size bytes and is known as file. It
// is not to be changed.
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

func (m *Memory) set(file uint64, number int64) *pageSet {
	return &m.sets[(uint64(number)+file*5)%pageSets]
}

// Cached returns page number of file, nil where it is not kept.
func (m *Memory) Cached(file uint64, number int64) []byte {
	set := m.set(file, number)
	for i := range set.ways {
		if p := set.ways[i].Load(); p != nil && p.file == file && p.number == number {
			return p.data
		}
	}
	return nil
}

// Put keeps data, not empty and at most PageSize, as page number of file.
func (m *Memory) Put(file uint64, number int64, data []byte) {
	set := m.set(file, number)
	set.ways[set.next.Add(1)%pageWays].Store(&page{file, number, data})
}

// Piece fills p with the bytes at in of a unit of size bytes of file, and keeps
// the unit, which unpack makes: the next piece is likely to be of it.
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

// growth is what buffers grow by, in bytes.
const growth = 64 << 10

// Grow returns b with n bytes, whatever they are.
func Grow(b []byte, n int64) []byte {
	if int64(cap(b)) < n {
		b = make([]byte, (n+growth-1)&^(growth-1))
	}
	return b[:n]
}
