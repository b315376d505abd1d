package image

import (
	"fmt"
	"slices"
	"sort"
)

const (
	// MaxTables bounds the tables whose places are compared with each other:
	// those of 128 TiB with grains of 64 KiB in tables of 512.
	MaxTables = 4 << 20

	// MaxSpans bounds the ranges that Places keep, and those of all files that
	// share a Memory.
	MaxSpans = 32 << 10

	maxContested = 1 << 10
)

// Places are the ranges of a file in which the tables of an image lie. Writers
// put tables one behind the other, so that a few ranges hold all of them.
//
// The zero value knows of no tables. Places are safe for concurrent use.
type Places struct {
	spans     []span
	length    int64   // of one table, bytes
	contested []int64 // where tables begin that overlap another one, ascending
}

type span struct{ start, end int64 }

// NewPlaces returns the places of tables of length bytes, which begin at the
// offsets starts; NewPlaces sorts them. It keeps the first MaxSpans of the ranges
// that do not touch each other. An error means that so many tables overlap that
// their directory must be something else; the ranges are right nevertheless.
func NewPlaces(starts []int64, length int64) (*Places, error) {
	slices.Sort(starts)
	p := &Places{length: length}
	for i, at := range starts {
		end := at + length
		if i > 0 {
			if before := starts[i-1]; before+length > at {
				p.contest(before)
				p.contest(at)
			}
		}
		if last := len(p.spans) - 1; last >= 0 && p.spans[last].end >= at {
			p.spans[last].end = max(p.spans[last].end, end)
		} else if len(p.spans) < MaxSpans {
			p.spans = append(p.spans, span{at, end})
		}
	}
	p.spans = slices.Clone(p.spans) // without room for more
	if len(p.contested) > maxContested {
		return p, fmt.Errorf("more than %d tables overlap each other, the first at offset %d", maxContested, p.contested[0])
	}
	return p, nil
}

// contest notes the start of a table that overlaps another one.
func (p *Places) contest(at int64) {
	if n := len(p.contested); n <= maxContested && (n == 0 || p.contested[n-1] != at) {
		p.contested = append(p.contested, at)
	}
}

// Overlaps reports whether the table at offset at has bytes in common with
// another table.
func (p *Places) Overlaps(at int64) bool {
	if p == nil {
		return false
	}
	_, found := slices.BinarySearch(p.contested, at)
	return found
}

// Has reports whether the bytes [start, end) of the file are in part those of a
// table, and the range of the tables there.
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

// count is the number of ranges that are kept.
func (p *Places) count() int {
	if p == nil {
		return 0
	}
	return len(p.spans)
}

// keep drops all ranges except the first n.
func (p *Places) keep(n int) {
	if p != nil && n < len(p.spans) {
		p.spans = slices.Clone(p.spans[:max(n, 0)])
	}
}
