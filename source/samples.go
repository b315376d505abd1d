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
	lastSamples = 8 // number of the most recent reads
	someSamples = 8 // number of random older reads
	zeroSamples = 4 // number of reads of zeros
)

// Samples remembers checksums of data that was read from a disk. It is used for a disk
// that cannot prove that its content is unchanged. When the disk is opened again, its
// content is compared with these checksums, because another disk can have the same name
// and size.
//
// Samples remembers the most recent reads, and a random selection of the older ones.
// The number of remembered reads of zeros is limited separately, because zeros prove
// little: many disks have zeros in the same places.
//
// The zero value is empty and ready to use. All methods are safe for concurrent use.
type Samples struct {
	mu   sync.Mutex
	last []sample // most recent reads, in the order in which they were added
	some []sample // random older reads
	seen int      // number of samples that were moved out of last
	zero []sample // reads of zeros
	lost int      // number of Checks that failed
}

type sample struct {
	off int64
	n   int
	crc uint32
}

var sampleTable = crc32.MakeTable(crc32.Castagnoli)

// Add remembers a checksum of a piece of p, the bytes that were read at the given offset.
// Add does not keep a reference to p.
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
		} else if k := rand.IntN(s.seen); k < someSamples { // all older reads are kept with the same probability
			s.some[k] = old
		}
	}
	s.last = appendLast(s.last, one, lastSamples)
}

// appendLast appends a sample to the list. If the number of samples in the list has
// already reached the limit, appendLast removes the first sample.
func appendLast(list []sample, one sample, limit int) []sample {
	if len(list) == limit {
		list = slices.Delete(list, 0, 1)
	}
	return append(list, one)
}

// Check reads the remembered ranges again, less than 2 MiB in total, and returns an
// error that wraps ErrChanged if the content differs.
//
// Check calls the function read for each range. The function read must fill its argument
// p with the bytes of the disk that begin at the given offset, or return an error. The
// remote host that has the disk may refuse a single request. In this case read should
// return true together with the error. Check then continues with the other ranges. If
// read returns false together with an error, or if read fails for all ranges, Check
// returns the error of read.
//
// Each failed Check halves the number of ranges that later Checks read. Without this, a
// disk that loses its connection after every few reads could never pass a Check.
func (s *Samples) Check(read func(p []byte, off int64) (proceed bool, err error)) error {
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

func compare(list []sample, read func(p []byte, off int64) (proceed bool, err error)) error {
	var failed error
	same := 0
	p := make([]byte, sampleBytes)
	for _, one := range list {
		proceed, err := read(p[:one.n], one.off)
		if err != nil {
			failed = err
			if !proceed {
				same = 0
				break
			}
			continue
		}
		if crc32.Checksum(p[:one.n], sampleTable) != one.crc {
			return Changed(fmt.Errorf("the disk was replaced or changed: the content of bytes %d to %d differs from what was read before", one.off, one.off+int64(one.n)))
		}
		same++
	}
	if failed != nil && same == 0 {
		return fmt.Errorf("cannot compare the disk with data that was read before: %w", failed)
	}
	return nil
}

// Proved reports whether the content of a disk is certainly unchanged as long as its
// identity is the same. The argument is the proof that the method Identity of the disk
// returned.
func Proved(proof string) bool { return proof == "snapshot" || proof == "mtime" }
