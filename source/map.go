package source

import (
	"context"
	"fmt"
	"iter"
	"os"
)

// Mapping is an extent with the place of its bytes in a local file.
type Mapping struct {
	Extent
	// File has the extent's bytes as they are, from Pos on; nil: no local file
	// has. Where a Zero extent has one, the file has a hole there. It is for
	// reading, is not to be closed, and is valid until the disk is closed.
	File *os.File
	Pos  int64
}

// Mapped is the ability to tell with the allocation where the bytes lie: what
// Extents and InFile tell, in one pass.
type Mapped interface {
	// Map yields mappings as Extents yields extents.
	Map(ctx context.Context, off, length int64) iter.Seq2[Mapping, error]
}

// Map yields the allocation of [off, off+length) of d with the places of its
// bytes, from Map where d is Mapped, else from Extents and InFile. As by
// Covered the cover is checked, and neighbours are merged that differ in
// nothing but their place, where their bytes follow each other in the file.
func Map(ctx context.Context, d Disk, off, length int64) iter.Seq2[Mapping, error] {
	return func(yield func(Mapping, error) bool) {
		all := located(ctx, d, off, length)
		if m, ok := Ability[Mapped](d); ok {
			all = m.Map(ctx, off, length)
		}
		next, end := off, off+length
		var held Mapping // held.Len == 0: none
		for m, err := range all {
			if err != nil {
				yield(Mapping{}, err)
				return
			}
			if m.Off != next || m.Len <= 0 || m.Len > end-next {
				yield(Mapping{}, fmt.Errorf("map of [%d, %d): got [%d, %d), want one that starts at %d and ends by %d", off, end, m.Off, m.End(), next, end))
				return
			}
			next = m.End()
			if held.Len > 0 && held.continues(m) {
				held.Len += m.Len
				continue
			}
			if held.Len > 0 && !yield(held, nil) {
				return
			}
			held = m
		}
		if next != end {
			yield(Mapping{}, fmt.Errorf("map of [%d, %d) ends at %d", off, end, next))
			return
		}
		if held.Len > 0 {
			yield(held, nil)
		}
	}
}

// MapAll is Map of the whole disk. Meanwhile it tells how many bytes of the disk
// it has looked at: an image of a megabyte can describe a disk of many terabytes,
// and take minutes to yield its first mapping.
func MapAll(ctx context.Context, d Disk, told func(off int64)) iter.Seq2[Mapping, error] {
	return func(yield func(Mapping, error) bool) {
		var held Mapping // held.Len == 0: none
		for off, n := range Windows(d.Size()) {
			for m, err := range Map(ctx, d, off, n) {
				if err != nil {
					yield(Mapping{}, err)
					return
				}
				if held.Len > 0 && held.continues(m) {
					held.Len += m.Len
					continue
				}
				if held.Len > 0 && !yield(held, nil) {
					return
				}
				held = m
			}
			told(off + n)
		}
		if held.Len > 0 {
			yield(held, nil)
		}
	}
}

// Windows cuts a disk of a size into pieces, by offset and length in bytes, that
// are large enough to cost nothing and small enough to show progress.
func Windows(size int64) iter.Seq2[int64, int64] {
	const least, most = 64 << 30, 1024 // bytes; pieces
	step := max(least, size/most&^(least-1))
	return func(yield func(off, n int64) bool) {
		for off := int64(0); off < size; {
			n := min(step, size-off)
			if !yield(off, n) {
				return
			}
			off += n
		}
	}
}

// continues reports whether n, which begins where m ends, is more of the same.
func (m *Mapping) continues(n Mapping) bool {
	return m.Kind == n.Kind && m.Depth == n.Depth && m.Absent == n.Absent &&
		m.File == n.File && (m.File == nil || m.Pos+m.Len == n.Pos)
}

// located yields the extents of d, cut where InFile says that the place of the
// bytes changes.
func located(ctx context.Context, d Disk, off, length int64) iter.Seq2[Mapping, error] {
	return func(yield func(Mapping, error) bool) {
		files, _ := Ability[InFile](d)
		for e, err := range Covered(ctx, d, off, length) {
			if err != nil {
				yield(Mapping{}, err)
				return
			}
			for e.Len > 0 {
				m := Mapping{Extent: e}
				if files != nil && !e.Absent && e.Kind != Inherited {
					if f, pos, n, ok := files.InFile(e.Off); ok && n > 0 {
						m.File, m.Pos, m.Len = f, pos, min(n, e.Len)
					}
				}
				if !yield(m, nil) {
					return
				}
				e.Off, e.Len = e.Off+m.Len, e.Len-m.Len
			}
		}
	}
}
