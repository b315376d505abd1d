package vmdk

import (
	"sync"
	"sync/atomic"

	"vddkcp/source"
)

const (
	// pageSize is how much of the grain tables is read and cached at once, in
	// bytes: the tables of 1 GiB with grains of 64 KiB.
	pageSize = 64 << 10

	pageSets, pageWays = 16, 4 // 4 MiB of pages

	grainSlots = 4
)

// memory is what an image and its parents keep beside what is in use: pages of
// grain tables and a few unpacked grains. Its size depends on no field of an
// image, but for the slots, which are as large as a grain. It is safe for
// concurrent use.
type memory struct {
	files     atomic.Uint64 // extents that share it so far
	sets      [pageSets]pageSet
	grains    [grainSlots]grainSlot
	stretches atomic.Int64 // in the indexes of the extents that share it
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

// grainSlot holds the grain that was unpacked last of those that fall on it.
// Its lock is held while it is filled, so that readers of pieces of a grain
// unpack it once.
type grainSlot struct {
	mu    sync.Mutex
	file  uint64
	grain int64
	data  []byte
	full  bool // data is that grain
}

// page returns page number of f, which has size bytes and is known as file.
func (m *memory) page(f source.Disk, file uint64, size, number int64) ([]byte, error) {
	if p := m.cached(file, number); p != nil {
		return p.data, nil
	}
	off := number * pageSize
	p := &page{file: file, number: number, data: make([]byte, min(pageSize, size-off))}
	if err := readFull(f, p.data, off); err != nil {
		return nil, err
	}
	m.put(p)
	return p.data, nil
}

func (m *memory) set(file uint64, number int64) *pageSet {
	return &m.sets[(uint64(number)+file*5)%pageSets]
}

// cached returns page number of file, nil where it is not kept.
func (m *memory) cached(file uint64, number int64) *page {
	set := m.set(file, number)
	for i := range set.ways {
		if p := set.ways[i].Load(); p != nil && p.file == file && p.number == number {
			return p
		}
	}
	return nil
}

func (m *memory) put(p *page) {
	set := m.set(p.file, p.number)
	set.ways[set.next.Add(1)%pageWays].Store(p)
}
