// Package spans remembers which parts of a range have been received, for protocols that send the
// answer to a read in several parts and in any order. The zero [Set] is empty. [Set.Add] adds a
// part, and refuses a part that was received before. [Set.Missing] finds what is not received yet.
package spans

import (
	"fmt"
	"slices"
)

// Max is the maximum number of separate spans in a Set. Parts may arrive in any order, which leaves
// gaps between the spans until the missing parts arrive.
const Max = 4096

// A Set holds the ranges for which parts have been received. The ranges are sorted, not empty, and
// have gaps between them. A Set is not safe for concurrent use.
type Set struct{ list []Span }

// A Span is the range of the offsets [From, To), for example in a disk.
type Span struct{ From, To int64 }

// Add adds the range [from, to), which must not be empty. It returns an error and leaves the set
// unchanged if the range overlaps a range that was added before, or if there are too many separate
// ranges.
func (s *Set) Add(from, to int64) error {
	i, _ := slices.BinarySearchFunc(s.list, from, func(e Span, from int64) int {
		if e.To < from {
			return -1
		}
		return 1
	})
	// s.list[i] is the first range in the set that overlaps the new range, touches it, or lies
	// after it.
	if i < len(s.list) && s.list[i].To == from {
		if i+1 < len(s.list) && s.list[i+1].From < to {
			return overlap(from, to, s.list[i+1])
		}
		s.list[i].To = to
		if i+1 < len(s.list) && s.list[i+1].From == to {
			s.list[i].To = s.list[i+1].To
			s.list = slices.Delete(s.list, i+1, i+2)
		}
		return nil
	}
	if i < len(s.list) && s.list[i].From < to {
		return overlap(from, to, s.list[i])
	}
	if i < len(s.list) && s.list[i].From == to {
		s.list[i].From = from
		return nil
	}
	if len(s.list) == Max {
		return fmt.Errorf("the data received so far cover more than %d separate ranges, the maximum that this client accepts", Max)
	}
	s.list = slices.Insert(s.list, i, Span{from, to})
	return nil
}

// The function overlap returns the error for a range [from, to) that overlaps the range e, which
// was added before.
func overlap(from, to int64, e Span) error {
	return fmt.Errorf("the range [%d, %d) repeats bytes [%d, %d) that were received before", from, to, max(from, e.From), min(to, e.To))
}

// Missing returns the first part of [from, to) that no added range covers. The result ok is false
// if there is no such part. All ranges in the set must lie inside [from, to).
func (s *Set) Missing(from, to int64) (missing Span, ok bool) {
	for _, e := range s.list {
		if e.From > from {
			return Span{from, e.From}, true
		}
		from = e.To
	}
	return Span{from, to}, from < to
}
