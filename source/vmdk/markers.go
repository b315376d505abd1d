package vmdk

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"
	"sort"
	"sync"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// stretchGrains is of how many grains the places are found out at once:
	// 128 MiB of a disk with grains of 64 KiB.
	stretchGrains = 2048

	// maxStretches bounds the index of one extent, and indexBudget those of an
	// image with its parents, each of 24 bytes: up to 4 TiB with grains of
	// 64 KiB each stretch has one.
	maxStretches = 32 << 10
	indexBudget  = 2 * maxStretches

	// Where markers lie closer together than this, many are read at once;
	// otherwise reading what is between costs more than another call.
	closeMarkers = 8 << 10  // bytes
	markerWindow = 64 << 10 // bytes
)

// The types of a marker that is not of a grain ("Virtual Disk Format 5.0",
// Stream-Optimized Compressed Sparse Extents, Markers). A progress marker is in
// VMware's headers, not in its document; hosts send it while an export goes on.
const (
	markerEnd = iota
	markerTable
	markerDirectory
	markerFooter
	markerProgress
)

// markerIndex says where the grains of a stream without a grain directory are.
// It has not each of them, but where the markers of a stretch begin; what is
// between is read again when it is needed.
type markerIndex struct {
	end   int64 // offset in the file of the end-of-stream marker
	list  []stretch
	every int64 // of how many ranges of stretchGrains the first one is in list
	added int64 // ranges so far
	last  int64 // grain

	// mu is held while markers are read again, so that readers of a stretch do
	// it once. Where that came to is kept, since what follows is often wanted
	// next: behind from, the first grain is next, whose marker is at pos.
	mu              sync.Mutex
	from, next, pos int64
}

// stretch is a part of the markers, up to the next stretch. Its first one is
// the first that its range of stretchGrains grains has.
type stretch struct {
	first int64 // grain
	pos   int64 // offset of its marker in the file
	n     int64 // it has the n grains from the first on and no other; 0: some, with gaps
}

// add notes a grain that follows those before.
func (x *markerIndex) add(g, pos int64) {
	last := len(x.list) - 1
	if last < 0 || g/stretchGrains != x.last/stretchGrains {
		if x.added%x.every == 0 {
			if len(x.list) == maxStretches {
				x.thin()
			}
			x.list = append(x.list, stretch{g, pos, 0})
			last = len(x.list) - 1
		}
		x.added++
	}
	x.last = g
	e := &x.list[last]
	switch {
	case e.first == g:
		e.n = 1
	case e.n > 0 && e.first+e.n == g:
		e.n++
	default:
		e.n = 0
	}
}

// thin joins each stretch with the next one.
func (x *markerIndex) thin() {
	x.every *= 2
	joined := x.list[:0]
	for i := 0; i < len(x.list); i += 2 {
		e := x.list[i]
		if i+1 < len(x.list) {
			next := x.list[i+1]
			if e.n > 0 && next.n > 0 && e.first+e.n == next.first {
				e.n += next.n
			} else {
				e.n = 0
			}
		}
		joined = append(joined, e)
	}
	x.list = joined
}

// share thins the index, so that all that share m keep within the budget.
func (x *markerIndex) share(m *memory) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for len(x.list) > 1 && int64(len(x.list)) > (indexBudget-m.stretches.Load())/2 {
		x.thin()
	}
	x.list = slices.Clone(x.list) // without room for more
	m.stretches.Add(int64(len(x.list)))
}

// find returns the index of the stretch that has grain g, or may have it: -1
// where there is none before.
func (x *markerIndex) find(g int64) int {
	return sort.Search(len(x.list), func(i int) bool { return x.list[i].first > g }) - 1
}

// streamEnd returns where the end-of-stream marker of f must be: behind its
// footer, which is at the offset footer, or at the end of the file.
//
// The marker is nothing but a sector of zeros. A file whose end was lost may
// end in many of them, so it is no proof of a whole stream in any other place.
func streamEnd(f source.Disk, footer int64) (int64, error) {
	size := f.Size()
	end := size - sectorSize
	if footer > 0 {
		end = footer + sectorSize
	}
	if size%sectorSize != 0 && footer == 0 || end > size-sectorSize {
		return 0, fmt.Errorf("no end-of-stream marker: the file has %d bytes, want it to end with a sector of zeros at offset %d: it is truncated", size, (end+sectorSize-1)/sectorSize*sectorSize)
	}
	var b [sectorSize]byte
	if err := image.ReadFull(f, b[:], end); err != nil {
		return 0, err
	}
	if !zero.Is(b[:]) {
		return 0, fmt.Errorf("no end-of-stream marker: found %x at offset %d, the last sector of the file, want zeros: it is truncated", b[:16], end)
	}
	return end, nil
}

