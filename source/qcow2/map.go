package qcow2

import (
	"context"
	"fmt"
	"iter"

	"vddkcp/source"
)

// Map implements source.Mapped. A preallocated cluster of zeros has no place:
// what is there are other bytes.
func (d *Disk) Map(ctx context.Context, off, length int64) iter.Seq2[source.Mapping, error] {
	return func(yield func(source.Mapping, error) bool) {
		end := off + length
		if off < 0 || length < 0 || end < off || end > d.size {
			yield(source.Mapping{}, fmt.Errorf("map of %s: [%d, %d) is not in its %d bytes", d.path, off, end, d.size))
			return
		}
		err := d.mapRange(ctx, off, end, 0, func(m source.Mapping) error {
			if !yield(m, nil) {
				return errStop
			}
			return nil
		})
		if err != nil && err != errStop {
			yield(source.Mapping{}, fmt.Errorf("map of %s: %w", d.path, err))
		}
	}
}

// mapRange visits the mappings of [off, end), for an image that is at depth of
// its chain.
func (d *Disk) mapRange(ctx context.Context, off, end int64, depth int, visit func(source.Mapping) error) error {
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
			return visit(m) // nowhere, or where it can't be
		}
		return d.locate(m, s.pos, visit)
	})
}

// locate visits m, which lies in the file from pos on, in pieces whose bytes
// follow each other.
func (d *Disk) locate(m source.Mapping, pos int64, visit func(source.Mapping) error) error {
	for left := m.Len; left > 0; left -= m.Len {
		f, at, n, ok := inFile(d.data, pos, left)
		m.Len, m.File, m.Pos = left, nil, 0
		if ok {
			m.Len, m.File, m.Pos = n, f, at
		}
		if err := visit(m); err != nil {
			return err
		}
		m.Off += m.Len
		pos += m.Len
	}
	return nil
}

// mapBacking visits the range of m, which this image lacks, as the backing file
// has it.
func (d *Disk) mapBacking(ctx context.Context, m source.Mapping, visit func(source.Mapping) error) error {
	end, depth := m.End(), m.Depth
	stop := max(m.Off, min(end, d.backing.Size()))
	if b, ok := source.Ability[*Disk](d.backing); ok && m.Off < stop {
		if err := b.mapRange(ctx, m.Off, stop, depth+1, visit); err != nil {
			return err
		}
	} else if m.Off < stop {
		for m, err := range source.Map(ctx, d.backing, m.Off, stop-m.Off) {
			if err != nil {
				return err
			}
			m.Depth += depth + 1
			if err := visit(m); err != nil {
				return err
			}
		}
	}
	if stop == end {
		return nil
	}
	m.Off, m.Len = stop, end-stop
	m.Kind, m.Absent = source.Zero, true // as in emitBacking
	return visit(m)
}
