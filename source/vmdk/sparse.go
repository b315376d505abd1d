package vmdk

import (
	"context"
	"fmt"

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

// share makes the extent use the memory of others.
func (s *sparse) share(m *memory) {
	s.mem, s.id = m, m.NewFile()
	m.Share(s.primary.tables)
	m.Share(s.redundant.tables)
	if s.markers != nil {
		s.markers.share(m)
	}
}

// grains is the number of grains of the extent.
func (s *sparse) grains() int64 { return (s.size-1)>>s.grainShift + 1 }

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
