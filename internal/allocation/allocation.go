package allocation

import (
	"container/list"
	"fmt"
	"math/bits"
	"sort"
	"sync"
)

// Block is an allocated range: the number of its first sector, and its sectors.
type Block struct{ Start, Count uint64 }

// Map says which chunks of a window are allocated. It takes a few bytes
// for each run of chunks, or a bit for each chunk, whichever is less.
type Map struct {
	chunks  uint32
	borders []uint32 // where runs end, the first one (maybe empty) a hole; unless there are bits
	bits    []uint64
}

// New returns the allocation of the chunks that begin at sector
// first, each of size sectors. It is an error when the blocks are not as the library promises,
// ascending and within what was asked: then they say nothing. A chunk that is
// touched by a block is allocated.
func New(first uint64, chunks uint32, size uint64, blocks []Block) (*Map, error) {
	a := &Map{chunks: chunks}
	if len(blocks) > int(chunks)/64 { // 8 bytes each are more than the bits
		a.bits = make([]uint64, (chunks+63)/64)
	} else {
		a.borders = make([]uint32, 0, 2*len(blocks))
	}
	end := first + uint64(chunks)*size
	next := first
	for i, b := range blocks {
		if b.Start < next || b.Count == 0 || b.Start > end || b.Count > end-b.Start {
			return nil, fmt.Errorf("block %d of the answer is [%d, +%d), want one in [%d, %d) (sectors)", i, b.Start, b.Count, next, end)
		}
		next = b.Start + b.Count
		from := uint32((b.Start - first) / size)
		to := uint32((next - first + size - 1) / size)
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

// bytes is about what a takes in memory.
func (a *Map) bytes() int { return 128 + 4*cap(a.borders) + 8*len(a.bits) }

// Run returns what chunk c is and the end of the run of chunks that are the
// same.
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
			w = ^w // the bits shifted in look like the other kind
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

// Windows keeps the allocation of the windows that were asked for last. It is
// safe for concurrent use.
type Windows struct {
	most int // bytes

	mu    sync.Mutex
	known map[int64]*list.Element // by number
	used  list.List               // of *knownWindow, the last used in front
	bytes int
}

type knownWindow struct {
	number int64
	*Map
}

func NewWindows(most int) *Windows {
	return &Windows{most: most, known: make(map[int64]*list.Element)}
}

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

// Bytes returns how much memory the maps take that are kept.
func (w *Windows) Bytes() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.bytes
}
