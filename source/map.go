package source

import (
	"context"
	"fmt"
	"iter"
	"os"
)

// Mapping is an extent together with the position of its bytes in a local file.
type Mapping struct {
	Extent
	// File holds the bytes of the extent unchanged, from Pos on. It is nil if no local
	// file holds them. If the extent is Zero, File has a hole there. The caller may
	// read File but must not close it. File stays open until the disk is closed.
	File *os.File
	Pos  int64
}

// Mapped is the ability of a disk to return in one pass what its methods Extents and
// InFile return.
type Mapped interface {
	// Map yields the mappings of [off, off+length), under the same rules as
	// Disk.Extents.
	Map(ctx context.Context, off, length int64) iter.Seq2[Mapping, error]
}

// Map yields the extents of [off, off+length) of d, each with the position of its bytes
// in a local file. If d has the ability Mapped, the mappings come from the method Map
// of d, and otherwise from its methods Extents and InFile. Map checks the mappings in
// the same way as Covered checks extents. Two adjacent mappings are merged if their
// bytes are also adjacent in the same file, and their extents differ only in Off and
// Len.
func Map(ctx context.Context, d Disk, off, length int64) iter.Seq2[Mapping, error] {
	return func(yield func(Mapping, error) bool) {
		all := located(ctx, d, off, length)
		if m, ok := Ability[Mapped](d); ok {
			all = m.Map(ctx, off, length)
		}
		next, end := off, off+length
		var held Mapping // the last mapping, not yet yielded; none if held.Len is 0
		for m, err := range all {
			if err != nil {
				yield(Mapping{}, err)
				return
			}
			if m.Off != next || m.Len <= 0 || m.Len > end-next {
				yield(Mapping{}, fmt.Errorf("map of [%d, %d): the disk returned the mapping [%d, %d), want a mapping that starts at %d and ends at or before %d", off, end, m.Off, m.End(), next, end))
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
			yield(Mapping{}, fmt.Errorf("map of [%d, %d): the disk returned mappings only up to offset %d, want mappings up to the end of the range", off, end, next))
			return
		}
		if held.Len > 0 {
			yield(held, nil)
		}
	}
}

// MapAll is Map for the whole disk. From time to time it calls the function progress
// with the number of bytes of the disk that it has examined so far. These calls are
// necessary because a small image can describe an empty disk of many terabytes. Without
// them, the caller would learn nothing for minutes, until the first mapping is yielded.
func MapAll(ctx context.Context, d Disk, progress func(off int64)) iter.Seq2[Mapping, error] {
	return func(yield func(Mapping, error) bool) {
		var held Mapping // the last mapping, not yet yielded; none if held.Len is 0
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
			progress(off + n)
		}
		if held.Len > 0 {
			yield(held, nil)
		}
	}
}

// Windows divides a disk of the given size into consecutive ranges (windows), and
// yields the offset and the length of each window in bytes. Windows are so large that
// the division adds no noticeable cost, and small enough that a caller can show its
// progress after each window.
func Windows(size int64) iter.Seq2[int64, int64] {
	const least, most = 64 << 30, 1024 // bytes of a window; number of windows
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

// The method continues reports whether the mapping n can be appended to the mapping m.
// The caller has checked that n begins at the offset where m ends.
func (m *Mapping) continues(n Mapping) bool {
	return m.Kind == n.Kind && m.Depth == n.Depth && m.Absent == n.Absent &&
		m.File == n.File && (m.File == nil || m.Pos+m.Len == n.Pos)
}

// The function located yields the extents of d as mappings. It splits an extent whose
// bytes lie in several files, or are not contiguous in their file.
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
