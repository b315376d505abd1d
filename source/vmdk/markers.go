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
	// rangeGrains is the number of grains in a range, the unit in which markers are
	// read and cached. With grains of 64 KiB, a range is 128 MiB of the disk.
	rangeGrains = 2048

	// maxStretches limits the number of stretches (see the type stretch) of one extent.
	// stretchBudget limits the number of stretches that an image and all its parents have together.
	// Each stretch takes 24 bytes of memory. In disks of up to 4 TiB with grains of 64 KiB, each
	// range (see rangeGrains) can have a stretch of its own.
	maxStretches  = 32 << 10
	stretchBudget = 2 * maxStretches

	// One read fetches several markers if they are at most closeMarkers apart. If they are
	// farther apart, it is faster to read each marker by itself than to read the bytes
	// between them as well.
	closeMarkers = 8 << 10  // bytes
	markerWindow = 64 << 10 // bytes, the largest read
)

// These are the types of markers that do not belong to a grain. The progress marker, which ESXi
// hosts send during an export, is in VMware's header files. "Virtual Disk Format 5.0" describes all
// other types under the headings "Stream-Optimized Compressed Sparse Extents" and "Markers".
const (
	markerEnd = iota
	markerTable
	markerDirectory
	markerFooter
	markerProgress
)

// The type markers is the index of a stream of compressed grains that has no grain directory. Each
// grain begins with a marker that says which grain it is. All markers are read when the extent is
// opened, but only the places where stretches begin are kept in memory. The markers within a
// stretch are read again when they are needed.
type markers struct {
	*grainFile
	geometry
	entries  sectorEntries
	metadata []region // places where no grain can be
	end      int64    // offset of the end-of-stream marker in the file, bytes

	list  []stretch // ascending
	every int64     // number of ranges with grains for each stretch; 1: each such range begins a stretch
	added int64     // ranges with grains that add has seen
	last  int64     // number of the last grain that add has seen

	// The lock mu is held while markers are read again. Concurrent readers of a range therefore
	// read its markers only once. After one range, a reader often reads the next range. The
	// following fields therefore keep the position at which the last reading of markers ended.
	mu   sync.Mutex
	from int64 // first grain after the range that was read last
	next int64 // first grain at or after from that is in the file
	pos  int64 // offset of the marker of grain next in the file, bytes; 0: not known
}

// stretch is a part of a stream of grains. It begins with the first grain of a range (see
// rangeGrains) that is in the file. It may have the grains of several ranges, and ends
// where the next stretch begins.
type stretch struct {
	first int64 // number of its first grain
	pos   int64 // offset of the marker of that grain in the file, bytes
	n     int64 // the stretch consists of n grains without gaps; 0: it has gaps
}

// openMarkers reads the markers of a stream with the header h. footer is the offset of
// the footer, or 0 if there is none. openMarkers returns an error if the stream has
// bytes of unknown meaning between the descriptor and the end-of-stream marker.
func openMarkers(f *grainFile, g geometry, h *header, footer int64, metadata []region) (*markers, error) {
	end, err := streamEnd(f.file, footer)
	if err != nil {
		return nil, err
	}
	if h.flags&flagZeroGrain != 0 {
		return nil, fmt.Errorf("the flags %#x in the header say that grain tables may mark grains as zeros, but the file has no grain tables: it is not known which grains are zeros", h.flags)
	}
	start, err := h.firstMarker(f.file, end)
	if err != nil {
		return nil, err
	}
	x := &markers{grainFile: f, geometry: g, entries: sectorEntries{grain: g.grain}, metadata: metadata, end: end, every: 1}
	err = x.eachGrain(start, func(g, pos int64) bool {
		x.add(g, pos)
		return true
	})
	if err != nil {
		return nil, err
	}
	return x, nil
}

// eachGrain calls the function visit with the number of each grain and the offset of its
// marker in the file. start is the offset of the first marker to read. eachGrain returns
// when the stream ends or when visit returns false.
func (x *markers) eachGrain(start int64, visit func(g, pos int64) (more bool)) error {
	scratch := unpackers.Get().(*unpacker)
	defer unpackers.Put(scratch)
	r := markerReader{index: x, pos: start, last: -1, off: start, scratch: scratch}
	for {
		g, pos, err := r.next()
		if err != nil || g < 0 || !visit(g, pos) {
			return err
		}
	}
}

