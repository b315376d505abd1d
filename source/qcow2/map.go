package qcow2

import (
	"context"
	"iter"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/source"
)

// Map implements [source.Mapped]. A cluster can be marked as zeros although the file
// has space for it. Map returns such a cluster without a position in the file, because
// the bytes in that space need not be zeros.
func (d *Disk) Map(ctx context.Context, off, length int64) iter.Seq2[source.Mapping, error] {
	return image.Map(d.path, d.size, off, length, func(visit image.Visitor) error {
		return d.mapRange(ctx, off, off+length, 0, visit)
	})
}

// mapRange passes the mappings of [off, end) to the function visit. The parameter depth
// is the position of this image in the chain: 0 for the image that the caller opened, 1
// for its backing file, and so on.
func (d *Disk) mapRange(ctx context.Context, off, end int64, depth int, visit image.Visitor) error {
	return d.scan(ctx, off, end, func(s stretch) error {
		m := source.Mapping{Extent: source.Extent{Off: s.off, Len: s.n, Depth: depth}}
		switch {
		case s.kind == absent && d.backing != nil:
			return d.mapBacking(ctx, m, visit)
		case s.kind == absent:
			m.Kind, m.Absent = d.lacks.Kind, d.lacks.Absent
			return visit(m)
		case s.kind == zeros:
			m.Kind = source.Zero
		}
		if s.pos == 0 && (s.kind != plain || d.data == d.file) || s.pos+s.n > d.dataSize {
			return visit(m) // the content is in no file, or the file is truncated
		}
		return d.locate(m, s.pos, visit)
	})
}

// The method locate adds positions in local files to the mapping m, and passes it to the
// function visit in parts. pos is the offset of the first byte of m in d.data, the disk
// that holds the clusters. d.data may consist of several local files, for example if an
// appliance stores its disk in chunks. Each part is contiguous in one of these files.
func (d *Disk) locate(m source.Mapping, pos int64, visit image.Visitor) error {
	for left := m.Len; left > 0; left -= m.Len {
		f, at, n, ok := image.InFile(d.data, pos, left)
		m.Len, m.File, m.Pos = n, nil, 0
		if ok {
			m.File, m.Pos = f, at
		}
		if err := visit(m); err != nil {
			return err
		}
		m.Off += m.Len
		pos += m.Len
	}
	return nil
}

// mapBacking passes the mappings that the backing file has for the range of m to the
// function visit. It is called for ranges that this image does not have.
func (d *Disk) mapBacking(ctx context.Context, m source.Mapping, visit image.Visitor) error {
	var own func(off, end int64) error
	if b, ok := source.Ability[*Disk](d.backing); ok {
		own = func(off, end int64) error { return b.mapRange(ctx, off, end, m.Depth+1, visit) }
	}
	return image.VisitParent(ctx, d.backing, m, own, visit)
}
