package image

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// errStop is the error of a scan that ended early because the caller of the iterator did not want
// more extents or mappings.
var errStop = errors.New("stop")

// Extents implements the method Extents of a disk for the range [off, off+length). size is the
// number of bytes of the disk, and name is its name in errors. The function scan must add the
// extents of the range to its parameter out, in ascending order. Extents merges adjacent extents
// of the same kind. If scan fails, the iteration ends with the error of scan.
func Extents(name string, size, off, length int64, scan func(out *Merger) error) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		if !life.InDisk(off, length, size) {
			yield(source.Extent{}, fmt.Errorf("extents of %s: the range [%d, %d) is outside the disk of %d bytes", name, off, off+length, size))
			return
		}
		out := Merger{yield: yield}
		switch err := scan(&out); {
		case err == nil:
			out.flush()
		case err != errStop:
			// The Merger has not yielded the last extent yet, because it could have been merged
			// with the next one. This extent is dropped, and the caller gets the error in its
			// place. If the caller later asks for the rest of the range, the dropped extent is
			// included.
			yield(source.Extent{}, fmt.Errorf("extents of %s: %w", name, err))
		}
	}
}

// Merger collects extents, merges adjacent ones of the same kind, and yields them to the caller
// of Extents.
type Merger struct {
	yield func(source.Extent, error) bool
	held  source.Extent // the last extent, not yet yielded; none if Len is 0
}

// Add adds an extent. It must begin where the extent that was added before it ends.
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

// The method flush yields the last extent, which Add has kept back in order to merge it with the
// next one.
func (m *Merger) flush() {
	if m.held.Len > 0 {
		m.yield(m.held, nil)
	}
}

// AddParent is called for a range [off, off+n) that an image does not contain. The parent is the
// next image below this image in the chain. AddParent adds the extents that the parent has in this
// range.
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
		// If the parent is shorter than the disk, the disk reads as zeros past the end of the
		// parent. It does so even if the parent of the parent is longer. The extent of these zeros
		// is Absent, because no image of the chain contains them. qemu-img map reports them in the
		// same way.
		return m.Add(source.Extent{Off: off + has, Len: n - has, Kind: source.Zero, Absent: true})
	}
	return nil
}

// ReadParent fills p with the content of the parent that begins at the offset off. The bytes past
// the end of the parent are zeros. If parent is nil, all of p becomes zeros.
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

// Visitor is called with mappings in ascending order. If it returns an error, no more mappings
// follow.
type Visitor func(source.Mapping) error

// Map implements the method Map of a disk for the range [off, off+length). size is the number of
// bytes of the disk, and name is its name in errors. The function scan must call its parameter
// visit with the mappings of the range, in ascending order.
func Map(name string, size, off, length int64, scan func(visit Visitor) error) iter.Seq2[source.Mapping, error] {
	return func(yield func(source.Mapping, error) bool) {
		if !life.InDisk(off, length, size) {
			yield(source.Mapping{}, fmt.Errorf("map of %s: the range [%d, %d) is outside the disk of %d bytes", name, off, off+length, size))
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

// VisitParent is called for a range that an image itself does not contain. m is the mapping of
// this range, and m.Depth is the depth of the image in its chain. VisitParent calls visit with
// the mappings that the parent has in the range. If the parent ends inside or before the range,
// VisitParent also calls visit with one mapping of zeros for the rest of the range.
//
// If the parent has the same format as the image, the caller passes a function own, which visits
// the mappings of the bytes [off, end) of the parent and sets their Depth. VisitParent then calls
// own and does not read the mappings of the parent. If the formats differ, own is nil.
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
	m.Kind, m.Absent = source.Zero, true // see AddParent
	return visit(m)
}
