package source

import (
	"context"
	"fmt"
	"iter"
)

// WholeData yields [off, off+length) as one Data extent. It is the result of Extents
// for a disk that does not know which ranges are allocated.
func WholeData(off, length int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		if length > 0 {
			yield(Extent{Off: off, Len: length}, nil)
		}
	}
}

// Covered yields the extents of [off, off+length) of d and checks them. It yields an
// error if an extent is empty, leaves a gap, overlaps another one or passes the end of
// the range, or if the iteration ends before the end of the range. Adjacent extents
// that differ only in Off and Len are merged.
//
// Every caller that relies on extents must use Covered. Otherwise, if a faulty disk
// left out a range, the data of that range would be lost without an error.
func Covered(ctx context.Context, d Disk, off, length int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		end := off + length
		if off < 0 || length < 0 || end < off || end > d.Size() {
			yield(Extent{}, fmt.Errorf("extents of [%d, %d): the range is outside the disk of %d bytes", off, end, d.Size()))
			return
		}
		next := off
		var held Extent // the last extent, not yet yielded; none if held.Len is 0
		for e, err := range d.Extents(ctx, off, length) {
			if err != nil {
				yield(Extent{}, err)
				return
			}
			if e.Off != next || e.Len <= 0 || e.Len > end-next {
				yield(Extent{}, fmt.Errorf("extents of [%d, %d): the disk returned the extent [%d, %d), want an extent that starts at %d and ends at or before %d", off, end, e.Off, e.Off+e.Len, next, end))
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
			yield(Extent{}, fmt.Errorf("extents of [%d, %d): the disk returned extents only up to offset %d, want extents up to the end of the range", off, end, next))
			return
		}
		if held.Len > 0 {
			yield(held, nil)
		}
	}
}
