package vmdk

import (
	"context"
	"fmt"
	"math/bits"
	"os"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// The type sparse is an extent that is divided into blocks of equal size, the grains. The file of
// the extent has only some of the grains, and the index says which. Only the index differs between
// the kinds of sparse extents.
type sparse struct {
	*grainFile
	geometry
	index      index
	compressed bool // grains are compressed with zlib
	marked     bool // each compressed grain begins with a marker

	disk *Disk // set when the extent is added to its disk
	base int64 // offset of the extent in the disk, bytes
}

// sparseReader is a function that returns the extent in a file. The file begins with the
// magic of one kind of sparse extent. extentSize is the size of the extent in bytes
// according to the descriptor. If it is 0, the header of the file decides on the size.
type sparseReader func(f *grainFile, extentSize int64) (*sparse, error)

// openSparse opens the extent in f with the function reader. The parameter name is the name of
// f that errors show. extentSize has the same meaning as in a sparseReader.
func openSparse(name string, f source.Disk, extentSize int64, reader sparseReader) (*sparse, error) {
	s, err := reader(newGrainFile(name, f), extentSize)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

// geometry is the division of an extent into grains.
type geometry struct {
	capacity   uint64 // sectors, as the header says
	size       int64  // bytes of the disk that are in the extent
	grain      uint64 // sectors in a grain, a power of two
	grainSize  int64  // bytes in a grain
	grainShift uint   // base-2 logarithm of grainSize
}

// newGeometry returns the geometry of an extent. The parameters capacity and grain are
// the capacity of the extent and the size of a grain, both in sectors. The caller has
// checked both. extentSize is the size of the extent in bytes according to the
// descriptor. If it is 0, the size of the extent is its capacity.
func newGeometry(capacity, grain uint64, extentSize int64) (geometry, error) {
	g := geometry{capacity: capacity, size: int64(capacity) * sectorSize, grain: grain, grainSize: int64(grain) * sectorSize}
	g.grainShift = uint(bits.TrailingZeros64(uint64(g.grainSize)))
	if extentSize > 0 {
		// Some writers round the capacity in the header up to whole grains. Any other
		// difference from the size in the descriptor is an error, because it would
		// shift the extents that follow, or leave a gap.
		if extentSize > g.size || g.size-extentSize >= g.grainSize {
			return g, fmt.Errorf("the header has a capacity of %d sectors, but the descriptor gives the extent %d sectors: the file belongs to another disk, or one of the two numbers is damaged", capacity, extentSize/sectorSize)
		}
		g.size = extentSize
	}
	return g, nil
}

// The method grains returns the number of grains of the extent.
func (g *geometry) grains() int64 { return (g.size-1)>>g.grainShift + 1 }

// The method part returns how many bytes of a grain belong to the extent. This is less than a whole
// grain only if the extent ends within its last grain.
func (g *geometry) part(grain int64) int64 {
	return min(g.grainSize, g.size-grain<<g.grainShift)
}

// The method share makes the extent use the cache m for its tables and grains. Other extents may
// use the same cache.
func (s *sparse) share(m *memory) {
	s.mem, s.id = m, m.NewFile()
	s.index.share(m)
}

func (s *sparse) readAt(p []byte, off int64) error {
	for len(p) > 0 {
		g := off >> s.grainShift
		need := (off+int64(len(p))-1)>>s.grainShift - g + 1
		r, err := s.index.run(g, need, nil)
		if err != nil {
			return err
		}
		need = min(need, r.n)
		for i := int64(0); i < need; {
			kind, pos, next := r.stretch(i, need, !s.compressed)
			n := min(int64(len(p)), (g+next)<<s.grainShift-off)
			switch {
			case kind == absentGrain:
				err = image.ReadParent(s.disk.parent, p[:n], s.base+off)
			case kind == zeroGrain:
				clear(p[:n])
			case s.compressed:
				err = s.unpackAt(p[:n], off, &r, i)
			default:
				err = s.readPlain(p[:n], off, pos, &r, i)
			}
			if err != nil {
				return err
			}
			p, off, i = p[n:], off+n, next
		}
	}
	return nil
}

// readPlain fills p with the bytes of the extent that begin at the given offset. They must
// be in uncompressed grains that follow each other in the file. The first of these grains
// is grain i of the run r. grainPos is the offset of that grain in the file, or the
// constant nowhere if its table entry is damaged.
func (s *sparse) readPlain(p []byte, off, grainPos int64, r *run, i int64) error {
	g := off >> s.grainShift
	if grainPos == nowhere {
		_, err := r.place(i)
		return s.errorf(g, "%w", err)
	}
	pos := grainPos + off&(s.grainSize-1)
	if err := s.checkPlace(grainPos, pos+int64(len(p)), off); err != nil {
		return err
	}
	if err := image.ReadFull(s.file, p, pos); err != nil {
		return s.errorf(g, "%w", err)
	}
	return nil
}

// checkPlace returns an error if the bytes [pos, end) of the file cannot belong to a grain, because
// the file is too short or has metadata there. The parameter off is an offset in the extent. The
// error names the grain that has the byte at this offset.
func (s *sparse) checkPlace(pos, end, off int64) error {
	g := off >> s.grainShift
	if end > s.fileSize {
		return s.errorf(g, "the bytes %d to %d of the file are needed, but the file has %d bytes: the file is truncated or damaged", pos, end, s.fileSize)
	}
	if r, ok := s.index.occupied(pos, end); ok {
		return s.errorf(g, "the grain lies in the %s, bytes %d to %d of the file: the grain table is damaged", r.what, r.start, r.end)
	}
	return nil
}

// errorf returns an error about grain g. The error has the offset of the grain in the disk. If
// the grain table of the grain can be read, the error also has the offset of the grain in the
// file.
func (s *sparse) errorf(g int64, format string, args ...any) error {
	where := "an unknown offset"
	if r, err := s.index.run(g, 1, nil); err == nil {
		if pos, err := r.place(0); err == nil {
			where = fmt.Sprintf("offset %d", pos)
		}
	}
	return fmt.Errorf("%s: grain at disk offset %d, stored at %s: %w", s.name, s.base+g<<s.grainShift, where, fmt.Errorf(format, args...))
}

func (s *sparse) scan(ctx context.Context, off, end int64, want detail, emit func(piece) error) error {
	hole := fileHole{ctx: ctx}
	placed := want == places && !s.compressed
	for off < end {
		if err := s.disk.life.Cause(ctx); err != nil {
			return err
		}
		g := off >> s.grainShift
		need := (end-1)>>s.grainShift - g + 1
		r, err := s.index.run(g, need, &hole)
		if err != nil {
			return err
		}
		need = min(need, r.n)
		for i := int64(0); i < need; {
			limit := need
			if placed {
				limit = r.n // so that the place of a range does not depend on where the scan ends
			}
			kind, start, next := r.stretch(i, limit, placed)
			p := piece{kind: kind, off: off, n: min(end, (g+next)<<s.grainShift) - off}
			if placed && kind == dataGrain {
				err = s.emitPlaces(p, start, min(s.size, (g+next)<<s.grainShift), emit)
			} else {
				err = emit(p)
			}
			if err != nil {
				return err
			}
			off, i = off+p.n, next
		}
	}
	return nil
}

// emitPlaces passes p, a range of uncompressed grains, to the function emit, together with the
// positions of its bytes in local files. grainPos is the offset of the first grain of p in the file
// of the extent.
//
// The grains of p follow each other in the file. p may be only the beginning of a longer range of
// grains that follow each other in the extent and in the file. This longer range ends at the offset
// contiguousEnd of the extent. If a grain of the longer range cannot be where its table entry says,
// emitPlaces passes p to emit without positions. The longer range is always checked as a whole, so
// that a scan that ends earlier finds the same positions.
func (s *sparse) emitPlaces(p piece, grainPos, contiguousEnd int64, emit func(piece) error) error {
	pos := grainPos + p.off&(s.grainSize-1)
	if s.checkPlace(grainPos, pos+contiguousEnd-p.off, p.off) != nil {
		return emit(p) // reading reports the error
	}
	return p.emitPlaces(s.file, pos, emit)
}

func (s *sparse) inFile(off int64) (f *os.File, pos, n int64, ok bool) {
	g := off >> s.grainShift
	r, err := s.index.run(g, 1, nil)
	if err != nil {
		return nil, 0, s.part(g) - off&(s.grainSize-1), false
	}
	kind, start, next := r.stretch(0, r.n, !s.compressed)
	n = min(s.size, (g+next)<<s.grainShift) - off
	switch {
	case kind == absentGrain && s.disk.parent != nil && s.base+off < s.disk.parent.Size():
		return image.InFile(s.disk.parent, s.base+off, n)
	case kind == dataGrain && !s.compressed:
		pos = start + off&(s.grainSize-1)
		if s.checkPlace(start, pos+n, off) != nil {
			return nil, 0, n, false
		}
		return image.InFile(s.file, pos, n)
	}
	return nil, 0, n, false
}
