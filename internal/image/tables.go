package image

import (
	"fmt"
	"slices"
	"sort"
)

const (
	// MaxTables is the largest number of tables of an image that are checked for overlaps. For
	// example, a disk of 128 TiB has this number of tables if each table has 512 entries and each
	// grain has 64 KiB.
	MaxTables = 4 << 20

	// MaxSpans limits the number of ranges in the Places of one file. If several files share a
	// Memory, it limits the number of ranges in all of their Places together.
	MaxSpans = 32 << 10

	maxOverlapping = 1 << 10
)

// Places are the ranges of a file that contain the tables of an image. Programs that write images
// put tables next to each other. Therefore a few ranges are enough for all tables. The zero value
// has no tables. Places are safe for concurrent use.
type Places struct {
	spans       []span
	length      int64   // of one table, in bytes
	overlapping []int64 // offsets of tables that overlap another one, ascending
}

// The type span is a range [start, end) of bytes in a file.
type span struct{ start, end int64 }

// NewPlaces returns the places of tables. The parameter starts has the offsets of the tables in the
// file, which NewPlaces sorts. The parameter length is the number of bytes of each table. Tables
// that touch or overlap form one range. Only the first MaxSpans ranges are kept.
//
// If many tables overlap, the directory that lists them must be wrong. Then NewPlaces returns an
// error together with the places, which are valid.
func NewPlaces(starts []int64, length int64) (*Places, error) {
	slices.Sort(starts)
	p := &Places{length: length}
	for i, start := range starts {
		end := start + length
		if i > 0 {
			if before := starts[i-1]; before+length > start {
				p.addOverlapping(before)
				p.addOverlapping(start)
			}
		}
		if last := len(p.spans) - 1; last >= 0 && p.spans[last].end >= start {
			p.spans[last].end = max(p.spans[last].end, end)
		} else if len(p.spans) < MaxSpans {
			p.spans = append(p.spans, span{start, end})
		}
	}
	p.spans = slices.Clone(p.spans) // free the unused capacity
	if len(p.overlapping) > maxOverlapping {
		return p, fmt.Errorf("more than %d tables overlap each other, and the first of them is at offset %d", maxOverlapping, p.overlapping[0])
	}
	return p, nil
}

// addOverlapping records that the table at the offset start overlaps another table.
func (p *Places) addOverlapping(start int64) {
	if n := len(p.overlapping); n <= maxOverlapping && (n == 0 || p.overlapping[n-1] != start) {
		p.overlapping = append(p.overlapping, start)
	}
}

// Overlaps reports whether the table at the offset start shares bytes with another table.
func (p *Places) Overlaps(start int64) bool {
	if p == nil {
		return false
	}
	_, found := slices.BinarySearch(p.overlapping, start)
	return found
}

// Has reports whether a table contains a byte of the range [start, end) of the file. If so, it also
// returns the range of adjacent tables to which this byte belongs: [first, stop).
func (p *Places) Has(start, end int64) (first, stop int64, ok bool) {
	if p == nil {
		return 0, 0, false
	}
	i := sort.Search(len(p.spans), func(i int) bool { return p.spans[i].end > start })
	if i == len(p.spans) || p.spans[i].start >= end {
		return 0, 0, false
	}
	return p.spans[i].start, p.spans[i].end, true
}

// The method count returns the number of ranges in p.
func (p *Places) count() int {
	if p == nil {
		return 0
	}
	return len(p.spans)
}

// The method keep keeps the first n ranges of p and drops all others.
func (p *Places) keep(n int) {
	if p != nil && n < len(p.spans) {
		p.spans = slices.Clone(p.spans[:max(n, 0)])
	}
}
