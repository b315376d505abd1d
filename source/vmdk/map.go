package vmdk

import (
	"context"
	"iter"
	"os"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// The interface located is implemented by extents that can say where their bytes are in a local
// file.
type located interface {
	// inFile returns what [source.InFile] returns, for the byte of the extent at the given offset.
	// If the result ok is false, the result n is at least 1, and the n bytes of the extent from
	// that offset on are not in a local file.
	inFile(off int64) (f *os.File, pos, n int64, ok bool)
}

// Map implements [source.Mapped]. It reads the grain tables only once. Without Map, a caller would
// have to call Extents, and then InFile for each extent. The tables would then be read twice.
func (d *Disk) Map(ctx context.Context, off, length int64) iter.Seq2[source.Mapping, error] {
	return image.Map(d.path, d.size, off, length, func(visit image.Visitor) error {
		return d.mapRange(ctx, off, off+length, 0, visit)
	})
}

// mapRange visits the mappings of the range [off, end) of the disk. depth is 0 for the
// image that the user opened, 1 for its parent, 2 for the parent of that parent, and so on.
func (d *Disk) mapRange(ctx context.Context, off, end int64, depth int, visit image.Visitor) error {
	return d.scan(ctx, off, end, places, func(p piece) error {
		m := source.Mapping{Extent: source.Extent{Off: p.off, Len: p.n, Depth: depth}, File: p.file, Pos: p.pos}
		switch {
		case p.kind == absentGrain && d.parent != nil:
			return d.mapParent(ctx, m, visit)
		case p.kind == absentGrain:
			m.Kind, m.Absent = d.lacks.Kind, d.lacks.Absent
		case p.kind == zeroGrain:
			m.Kind = source.Zero
		}
		return visit(m)
	})
}

// mapParent visits the mappings that the parent has in a range whose content this image does not
// have. The parameter m describes this range: m.Extent has its offset and its length.
func (d *Disk) mapParent(ctx context.Context, m source.Mapping, visit image.Visitor) error {
	var own func(off, end int64) error
	if p, ok := source.Ability[*Disk](d.parent); ok {
		own = func(off, end int64) error { return p.mapRange(ctx, off, end, m.Depth+1, visit) }
	}
	return image.VisitParent(ctx, d.parent, m, own, visit)
}
