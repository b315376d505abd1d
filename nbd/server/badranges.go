package server

import "sync"

// maxSuspects bounds the exports of which ranges are remembered.
const maxBadRanges = 1024

// suspects remember by the name of an export where a read failed after a simple
// reply had begun. Such a reply can't tell of it: the connection ends, and the
// client comes back, often as the only one, with the same request. Then it has to
// be read before the reply begins. It is safe for concurrent use; the zero value
// is empty.
type badRanges struct {
	mu     sync.Mutex
	ranges map[string]badRange
}

// suspect is the smallest range that covers all failed reads.
type badRange struct{ from, to int64 }

// add notes that [from, to) can't be read.
func (s *badRanges) add(export string, from, to int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r, ok := s.ranges[export]; ok {
		from, to = min(from, r.from), max(to, r.to)
	} else if len(s.ranges) >= maxBadRanges {
		for name := range s.ranges {
			delete(s.ranges, name) // any of them
			break
		}
	}
	if s.ranges == nil {
		s.ranges = map[string]badRange{}
	}
	s.ranges[export] = badRange{from, to}
}

// touch reports whether [from, to) may have something that can't be read.
func (s *badRanges) overlap(export string, from, to int64) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	r, ok := s.ranges[export]
	return ok && from < r.to && r.from < to
}
