package vmdk

import (
	"context"
	"iter"
	"os"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// located is an extent whose bytes may lie in a file as they are.
type located interface {
	// inFile returns what source.InFile does for the byte at off in the extent.
	// Where that is in no file, n > 0 is for how many bytes this stays true.
	inFile(off int64) (f *os.File, pos, n int64, ok bool)
}

// Map implements source.Mapped. Asking InFile for each extent would look at
// the rest of a child's grain table again for each piece of its parent.
func (d *Disk) Map(ctx context.Context, off, length int64) iter.Seq2[source.Mapping, error] {
	return image.Map(d.path, d.size, off, length, func(visit image.Visitor) error {
		return d.mapRange(ctx, off, off+length, 0, visit)
	})
}

// mapRange visits the mappings of [off, end), for an image that is at depth of
// its chain.
func (d *Disk) mapRange(ctx context.Context, off, end int64, depth int, visit image.Visitor) error {
	return d.scan(ctx, off, end, func(kind grainKind, off, n int64) error {
		m := source.Mapping{Extent: source.Extent{Off: off, Len: n, Depth: depth}}
		switch {
		case kind == absentGrain && d.parent != nil:
			return d.mapParent(ctx, m, visit)
		case kind == absentGrain:
			m.Kind, m.Absent = d.lacks.Kind, d.lacks.Absent
			return visit(m)
		case kind == zeroGrain:
			m.Kind = source.Zero
		}
		return d.extents[d.find(off)].locate(m, visit)
	})
}

// locate visits m, which lies in the extent, in pieces whose bytes follow each
// other in a file.
func (e *placed) locate(m source.Mapping, visit image.Visitor) error {
	x, ok := e.extent.(located)
	if _, isFlat := x.(*flat); !ok || m.Kind == source.Zero && !isFlat {
		return visit(m) // zeros by the tables are in no file
	}
	for left := m.Len; left > 0; left -= m.Len {
		f, pos, n, ok := x.inFile(m.Off - e.start)
		m.Len, m.File, m.Pos = min(n, left), nil, 0
		if ok {
			m.File, m.Pos = f, pos
		}
		if err := visit(m); err != nil {
			return err
		}
		m.Off += m.Len
	}
	return nil
}

// mapParent visits the range of m, which this image lacks, as the parent has it.
func (d *Disk) mapParent(ctx context.Context, m source.Mapping, visit image.Visitor) error {
	var own func(off, end int64) error
	if p, ok := source.Ability[*Disk](d.parent); ok {
		own = func(off, end int64) error { return p.mapRange(ctx, off, end, m.Depth+1, visit) }
	}
	return image.VisitParent(ctx, d.parent, m, own, visit)
}