// readMarkers makes the index of a stream that has no grain directory, and
// whose end-of-stream marker must be at end. It takes the stream only where all
// of it is accounted for: from the descriptor to that marker.
func (s *sparse) readMarkers(end int64) error {
	if s.flags&flagZeroGrain != 0 {
		return fmt.Errorf("flags %#x say that grains may be marked as zeros, and the grain tables that would say which are missing", s.flags)
	}
	start, err := s.firstMarker(end)
	if err != nil {
		return err
	}
	x := &markerIndex{end: end, every: 1}
	s.markers = x
	r := s.readerAt(start)
	defer r.release()
	for {
		g, pos, err := r.next()
		if err != nil {
			return err
		}
		if g < 0 {
			return nil
		}
		x.add(g, pos)
	}
}

// firstMarker returns the offset of the first marker. What is between the
// descriptor and it must be zeros, lest grains are passed over.
func (s *sparse) firstMarker(end int64) (int64, error) {
	limit := uint64(end) / sectorSize
	from := uint64(1)
	if s.descriptorSize > 0 {
		if s.descriptorOffset > limit || s.descriptorSize > limit-s.descriptorOffset {
			return 0, fmt.Errorf("its descriptor at sector %d has %d sectors, the stream ends at sector %d: it is truncated", s.descriptorOffset, s.descriptorSize, limit)
		}
		from = max(from, s.descriptorOffset+s.descriptorSize)
	}
	if s.overhead > limit {
		return 0, fmt.Errorf("the metadata (overHead) end at sector %d, the stream at sector %d: it is truncated", s.overhead, limit)
	}
	start := int64(max(from, s.overhead)) * sectorSize
	b := make([]byte, markerWindow)
	for off := int64(from) * sectorSize; off < start; off += int64(len(b)) {
		b = b[:min(int64(len(b)), start-off)]
		if err := image.ReadFull(s.file, b, off); err != nil {
			return 0, err
		}
		if !zero.Is(b) {
			at := off + int64(slices.IndexFunc(b, func(c byte) bool { return c != 0 }))
			return 0, fmt.Errorf("found %#x at offset %d, between the descriptor and the first marker at offset %d (overHead), want zeros: without grain tables there is no telling what that is", b[at-off], at, start)
		}
	}
	return start, nil
}

// markerReader reads markers one after another.
type markerReader struct {
	*sparse
	pos  int64 // of the next marker
	last int64 // grain, -1: none
	at   int64 // of its marker

	scratch *unpacker
	window  []byte // what the file has at off
	off     int64
	served  int64 // markers of the window
}

func (s *sparse) readerAt(pos int64) *markerReader {
	return &markerReader{sparse: s, pos: pos, last: -1, off: pos, scratch: unpackers.Get().(*unpacker)}
}

func (r *markerReader) release() { unpackers.Put(r.scratch) }

// next returns the number of the next grain and the offset of its marker, or
// -1 at the end of the stream.
func (r *markerReader) next() (g, pos int64, err error) {
	end := r.markers.end
	for {
		if err := r.fill(); err != nil {
			return 0, 0, fmt.Errorf("marker at offset %d: %w", r.pos, err)
		}
		b := r.window[r.pos-r.off:]
		value, size, kind := binary.LittleEndian.Uint64(b), int64(binary.LittleEndian.Uint32(b[8:])), binary.LittleEndian.Uint32(b[12:])
		pos = r.pos
		bad := func(format string, args ...any) error {
			return fmt.Errorf("marker at offset %d: %w", pos, fmt.Errorf(format, args...))
		}
		if size > 0 {
			if g, err = r.checkGrain(value, size); err != nil {
				return 0, 0, bad("%w", err)
			}
			r.last, r.at = g, pos
			r.pos = (pos + markerSize + size + sectorSize - 1) / sectorSize * sectorSize
			return g, pos, nil
		}
		switch kind {
		case markerEnd:
			switch {
			case value != 0:
				return 0, 0, bad("it has no bytes of a grain, and for the end of the stream its first 8 bytes are %#x, want 0: the file is damaged or truncated", value)
			case pos != end:
				return 0, 0, bad("it is the end of the stream (zeros), which is expected at offset %d, at the end of the file: the file is truncated and filled up, or damaged", end)
			}
			return -1, pos, nil
		case markerTable, markerDirectory, markerFooter, markerProgress:
			if left := (end-pos)/sectorSize - 1; left < 0 || value > uint64(left) {
				return 0, 0, bad("%d sectors of metadata (type %d) follow, and %d are left before the end of the stream at offset %d: the file is truncated or damaged", value, kind, left, end)
			}
			r.pos += sectorSize + int64(value)*sectorSize
		default:
			return 0, 0, bad("it has no bytes of a grain and the type %d, want 0 to %d: the file is damaged", kind, markerProgress)
		}
	}
}

