package source

import (
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"slices"
	"sync"

	"github.com/vddkcp/vddkcp/internal/zero"
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
	lost int // times that Check failed
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
// error is an ErrChanged. Read must fill p, or return an error and whether another
// read is worth a try: what can't be read is passed over, since a host may refuse a
// request now and then. Where nothing could be read, or no other read was worth a
// try, the error is read's, and from then on Check reads half as much: a disk that is
// lost every few reads must get on.
func (s *Samples) Check(read func(p []byte, off int64) (goOn bool, err error)) error {
	s.mu.Lock()
	list := slices.Concat(s.last, s.some, s.zero)
	rand.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
	list = list[:min(len(list), max(len(list)>>s.lost, 1))]
	s.mu.Unlock()
	err := compare(list, read)
	s.mu.Lock()
	defer s.mu.Unlock()
	if err != nil {
		s.lost++
	}
	return err
}

func compare(list []sample, read func(p []byte, off int64) (goOn bool, err error)) error {
	var failed error
	same := 0
	p := make([]byte, sampleBytes)
	for _, one := range list {
		goOn, err := read(p[:one.n], one.off)
		if err != nil {
			failed = err
			if !goOn {
				same = 0
				break
			}
			continue
		}
		if crc32.Checksum(p[:one.n], sampleTable) != one.crc {
			return Changed(fmt.Errorf("it is another disk or was changed: [%d, %d) held something else when it was read before", one.off, one.off+int64(one.n)))
		}
		same++
	}
	if failed != nil && same == 0 {
		return fmt.Errorf("compare what was read before: %w", failed)
	}
	return nil
}

// Proved reports whether a proof of Identified's shows that a disk of the same
// identity has the same content.
func Proved(proof string) bool { return proof == "snapshot" || proof == "mtime" }
