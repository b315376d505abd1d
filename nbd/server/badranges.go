package server

import "sync"

// maxBadRanges is the maximum number of exports for which badRanges records a range.
const maxBadRanges = 1024

// badRanges records, for each export, the range in which reads have failed after a
// simple reply had begun. Such a reply cannot report an error, so the connection is
// closed. The client then usually connects again and repeats the request. Because the
// repeated request overlaps the recorded range, the server reads all data of this
// request from the disk before it begins the reply. If the disk fails again, the reply
// can report the error. badRanges is safe for concurrent use. The zero value is empty.
type badRanges struct {
	mu     sync.Mutex
	ranges map[string]badRange
}

// A badRange is the smallest range that covers all failed reads of one export.
type badRange struct{ from, to int64 }

// add records that a read of the range [from, to) failed.
func (s *badRanges) add(export string, from, to int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := s.ranges[export]; ok {
		from, to = min(from, r.from), max(to, r.to)
	} else if len(s.ranges) >= maxBadRanges {
		for name := range s.ranges {
			delete(s.ranges, name) // the list of exports is full, so one of them is removed
			break
		}
	}
	if s.ranges == nil {
		s.ranges = map[string]badRange{}
	}
	s.ranges[export] = badRange{from, to}
}

// The method overlap reports whether [from, to) overlaps the recorded range of the
// export.
func (s *badRanges) overlap(export string, from, to int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.ranges[export]
	return ok && from < r.to && r.from < to
}
