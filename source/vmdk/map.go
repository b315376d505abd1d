package vmdk

import (
	"context"
	"fmt"
	"iter"
	"os"

	"vddkcp/source"
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
	for i := d.find(off); off < end; i++ {
		e := &d.extents[i]
		if err := d.usable(ctx); err != nil {
			return err
		}
		stop := min(end, e.end)
		err := e.scan(ctx, off-e.start, stop-e.start, func(kind grainKind, at, n int64) error {
			m := source.Mapping{Extent: source.Extent{Off: e.start + at, Len: n, Depth: depth}}
			switch {
			case kind == absentGrain && d.parent != nil:
				return d.mapParent(ctx, m, visit)
			case kind == absentGrain:
				m.Kind, m.Absent = d.lacks.Kind, d.lacks.Absent
				return visit(m)
			case kind == zeroGrain:
				m.Kind = source.Zero
			}
			return e.locate(m, visit)
		})
		if err != nil {
			return err
		}
		off = stop
	}
	return nil
}

// locate visits m, which lies in the extent, in pieces whose bytes follow each
// other in a file.
func (e *placed) locate(m source.Mapping, visit func(source.Mapping) error) error {
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
func (d *Disk) mapParent(ctx context.Context, m source.Mapping, visit func(source.Mapping) error) error {
	end, depth := m.End(), m.Depth
	stop := max(m.Off, min(end, d.parent.Size()))
	if p, ok := source.Ability[*Disk](d.parent); ok && m.Off < stop {
		if err := p.mapRange(ctx, m.Off, stop, depth+1, visit); err != nil {
			return err
		}
	} else if m.Off < stop {
		for m, err := range source.Map(ctx, d.parent, m.Off, stop-m.Off) {
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
	m.Kind, m.Absent = source.Zero, true // as in emitParent
	return visit(m)
}
