// Package allocation remembers which parts of a disk are allocated. It is for protocols in which
// a client asks for the allocated blocks of a limited range of the disk. Such a range is called a
// window.
//
// [New] makes a [Map] from the allocated blocks of one window. The map describes the window in
// chunks of equal size. [Windows] is a cache of maps. It keeps the maps that were used last.
package allocation

import (
	"container/list"
	"fmt"
	"math/bits"
	"sort"
	"sync"
)

// Block is an allocated range of Count sectors that begins at sector Start.
type Block struct{ Start, Count uint64 }

// Map says which chunks of a window are allocated. It is safe for concurrent use, because it does
// not change after New. A run is a sequence of chunks that are all allocated, or all not allocated.
// A Map needs 4 bytes of memory for each run, or one bit for each chunk, whichever is less.
type Map struct {
	chunks uint32
	// The field borders has the end of each run, in ascending order. The chunks of the first run,
	// which may be empty, are not allocated. Those of the second run are allocated, and so on. The
	// chunks after the last border are not allocated. If the field bits is set, borders is not
	// used.
	borders []uint32
	bits    []uint64 // one bit for each chunk, 1 if it is allocated
}

// New returns the map of a window of the disk. firstSector is the number of the sector at which
// the window begins. The window has the given number of chunks, and each chunk has chunkSectors
// sectors. A chunk counts as allocated if any part of it lies in a block.
//
// The blocks must be in ascending order, lie in the window, have at least one sector and not
// overlap. If they violate one of these rules, New returns an error, because such a list of blocks
// cannot be trusted.
func New(firstSector uint64, chunks uint32, chunkSectors uint64, blocks []Block) (*Map, error) {
	a := &Map{chunks: chunks}
	if len(blocks) > int(chunks)/64 { // two borders for each block would take more memory than the bits
		a.bits = make([]uint64, (chunks+63)/64)
	} else {
		a.borders = make([]uint32, 0, 2*len(blocks))
	}
	end := firstSector + uint64(chunks)*chunkSectors
	next := firstSector
	for i, b := range blocks {
		if b.Start < next || b.Count == 0 || b.Start > end || b.Count > end-b.Start {
			return nil, fmt.Errorf("allocated block %d begins at sector %d and has %d sectors, but it must have at least one sector and lie between the sectors %d and %d", i, b.Start, b.Count, next, end)
		}
		next = b.Start + b.Count
		from := uint32((b.Start - firstSector) / chunkSectors)
		to := uint32((next - firstSector + chunkSectors - 1) / chunkSectors)
		n := len(a.borders)
		switch {
		case a.bits != nil:
			a.setBits(from, to)
		case n > 0 && from <= a.borders[n-1]:
			a.borders[n-1] = to
		default:
			a.borders = append(a.borders, from, to)
		}
	}
	return a, nil
}

func (a *Map) setBits(from, to uint32) {
	for c := from; c < to; c++ {
		a.bits[c/64] |= 1 << (c % 64)
	}
}

// The method bytes returns roughly the number of bytes of memory that the map needs.
func (a *Map) bytes() int { return 128 + 4*cap(a.borders) + 8*len(a.bits) }

// Run reports whether the chunk with the number c is allocated. The result end is the number of the
// next chunk whose state is different. If there is no such chunk, it is the number of chunks of the
// map.
func (a *Map) Run(c uint32) (allocated bool, end uint32) {
	if a.bits == nil {
		i := sort.Search(len(a.borders), func(i int) bool { return a.borders[i] > c })
		if i == len(a.borders) {
			return false, a.chunks
		}
		return i%2 == 1, a.borders[i]
	}
	allocated = a.bits[c/64]>>(c%64)&1 == 1
	for end = c; end < a.chunks; {
		w := a.bits[end/64] >> (end % 64)
		if allocated {
			w = ^w
			// The highest bits of the word w do not stand for chunks. The shift above has filled
			// these bits with zeros, and the complement has turned the zeros into ones. The ones
			// are cleared here. Otherwise TrailingZeros64 would take the lowest of them for the end
			// of the run.
			if n := 64 - end%64; n < 64 {
				w &= 1<<n - 1
			}
		}
		if w != 0 {
			end += uint32(bits.TrailingZeros64(w))
			break
		}
		end += 64 - end%64
	}
	return allocated, min(end, a.chunks)
}

// Windows is a cache of maps, one for each window of the disk. It keeps the maps that were used
// last. It is safe for concurrent use.
type Windows struct {
	most int // bytes of memory that the maps may take together

	mu    sync.Mutex
	known map[int64]*list.Element // by the number of the window
	used  list.List               // values are *knownWindow; the one that was used last is in front
	bytes int                     // memory that the maps take
}

type knownWindow struct {
	number int64
	*Map
}

// NewWindows returns an empty cache. Its maps together take at most limit bytes of memory, with
// one exception: the map that was used last is kept even if it is larger than the limit.
func NewWindows(limit int) *Windows {
	return &Windows{most: limit, known: make(map[int64]*list.Element)}
}

// Get returns the map of the window with the given number. It returns nil if the cache has no map
// of this window.
func (w *Windows) Get(number int64) *Map {
	w.mu.Lock()
	defer w.mu.Unlock()
	e := w.known[number]
	if e == nil {
		return nil
	}
	w.used.MoveToFront(e)
	return e.Value.(*knownWindow).Map
}

// Put adds the map of a window to the cache. If the maps then take more memory than the cache may
// use, Put removes the maps that were not used for the longest time. If the cache already has a
// map of the window, Put does nothing.
func (w *Windows) Put(number int64, a *Map) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.known[number] != nil {
		return
	}
	w.known[number] = w.used.PushFront(&knownWindow{number, a})
	w.bytes += a.bytes()
	for w.bytes > w.most && w.used.Len() > 1 {
		last := w.used.Remove(w.used.Back()).(*knownWindow)
		delete(w.known, last.number)
		w.bytes -= last.bytes()
	}
}

// Chunks returns the number of chunks that the map describes.
func (a *Map) Chunks() uint32 { return a.chunks }

// Bytes returns the number of bytes of memory that the maps in the cache take together.
func (w *Windows) Bytes() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bytes
}
