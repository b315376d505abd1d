package source

import (
	"context"
	"fmt"
	"iter"
)

// WholeData yields [off, off+length) as one Data extent: the allocation of a
// disk that can't tell.
func WholeData(off, length int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if length > 0 {
			yield(Extent{Off: off, Len: length}, nil)
		}
	}
}

// Covered yields what d.Extents yields for [off, off+length), and checks it: an
// extent that is empty, leaves a gap, overlaps or passes the end is an error,
// and so is an iteration that ends early. Neighbours that differ in nothing
// but their place are merged. Whoever acts on extents goes through it, since a
// range that is silently left out is lost data.
func Covered(ctx context.Context, d Disk, off, length int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		end := off + length
		if off < 0 || length < 0 || end < off || end > d.Size() {
			yield(Extent{}, fmt.Errorf("extents [%d, %d) asked of a disk of %d bytes", off, end, d.Size()))
			return
		}
		next := off
		var held Extent // held.Len == 0: none
		for e, err := range d.Extents(ctx, off, length) {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if e.Off != next || e.Len <= 0 || e.Len > end-next {
				yield(Extent{}, fmt.Errorf("extents of [%d, %d): got [%d, %d), want one that starts at %d and ends by %d", off, end, e.Off, e.Off+e.Len, next, end))
				return
			}
			next = e.End()
			if held.Len > 0 && held.Kind == e.Kind && held.Depth == e.Depth && held.Absent == e.Absent {
				held.Len += e.Len
				continue
			}
			if held.Len > 0 && !yield(held, nil) {
				return
			}
			held = e
		}
		if next != end {
			yield(Extent{}, fmt.Errorf("extents of [%d, %d) end at %d", off, end, next))
			return
		}
		if held.Len > 0 {
			yield(held, nil)
		}
	}
}