// checkGrain returns the number of the grain whose marker is at r.pos.
func (r *markerReader) checkGrain(lba uint64, size int64) (int64, error) {
	end := r.markers.end
	switch {
	case lba >= r.capacity:
		return 0, fmt.Errorf("it is of sector %d, the extent has %d: the file is damaged", lba, r.capacity)
	case lba%r.grain != 0:
		return 0, fmt.Errorf("it is of sector %d, want a multiple of the grain size of %d: the file is damaged", lba, r.grain)
	case markerSize+size > r.maxPacked():
		return 0, fmt.Errorf("it gives %d compressed bytes, want 1 to %d for a grain of %d bytes: the file is damaged", size, r.maxPacked()-markerSize, r.grainSize)
	case r.pos+markerSize+size > end:
		return 0, fmt.Errorf("its %d compressed bytes end at %d, past the end of the stream at offset %d: the file is truncated or damaged", size, r.pos+markerSize+size, end)
	case r.pos/sectorSize > math.MaxUint32:
		return 0, fmt.Errorf("it lies past the 2 TiB that a sparse extent's sector numbers reach")
	}
	g := int64(lba / r.grain)
	if g <= r.last {
		return 0, fmt.Errorf("it is of sector %d, the one before at offset %d of sector %d: without grain tables they must ascend", lba, r.at, uint64(r.last)*r.grain)
	}
	return g, nil
}

// fill makes the window have the marker at pos.
func (r *markerReader) fill() error {
	have := int64(len(r.window))
	if r.pos-r.off+sectorSize <= have {
		r.served++
		return nil
	}
	size := int64(sectorSize)
	if r.served > 0 && (r.pos-r.off)/r.served <= closeMarkers {
		size = min(max(2*have, closeMarkers), markerWindow)
	}
	r.scratch.packed = image.Grow(r.scratch.packed, min(size, r.fileSize-r.pos))
	r.window, r.off, r.served = r.scratch.packed, r.pos, 1
	return image.ReadFull(r.file, r.window, r.pos)
}

// markerRun is run for a stream without grain tables. A scan needs to know
// where there are grains, not where in the file.
func (s *sparse) markerRun(g, want int64, scan bool) (run, error) {
	number, in := g/stretchGrains, g%stretchGrains
	if entries := s.mem.Cached(s.id, number); entries != nil && !scan {
		return entriesFrom(entries, in), nil
	}
	known, n := s.markers.known(g, s.grains())
	n = min(n, max(want, stretchGrains))
	switch {
	case known == absentGrain && n > 0:
		return run{n: n}, nil
	case known == dataGrain && scan:
		return run{n: n, like: math.MaxUint32}, nil
	}
	entries, err := s.places(number)
	if err != nil {
		return run{}, fmt.Errorf("%s: %w", s.name, err)
	}
	return entriesFrom(entries, in), nil
}

// entriesFrom makes a run of a range's entries from the i-th on.
func entriesFrom(entries []byte, i int64) run {
	entries = entries[i*4:]
	r := run{n: int64(len(entries) / 4), entries: entries}
	if zero.Is(entries) {
		r.entries = nil
	}
	return r
}

// known tells without reading what the n grains from g on are, of the grains of
// the extent, where n is not 0.
func (x *markerIndex) known(g, grains int64) (kind grainKind, n int64) {
	x.mu.Lock()
	if g >= x.from && g < x.next {
		n = min(x.next, grains) - g
	}
	x.mu.Unlock()
	if n > 0 {
		return absentGrain, n
	}
	i, next := x.find(g), grains
	if i+1 < len(x.list) {
		next = min(next, x.list[i+1].first)
	}
	if i < 0 || g > x.last {
		return absentGrain, next - g
	}
	e := x.list[i]
	switch {
	case e.n == 0:
		return absentGrain, 0
	case g < e.first+e.n:
		return dataGrain, min(next, e.first+e.n) - g
	}
	return absentGrain, next - g
}

// places returns where in the file the grains of a range of stretchGrains are,
// as a grain table has it.
func (s *sparse) places(number int64) ([]byte, error) {
	x := s.markers
	x.mu.Lock()
	defer x.mu.Unlock()
	if entries := s.mem.Cached(s.id, number); entries != nil {
		return entries, nil
	}
	first := number * stretchGrains
	stop := min(first+stretchGrains, s.grains())
	entries := make([]byte, (stop-first)*4)
	if i := x.find(stop - 1); i >= 0 {
		from := x.list[i].pos
		if x.pos > 0 && x.next >= x.list[i].first && x.next < stop {
			from = x.pos
		}
		r := s.readerAt(from)
		defer r.release()
		for {
			g, pos, err := r.next()
			if err != nil {
				return nil, err
			}
			if g < 0 {
				break
			}
			if g >= stop {
				x.from, x.next, x.pos = stop, g, pos
				break
			}
			if g >= first {
				binary.LittleEndian.PutUint32(entries[(g-first)*4:], uint32(pos/sectorSize))
			}
		}
	}
	s.mem.Put(s.id, number, entries)
	return entries, nil
}
