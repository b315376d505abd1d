package source

import (
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"sync"

	"vddkcp/internal/zero"
)

const (
	sampleBytes = 64 << 10
	lastSamples = 8 // of what was read last
	someSamples = 8 // of all that was read before
	zeroSamples = 4 // of zeros
)

// Samples remembers a little of what was read of a disk that has no proof of its
// content: of the last reads, and of some of all the others. A disk that is opened
// again is compared with it, because another disk can have the same name and size.
// Zeros are counted apart, since many disks have them in the same places. The zero
// value is empty and ready; all methods are safe for concurrent use.
type Samples struct {
	mu   sync.Mutex
	last []sample // the oldest first
	some []sample
	seen int // samples that left last
	zero []sample
}

type sample struct {
	off int64
	n   int
	crc uint32
}

var sampleTable = crc32.MakeTable(crc32.Castagnoli)

// Add is told that p was read at off. It does not keep p.
func (s *Samples) Add(p []byte, off int64) {
	if len(p) == 0 {
		return
	}
	first := p[:min(len(p), sampleBytes)]
	for at := 0; at < len(p); at += sampleBytes {
		piece := p[at:min(len(p), at+sampleBytes)]
		if !zero.Is(piece) {
			s.add(sample{off + int64(at), len(piece), crc32.Checksum(piece, sampleTable)})
			return
		}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.zero = appendLast(s.zero, sample{off, len(first), crc32.Checksum(first, sampleTable)}, zeroSamples)
}

func (s *Samples) add(one sample) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.last) == lastSamples {
		old := s.last[0]
		s.seen++
		if len(s.some) < someSamples {
			s.some = append(s.some, old)
		} else if k := rand.IntN(s.seen); k < someSamples { // each is as likely to be kept
			s.some[k] = old
		}
	}
	s.last = appendLast(s.last, one, lastSamples)
}

// appendLast appends to a list that keeps the last most samples.
func appendLast(list []sample, one sample, most int) []sample {
	if len(list) == most {
		list = slices.Delete(list, 0, 1)
	}
	return append(list, one)
}

// Check reads again what is remembered, less than 2 MiB. Where it is not the same the
// error is an ErrChanged; else it is the error of read, which must fill p.
func (s *Samples) Check(read func(p []byte, off int64) error) error {
	s.mu.Lock()
	list := slices.Concat(s.last, s.some, s.zero)
	s.mu.Unlock()
	p := make([]byte, sampleBytes)
	for _, one := range list {
		if err := read(p[:one.n], one.off); err != nil {
			return fmt.Errorf("compare what was read before: %w", err)
		}
		if crc32.Checksum(p[:one.n], sampleTable) != one.crc {
			return Changed(fmt.Errorf("it is another disk or was changed: [%d, %d) held something else when it was read before", one.off, one.off+int64(one.n)))
		}
	}
	return nil
}

// Proved reports whether a proof of Identified's shows that a disk of the same
// identity has the same content.
func Proved(proof string) bool { return proof == "snapshot" || proof == "mtime" }
