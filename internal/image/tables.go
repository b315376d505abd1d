package image

import (
	"fmt"
	"slices"
	"sort"
)

const (
	// MaxTables limits the number of tables whose places are compared with each other.
	// That many tables of 512 entries cover 128 TiB with grains of 64 KiB.
	MaxTables = 4 << 20

	// MaxSpans limits the number of ranges in Places, and in all Places that share a
	// Memory.
	MaxSpans = 32 << 10

	maxOverlapping = 1 << 10
)

// Places are the ranges of a file in which the tables of an image lie. Image writers
// put tables next to each other, so that a few ranges describe all of them. The zero
// value has no tables. Places are safe for concurrent use.
type Places struct {
	spans       []span
	length      int64   // of one table, in bytes
	overlapping []int64 // offsets of tables that overlap another one, ascending
}

// span is a range [start, end) of bytes in a file.
type span struct{ start, end int64 }

// NewPlaces returns the places of tables of length bytes each that begin at the offsets
// starts, which it sorts. It keeps the first MaxSpans ranges. If so many tables overlap
// that the directory which lists them must be wrong, it returns an error together with
// the places, which are valid.
func NewPlaces(starts []int64, length int64) (*Places, error) {
	slices.Sort(starts)
	p := &Places{length: length}
	for i, at := range starts {
		end := at + length
		if i > 0 {
			if before := starts[i-1]; before+length > at {
				p.addOverlapping(before)
				p.addOverlapping(at)
			}
		}
		if last := len(p.spans) - 1; last >= 0 && p.spans[last].end >= at {
			p.spans[last].end = max(p.spans[last].end, end)
		} else if len(p.spans) < MaxSpans {
			p.spans = append(p.spans, span{at, end})
		}
	}
	p.spans = slices.Clone(p.spans) // free the unused capacity
	if len(p.overlapping) > maxOverlapping {
		return p, fmt.Errorf("more than %d tables overlap each other, the first one is at offset %d", maxOverlapping, p.overlapping[0])
	}
	return p, nil
}

// addOverlapping records the start of a table that overlaps another one.
func (p *Places) addOverlapping(at int64) {
	if n := len(p.overlapping); n <= maxOverlapping && (n == 0 || p.overlapping[n-1] != at) {
		p.overlapping = append(p.overlapping, at)
	}
}

// Overlaps reports whether the table at offset at shares bytes with another table.
func (p *Places) Overlaps(at int64) bool {
	if p == nil {
		return false
	}
	_, found := slices.BinarySearch(p.overlapping, at)
	return found
}

// Has reports whether some of the bytes [start, end) of the file belong to a table, and
// returns the range of tables that contains them.
func (p *Places) Has(start, end int64) (from, to int64, ok bool) {
	if p == nil {
		return 0, 0, false
	}
	i := sort.Search(len(p.spans), func(i int) bool { return p.spans[i].end > start })
	if i == len(p.spans) || p.spans[i].start >= end {
		return 0, 0, false
	}
	return p.spans[i].start, p.spans[i].end, true
}

// count returns the number of ranges in p.
func (p *Places) count() int {
	if p == nil {
		return 0
	}
	return len(p.spans)
}

// keep drops all ranges of p except the first n.
func (p *Places) keep(n int) {
	if p != nil && n < len(p.spans) {
		p.spans = slices.Clone(p.spans[:max(n, 0)])
	}
}
