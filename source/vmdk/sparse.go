package vmdk

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/bits"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/source"
)

// sparse is an extent of a sparse kind: hosted sparse or streamOptimized
// ("Virtual Disk Format 5.0", Hosted Sparse Extents), vmfsSparse (cowd.go) or
// seSparse (sesparse.go). Its grain directory says where its grain tables are,
// and they where in the file each grain is. Both are read on demand. What the
// kinds differ in is how wide an entry is and what it says.
type sparse struct {
	disk     *Disk
	base     int64 // offset in the disk
	size     int64 // bytes of the disk that it has
	name     string
	file     source.Disk
	fileSize int64

	fileKind kind
	header
	se         seSparse // of that kind only
	entryShift uint     // of the bytes of an entry of the directory and the tables: 2 or 3
	grainSize  int64    // bytes
	grainShift uint
	primary    directory
	redundant  directory
	fallback   bool            // the redundant directory serves where the primary one is damaged
	replaced   map[int64]error // tables for which only the redundant directory serves, and why
	fixed      []region        // where no table can be
	metadata   []region        // where no grain can be, beside the tables
	warnings   []string        // sentences that name the file
	id         uint64          // of the file, in memory
	mem        *memory
	sound      soundTables  // nil: grains are not checked for overlaps
	markers    *markerIndex // nil: there are grain tables
}