// The method add records that the stream has grain g. pos is the offset of the marker of this grain
// in the file. The numbers of the grains must ascend from call to call.
func (x *markers) add(g, pos int64) {
	last := len(x.list) - 1
	if last < 0 || g/rangeGrains != x.last/rangeGrains {
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

// The method thin halves the list of stretches: it joins each pair of neighbouring stretches into
// one stretch.
func (x *markers) thin() {
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

// The method share shortens the list of stretches, so that all images of the chain together have no
// more stretches than stretchBudget. The parameter m is the cache of all images of the chain. The
// cache also has the number of their stretches.
func (x *markers) share(m *memory) {
	x.mu.Lock()
	defer x.mu.Unlock()
	for len(x.list) > 1 && int64(len(x.list)) > (stretchBudget-m.stretches.Load())/2 {
		x.thin()
	}
	x.list = slices.Clone(x.list) // to free the unused capacity
	m.stretches.Add(int64(len(x.list)))
}

// The method find returns the position, in the list of stretches, of the stretch that may have
// grain g. This is the last stretch that begins at or before g. If there is no such stretch, find
// returns -1.
func (x *markers) find(g int64) int {
	return sort.Search(len(x.list), func(i int) bool { return x.list[i].first > g }) - 1
}

// streamEnd returns the offset, in bytes, of the end-of-stream marker in f. The marker must
// be after the footer or, if the offset of the footer is 0, at the end of the file.
//
// The marker is a sector of zeros. A truncated file may have been filled up with zeros. A
// sector of zeros in another place therefore does not prove that the stream is complete.
func streamEnd(f source.Disk, footer int64) (int64, error) {
	size := f.Size()
	end := size - sectorSize
	if footer > 0 {
		end = footer + sectorSize
	}
	if size%sectorSize != 0 && footer == 0 || end > size-sectorSize {
		return 0, fmt.Errorf("there is no end-of-stream marker: the file has %d bytes, and should end with a sector of zeros at offset %d: the file is truncated", size, (end+sectorSize-1)/sectorSize*sectorSize)
	}
	var b [sectorSize]byte
	if err := image.ReadFull(f, b[:], end); err != nil {
		return 0, err
	}
	if !zero.Is(b[:]) {
		return 0, fmt.Errorf("there is no end-of-stream marker: found %x at offset %d, the last sector of the file, want zeros: the file is truncated", b[:16], end)
	}
	return end, nil
}

// firstMarker returns the offset of the first marker of the stream in f. end is the
// offset of the end of the stream. firstMarker returns an error if the bytes between the
// descriptor and the first marker are not all zeros, because they might be a grain.
func (h *header) firstMarker(f source.Disk, end int64) (int64, error) {
	limit := uint64(end) / sectorSize
	from := uint64(1)
	if h.descriptorSize > 0 {
		if h.descriptorOffset > limit || h.descriptorSize > limit-h.descriptorOffset {
			return 0, fmt.Errorf("the descriptor at sector %d has %d sectors, but the stream ends at sector %d: the file is truncated", h.descriptorOffset, h.descriptorSize, limit)
		}
		from = max(from, h.descriptorOffset+h.descriptorSize)
	}
	if h.overhead > limit {
		return 0, fmt.Errorf("the metadata (overHead) ends at sector %d, but the stream ends at sector %d: the file is truncated", h.overhead, limit)
	}
	start := int64(max(from, h.overhead)) * sectorSize
	b := make([]byte, markerWindow)
	for off := int64(from) * sectorSize; off < start; off += int64(len(b)) {
		b = b[:min(int64(len(b)), start-off)]
		if err := image.ReadFull(f, b, off); err != nil {
			return 0, err
		}
		if !zero.Is(b) {
			at := off + int64(slices.IndexFunc(b, func(c byte) bool { return c != 0 }))
			return 0, fmt.Errorf("found the byte %#x at offset %d, between the descriptor and the first marker at offset %d (overHead), want zeros: the byte may belong to a grain, which cannot be checked because the file has no grain tables", b[at-off], at, start)
		}
	}
	return start, nil
}

// markerReader reads markers one after another.
type markerReader struct {
	index *markers
	pos   int64 // offset of the next marker in the file, bytes
	last  int64 // number of the last grain, -1 before the first one
	at    int64 // offset of the marker of that grain

	scratch *unpacker
	window  []byte // bytes of the file from the offset off on
	off     int64
	served  int64 // number of markers that the window has served
}

// The method next returns the number of the next grain and the offset of its marker. At the end of
// the stream it returns -1 as the number.
func (r *markerReader) next() (g, pos int64, err error) {
	end := r.index.end
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
				return 0, 0, bad("the marker has no compressed bytes and the type 0 (end of the stream), but its first 8 bytes are %#x, want 0: the file is damaged or truncated", value)
			case pos != end:
				return 0, 0, bad("the stream ends too early: found the end-of-stream marker (zeros), want this marker at offset %d, at the end of the file: the file is damaged, or truncated and filled up with zeros", end)
			}
			return -1, pos, nil
		case markerTable, markerDirectory, markerFooter, markerProgress:
			if left := (end-pos)/sectorSize - 1; left < 0 || value > uint64(left) {
				return 0, 0, bad("%d sectors of metadata (type %d) follow the marker, but only %d sectors are left before the end of the stream at offset %d: the file is truncated or damaged", value, kind, left, end)
			}
			r.pos += sectorSize + int64(value)*sectorSize
		default:
			return 0, 0, bad("the marker has no compressed bytes and the type %d, want 0 to %d: the file is damaged", kind, markerProgress)
		}
	}
}

