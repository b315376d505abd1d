package image

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// errStop ends a scan whose consumer wants no more.
var errStop = errors.New("stop")

// Extents is source.Disk's for a disk of size bytes that errors call name: scan
// adds the extents of [off, off+length) to out, and ends where that fails.
// Neighbours that are alike become one.
func Extents(name string, size, off, length int64, scan func(out *Merger) error) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		if !life.InDisk(off, length, size) {
			yield(source.Extent{}, fmt.Errorf("extents of %s: [%d, %d) is outside the disk of %d bytes", name, off, off+length, size))
			return
		}
		out := Merger{yield: yield}
		switch err := scan(&out); {
		case err == nil:
			out.flush()
		case err != errStop:
			// What came before the error is right; it is not of use, though.
			yield(source.Extent{}, fmt.Errorf("extents of %s: %w", name, err))
		}
	}
}

// Merger takes the extents that Extents yields.
type Merger struct {
	yield func(source.Extent, error) bool
	held  source.Extent // Len 0: none
}

// Add adds an extent that begins where the one before ended.
func (m *Merger) Add(e source.Extent) error {
	if h := &m.held; h.Len > 0 && h.Kind == e.Kind && h.Depth == e.Depth && h.Absent == e.Absent {
		h.Len += e.Len
		return nil
	}
	held := m.held
	m.held = e
	if held.Len > 0 && !m.yield(held, nil) {
		return errStop
	}
	return nil
}

func (m *Merger) flush() {
	if m.held.Len > 0 {
		m.yield(m.held, nil)
	}
}

// AddParent adds [off, off+n), which an image lacks, as its parent has it.
func (m *Merger) AddParent(ctx context.Context, parent source.Disk, off, n int64) error {
	has := max(0, min(n, parent.Size()-off))
	if has > 0 {
		for e, err := range parent.Extents(ctx, off, has) {
			if err != nil {
				return err
			}
			e.Depth++
			if err := m.Add(e); err != nil {
				return err
			}
		}
	}
	if has < n {
		// Past the end of a shorter parent are zeros, also where that one has a
		// longer parent itself: no image has them (qemu maps it so too).
		return m.Add(source.Extent{Off: off + has, Len: n - has, Kind: source.Zero, Absent: true})
	}
	return nil
}

// ReadParent fills p with what the parent of an image has at off of the disk.
// It may be shorter, and nil where there is none.
func ReadParent(parent source.Disk, p []byte, off int64) error {
	n := int64(0)
	if parent != nil {
		n = max(0, min(int64(len(p)), parent.Size()-off))
	}
	if n > 0 {
		if err := ReadFull(parent, p[:n], off); err != nil {
			return err
		}
	}
	clear(p[n:])
	return nil
}

// Visitor takes mappings; an error of it ends the visit.
type Visitor func(source.Mapping) error

// Map is source.Mapped's for a disk of size bytes that errors call name: scan
// visits the mappings of [off, off+length).
func Map(name string, size, off, length int64, scan func(visit Visitor) error) iter.Seq2[source.Mapping, error] {
	return func(yield func(source.Mapping, error) bool) {
		if !life.InDisk(off, length, size) {
			yield(source.Mapping{}, fmt.Errorf("map of %s: [%d, %d) is outside the disk of %d bytes", name, off, off+length, size))
			return
		}
		err := scan(func(m source.Mapping) error {
			if !yield(m, nil) {
				return errStop
			}
			return nil
		})
		if err != nil && err != errStop {
			yield(source.Mapping{}, fmt.Errorf("map of %s: %w", name, err))
		}
	}
}

// VisitParent visits the range of m, which an image at m's depth lacks, as its
// parent has it. Own visits the mappings of [off, end) of the parent, at its
// depth, where that is of the same format; nil: it is not.
func VisitParent(ctx context.Context, parent source.Disk, m source.Mapping, own func(off, end int64) error, visit Visitor) error {
	end, depth := m.End(), m.Depth
	stop := max(m.Off, min(end, parent.Size()))
	if own != nil && m.Off < stop {
		if err := own(m.Off, stop); err != nil {
			return err
		}
	} else if m.Off < stop {
		for m, err := range source.Map(ctx, parent, m.Off, stop-m.Off) {
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
	m.Kind, m.Absent = source.Zero, true // as in AddParent
	return visit(m)
}