// openSparse takes f, which begins with a sparse header, as the extent that
// has want bytes of the disk (0: what the header says).
func openSparse(name string, f source.Disk, want int64) (*sparse, error) {
	h, footer, err := findHeader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	first, err := readHeader(f)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	s := &sparse{name: name, file: f, fileSize: f.Size(), fileKind: kindSparse, header: h, entryShift: 2}
	s.fixed = append(first.regions(s.fileSize), region{"footer", footer, footer + headerSize})
	if footer == 0 {
		s.fixed = s.fixed[:len(s.fixed)-1]
	}
	if err := s.init(want, footer); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// init checks the header, which is at the offset footer or, where that is 0,
// at the start of the file.
func (s *sparse) init(want, footer int64) error {
	if err := s.check(s.fileSize); err != nil {
		return err
	}
	if err := s.fit(want); err != nil {
		return err
	}
	s.metadata = append([]region{{"metadata (overHead)", 0, max(int64(s.overhead), 1) * sectorSize}}, s.fixed...)
	if s.flags&flagRedundant != 0 && s.redundantOffset != 0 {
		// Damage of the redundant directory matters only where the primary one
		// is damaged as well.
		s.redundant, _ = s.locate("redundant grain directory", s.redundantOffset)
	}
	if s.redundant.at == 0 && !s.hasDirectory() && s.marked() {
		end, err := streamEnd(s.file, footer)
		if err == nil {
			err = s.readMarkers(end)
		}
		if err != nil {
			return fmt.Errorf("it has no grain directory, and without one only a whole stream can be read: %w", err)
		}
		return nil
	}
	return s.initDirectories()
}

// fit sets the sizes, of a header that is checked, to have want bytes of the
// disk (0: what the header says).
func (s *sparse) fit(want int64) error {
	s.grainSize = int64(s.grain) * sectorSize
	s.grainShift = uint(bits.TrailingZeros64(uint64(s.grainSize)))
	s.size = int64(s.capacity) * sectorSize
	if want > 0 {
		// Some writers round the capacity up to whole grains. Any other
		// difference would move what follows, or leave a gap.
		if want > s.size || s.size-want >= s.grainSize {
			return fmt.Errorf("its header has a capacity of %d sectors, the descriptor gives the extent %d", s.capacity, want/sectorSize)
		}
		s.size = want
	}
	return nil
}

// share makes the extent use the memory of others.
func (s *sparse) share(m *memory) {
	s.mem, s.id = m, m.NewFile()
	m.Share(s.primary.tables)
	m.Share(s.redundant.tables)
	if s.markers != nil {
		s.markers.share(m)
	}
}

// run is a stretch of grains whose table entries are known.
type run struct {
	n       int64  // grains
	entries []byte // 4 bytes a grain, or 8; nil: all are like
	like    uint64
	wide    bool // 8 bytes
}

// entry is the table entry of grain i of the run: for all kinds but seSparse
// the sector of the file where it begins, or 0 or 1.
func (r *run) entry(i int64) uint64 {
	switch {
	case r.entries == nil:
		return r.like
	case r.wide:
		return binary.LittleEndian.Uint64(r.entries[i*8:])
	}
	return uint64(binary.LittleEndian.Uint32(r.entries[i*4:]))
}

// grainKind is what a table entry says.
type grainKind uint8

const (
	absentGrain grainKind = iota // not in this image
	zeroGrain
	dataGrain
)

func (s *sparse) kind(entry uint64) grainKind {
	switch {
	case entry == 0:
		return absentGrain
	case s.fileKind == kindSESparse:
		return seKind(entry)
	case entry == 1 && s.flags&flagZeroGrain != 0:
		return zeroGrain
	}
	return dataGrain
}

// place is where in the file the grain of an entry begins, in bytes; nowhere,
// where that can't be.
func (s *sparse) place(entry uint64) int64 {
	if s.fileKind == kindSESparse {
		return s.sePlace(entry)
	}
	return int64(entry) * sectorSize
}

// grains is the number of grains of the extent.
func (s *sparse) grains() int64 { return (s.size-1)>>s.grainShift + 1 }

// run returns the table entries from grain g on, of as many grains as are at
// hand, at least one. It looks no further than max where that would cost.
// Tables that lie in hole, where the file is known to have zeros, are not read.
func (s *sparse) run(g, max int64, hole *fileHole) (run, error) {
	if s.markers != nil {
		return s.markerRun(g, max, hole != nil)
	}
	perTable := int64(s.tableEntries)
	table, in := g/perTable, g%perTable
	at, err := s.table(table)
	if err != nil {
		return run{}, err
	}
	left := min(perTable-in, s.grains()-g)
	off := at + in<<s.entryShift
	if at > 1 && hole.has(off, left<<s.entryShift) {
		at = 0
	}
	if at <= 1 {
		// A table that is not there, and often many of them.
		for left < max {
			next, err := s.table(table + 1)
			if next > 1 && hole.has(next, perTable<<s.entryShift) {
				next = 0
			}
			if err != nil || next != at {
				break
			}
			table++
			left = min(left+perTable, s.grains()-g)
		}
		return run{n: left, like: uint64(at)}, nil
	}
	if err := s.checkOverlap(table, at); err != nil {
		return run{}, err
	}
	data, err := s.mem.Page(s.file, s.id, s.fileSize, off/image.PageSize)
	if err != nil {
		return run{}, fmt.Errorf("%s: grain table %d: %w", s.name, table, err)
	}
	data = data[off%image.PageSize:]
	left = min(left, int64(len(data))>>s.entryShift)
	return run{n: left, entries: data[:left<<s.entryShift], wide: s.entryShift == 3}, nil
}

// readAt fills p with what the extent has at off.
func (s *sparse) readAt(p []byte, off int64) error {
	for len(p) > 0 {
		g := off >> s.grainShift
		need := (off+int64(len(p))-1)>>s.grainShift - g + 1
		r, err := s.run(g, need, nil)
		if err != nil {
			return err
		}
		need = min(need, r.n)
		for i := int64(0); i < need; {
			kind, pos, next := s.stretch(&r, i, need)
			n := min(int64(len(p)), (g+next)<<s.grainShift-off)
			switch {
			case kind == absentGrain:
				err = image.ReadParent(s.disk.parent, p[:n], s.base+off)
			case kind == zeroGrain:
				clear(p[:n])
			case s.compressed():
				err = s.unpackAt(p[:n], off, r, i)
			default:
				err = s.readPlain(p[:n], off, pos)
			}
			if err != nil {
				return err
			}
			p, off, i = p[n:], off+n, next
		}
	}
	return nil
}

// stretch returns the kind of grain i of r and its place in the file, and up to
// which grain, end at most, the ones that follow are of that kind and can be
// read together with it: plain data where the file goes on with them.
func (s *sparse) stretch(r *run, i, end int64) (kind grainKind, pos, next int64) {
	first := r.entry(i)
	kind, pos, next = s.kind(first), s.place(first), i+1
	switch {
	case r.entries == nil:
		next = end
	case kind != dataGrain || s.compressed():
		for next < end && s.kind(r.entry(next)) == kind {
			next++
		}
	case s.fileKind == kindSESparse:
		for at := pos + s.grainSize; next < end && s.sePlace(r.entry(next)) == at; at += s.grainSize {
			next++
		}
	default:
		for entry := first + s.grain; next < end && r.entry(next) == entry; entry += s.grain {
			next++
		}
	}
	return kind, pos, next
}

// readPlain reads grains that lie one after another in the file, the first of
// them, which has the byte at off, at start.
func (s *sparse) readPlain(p []byte, off, start int64) error {
	g := off >> s.grainShift
	if start == nowhere {
		r, err := s.run(g, 1, nil)
		if err != nil {
			return err
		}
		return s.seError(r.entry(0), g)
	}
	pos := start + off&(s.grainSize-1)
	if err := s.checkPlace(start, pos+int64(len(p)), off); err != nil {
		return err
	}
	if err := image.ReadFull(s.file, p, pos); err != nil {
		return s.errorf(g, "%w", err)
	}
	return nil
}

// checkPlace returns an error where the bytes [pos, end) of the file, which
// the grain tables give to the disk's at off, can't be of a grain.
func (s *sparse) checkPlace(pos, end, off int64) error {
	g := off >> s.grainShift
	if end > s.fileSize {
		return s.errorf(g, "it needs the bytes up to %d of the file, which has %d: the file is truncated or damaged", end, s.fileSize)
	}
	for _, m := range s.metadata {
		if err := s.checkWithin(m, pos, end, g); err != nil {
			return err
		}
	}
	for _, d := range []*directory{&s.primary, &s.redundant} {
		if from, to, ok := d.tables.Has(pos, end); ok {
			return s.checkWithin(region{"grain tables", from, to}, pos, end, g)
		}
	}
	return nil
}

// checkWithin returns an error where the bytes [pos, end) of the file, of grain
// g, lie in m.
func (s *sparse) checkWithin(m region, pos, end, g int64) error {
	if pos >= m.end || end <= m.start {
		return nil
	}
	return s.errorf(g, "it lies in the %s, bytes %d to %d of the file: the grain table is damaged", m.what, m.start, m.end)
}

// errorf is an error about grain g. It says where the grain is in the disk,
// and in the file where its table can be read.
func (s *sparse) errorf(g int64, format string, args ...any) error {
	where := "an unknown offset"
	if r, err := s.run(g, 1, nil); err == nil {
		if pos := s.place(r.entry(0)); pos != nowhere {
			where = fmt.Sprintf("offset %d", pos)
		}
	}
	return fmt.Errorf("%s: grain of disk offset %d at %s: %w", s.name, s.base+g<<s.grainShift, where, fmt.Errorf(format, args...))
}

// scanStep is how many grain tables that are not there are passed over until
// the context is looked at.
const scanStep = 1 << 16

// scan tells the allocation of [off, end) from the tables alone.
func (s *sparse) scan(ctx context.Context, off, end int64, emit func(grainKind, int64, int64) error) error {
	var hole fileHole
	for off < end {
		if err := s.disk.life.Cause(ctx); err != nil {
			return err
		}
		g := off >> s.grainShift
		need := min((end-1)>>s.grainShift-g+1, scanStep*int64(s.tableEntries))
		r, err := s.run(g, need, &hole)
		if err != nil {
			return err
		}
		need = min(need, r.n)
		if r.entries != nil && zero.Is(r.entries) {
			// An empty disk has empty tables, up to 4 GiB of them. Where the
			// file has a hole for them they need no reading.
			if err := hole.find(ctx, s, g); err != nil {
				return err
			}
			r.entries = nil
		}
		for i := int64(0); i < need; {
			kind := s.kind(r.entry(i))
			next := need
			if r.entries != nil {
				next = i + 1
				for next < need && s.kind(r.entry(next)) == kind {
					next++
				}
			}
			stop := min(end, (g+next)<<s.grainShift)
			if err := emit(kind, off, stop-off); err != nil {
				return err
			}
			off, i = stop, next
		}
	}
	return nil
}

// fileHole is a range of an extent's file that is known to read as zeros,
// during one scan of its tables. A nil one is empty.
type fileHole struct {
	start, end int64
	asked      int64 // below, another question would bring nothing new
}

func (h *fileHole) has(off, n int64) bool {
	return h != nil && off >= h.start && off+n <= h.end
}

// find looks for a hole at the table of grain g.
func (h *fileHole) find(ctx context.Context, s *sparse, g int64) error {
	perTable := int64(s.tableEntries)
	at, err := s.table(g / perTable)
	if err != nil || at <= 1 {
		return err
	}
	at += g % perTable << s.entryShift
	if at < h.asked {
		return nil
	}
	for e, err := range s.file.Extents(ctx, at, s.fileSize-at) {
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
		if h.asked = e.End(); e.Kind == source.Zero {
			h.start, h.end = e.Off, e.End()
		}
		break
	}
	return nil
}