// checkGrain checks the marker at r.pos, which is the marker of a grain, and returns the number
// of the grain. lba and size are the fields of the marker: lba is the first sector of the grain
// in the extent, and size is the number of the grain's compressed bytes.
func (r *markerReader) checkGrain(lba uint64, size int64) (int64, error) {
	x, end := r.index, r.index.end
	switch {
	case lba >= x.capacity:
		return 0, fmt.Errorf("the marker belongs to a grain at sector %d, but the extent has %d sectors: the file is damaged", lba, x.capacity)
	case lba%x.grain != 0:
		return 0, fmt.Errorf("the marker belongs to a grain at sector %d, want a multiple of the grain size of %d sectors: the file is damaged", lba, x.grain)
	case markerSize+size > x.maxPacked():
		return 0, fmt.Errorf("the marker has a length of %d compressed bytes, want 1 to %d for a grain of %d bytes: the file is damaged", size, x.maxPacked()-markerSize, x.grainSize)
	case r.pos+markerSize+size > end:
		return 0, fmt.Errorf("the marker is followed by %d compressed bytes, which would end at offset %d, but the stream ends at offset %d: the file is truncated or damaged", size, r.pos+markerSize+size, end)
	case r.pos/sectorSize > math.MaxUint32:
		return 0, fmt.Errorf("the marker lies past the first 2 TiB of the file, which sector numbers of 32 bits cannot reach")
	}
	g := int64(lba / x.grain)
	if g <= r.last {
		return 0, fmt.Errorf("the marker belongs to a grain at sector %d, but the previous marker, at offset %d, belongs to a grain at sector %d: in a file without grain tables, the sectors must ascend", lba, r.at, uint64(r.last)*x.grain)
	}
	return g, nil
}

// The method fill makes sure that the window has the marker at r.pos. The window is the part of the
// file that is in memory. If the marker is not in the window, fill reads a new window. If the
// markers in the old window were close together, the new window gets enough bytes for several
// markers.
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
	r.scratch.packed = image.Grow(r.scratch.packed, min(size, r.index.fileSize-r.pos))
	r.window, r.off, r.served = r.scratch.packed, r.pos, 1
	return image.ReadFull(r.index.file, r.window, r.pos)
}

func (x *markers) run(g, needed int64, hole *fileHole) (run, error) {
	scan := hole != nil // a scan needs the kinds of grains, but not their places
	number, in := g/rangeGrains, g%rangeGrains
	if entries := x.mem.Cached(x.id, number); entries != nil && !scan {
		return x.runOf(entries, in), nil
	}
	known, n := x.known(g)
	n = min(n, max(needed, rangeGrains))
	switch {
	case known == absentGrain && n > 0:
		return run{n: n}, nil
	case known == dataGrain && scan:
		return run{n: n, kind: dataGrain}, nil
	}
	entries, err := x.places(number)
	if err != nil {
		return run{}, fmt.Errorf("%s: %w", x.name, err)
	}
	return x.runOf(entries, in), nil
}

// runOf returns a run of grains, which begins with grain i of a range and ends where the range
// ends. The parameter entries has the table entries of all grains of the range.
func (x *markers) runOf(entries []byte, i int64) run {
	entries = entries[i<<sectorEntryShift:]
	r := run{n: int64(len(entries)) >> sectorEntryShift}
	if !zero.Is(entries) {
		r.entries, r.format = entries, &x.entries
	}
	return r
}

func (x *markers) occupied(start, end int64) (region, bool) { return within(x.metadata, start, end) }

// The method known returns the kind of grain g, if it can tell the kind without reading from the
// file. The n grains from g on are all of this kind. If it cannot tell the kind, n is 0.
func (x *markers) known(g int64) (kind grainKind, n int64) {
	x.mu.Lock()
	if g >= x.from && g < x.next {
		n = min(x.next, x.grains()) - g
	}
	x.mu.Unlock()
	if n > 0 {
		return absentGrain, n
	}
	i, next := x.find(g), x.grains()
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

// The method places returns where the grains of a range are in the file. The result has the form of
// entries of a grain table. The method reads the markers of the range, unless these entries are
// cached.
func (x *markers) places(number int64) ([]byte, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	if entries := x.mem.Cached(x.id, number); entries != nil {
		return entries, nil
	}
	first := number * rangeGrains
	stop := min(first+rangeGrains, x.grains())
	entries := make([]byte, (stop-first)<<sectorEntryShift)
	if i := x.find(stop - 1); i >= 0 {
		from := x.list[i].pos
		if x.pos > 0 && x.next >= x.list[i].first && x.next < stop {
			from = x.pos
		}
		err := x.eachGrain(from, func(g, pos int64) bool {
			switch {
			case g >= stop:
				x.from, x.next, x.pos = stop, g, pos
			case g >= first:
				binary.LittleEndian.PutUint32(entries[(g-first)<<sectorEntryShift:], uint32(pos/sectorSize))
			}
			return g < stop
		})
		if err != nil {
			return nil, err
		}
	}
	x.mem.Put(x.id, number, entries)
	return entries, nil
}
