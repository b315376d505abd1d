package transfer

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"slices"
	"sync"

	"github.com/vddkcp/vddkcp/transfer/digest"
)

// Checkpoint is a state from which a copy can be resumed. The target durably holds all content
// of the disk below Offset.
type Checkpoint struct {
	Offset int64     `json:"offset"` // in bytes
	State  []byte    `json:"state"`  // of the sink
	Sums   [][]byte  `json:"sums"`   // marshalled states of the digests
	Tail   []Stretch `json:"tail"`   // the ranges below Offset that were written last, ascending
}

// Stretch is a range of a disk, in bytes, and the CRC-32C of its content.
type Stretch struct {
	Off int64  `json:"off"`
	Len int64  `json:"len"`
	CRC uint32 `json:"crc"`
}

// The method zeros reports whether s.CRC is the checksum of s.Len zero bytes.
func (s Stretch) zeros() bool { return s.CRC == zeroSum(s.Len) }

// zeroSums caches the results of zeroSum by length. The cache pays off because nearly all calls of
// zeroSum have the same length.
var zeroSums sync.Map

// zeroSum returns the CRC-32C of n zero bytes.
func zeroSum(n int64) uint32 {
	if sum, ok := zeroSums.Load(n); ok {
		return sum.(uint32)
	}
	block, sum := make([]byte, 64<<10), uint32(0)
	for left := n; left > 0; left -= int64(len(block)) {
		sum = crc32.Update(sum, castagnoli, block[:min(left, int64(len(block)))])
	}
	if n == maxTailPiece || n&(n-1) == 0 { // few lengths, so that the cache stays small
		zeroSums.Store(n, sum)
	}
	return sum
}

// Proves reports whether the ranges in Tail, which were copied last, can prove that a target is the
// one to which they were copied. They can if they contain a byte that is not zero. Ranges of zeros
// prove nothing, because every new disk has zeros.
func (c *Checkpoint) Proves() bool { return proves(c.Tail) }

// The function proves reports whether the ranges of a Checkpoint.Tail contain a byte that is not
// zero.
func proves(tail []Stretch) bool {
	return slices.ContainsFunc(tail, func(s Stretch) bool { return s.Len > 0 && s.Len <= maxTailPiece && !s.zeros() })
}

// castagnoli is the table of CRC-32C, which current processors compute in hardware.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// The method sums returns the digests that a copy with the options o computes. Their computation
// continues from the states that the checkpoint has saved. A copy computes up to two digests: the
// one that the user wants (o.Digest), and with o.Verify a blksum, with which the target is compared
// at the end.
//
// Computing a digest from the beginning would need the content below Offset, which is not read
// again. If the checkpoint has no state for o.Digest, sums therefore returns an error. If only the
// blksum for o.Verify is missing, sums leaves it out of the result.
func (c *Checkpoint) sums(o Options) ([]*digest.Sum, error) {
	wanted := o.sums()
	if c.Offset == 0 {
		return wanted, nil
	}
	kept := map[digest.Algorithm]*digest.Sum{}
	for _, state := range c.Sums {
		s := new(digest.Sum)
		if err := s.UnmarshalBinary(state); err != nil {
			return nil, fmt.Errorf("cannot restore the state of a digest from the checkpoint: %w", err)
		}
		if s.Size() != c.Offset {
			return nil, fmt.Errorf("the checkpoint at offset %d has a %s digest of the first %d bytes of the disk, expected a digest of the first %d bytes", c.Offset, s.Algorithm(), s.Size(), c.Offset)
		}
		kept[s.Algorithm()] = s
	}
	var sums []*digest.Sum
	for _, w := range wanted {
		switch s := kept[w.Algorithm()]; {
		case s != nil:
			sums = append(sums, s)
		case w.Algorithm() == o.Digest:
			return nil, fmt.Errorf("the %s digest cannot be computed: an earlier run copied the first %d bytes of the disk without this digest, and this run does not read them again", o.Digest, c.Offset)
		}
	}
	return sums, nil
}

// ErrTail says that a disk does not have the content whose checksums are in Checkpoint.Tail.
var ErrTail = errors.New("this is not the data that was copied just before the checkpoint")

// CheckTail reads the ranges of the disk d that Tail lists, and computes their checksums. d is the
// source or the target of the copy. The error is an ErrTail if a checksum differs from the one in
// Tail, or if Tail is not valid.
func (c *Checkpoint) CheckTail(ctx context.Context, d io.ReaderAt) error {
	for _, s := range c.Tail {
		if s.Off < 0 || s.Len < 0 || s.Len > maxTailPiece || s.Off > c.Offset-s.Len {
			return fmt.Errorf("the checkpoint is damaged: it has a checksum for the %d bytes of the disk that begin at offset %d, expected a range of at most %d bytes that ends at or below offset %d: %w", s.Len, s.Off, maxTailPiece, c.Offset, ErrTail)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := make([]byte, s.Len)
		if n, err := d.ReadAt(b, s.Off); n < len(b) {
			return fmt.Errorf("cannot read bytes [%d, %d) to compare them with their checksum in the checkpoint: %w", s.Off, s.Off+s.Len, err)
		}
		if sum := crc32.Checksum(b, castagnoli); sum != s.CRC {
			return fmt.Errorf("bytes [%d, %d) have the checksum %08x, but %08x in the checkpoint: %w", s.Off, s.Off+s.Len, sum, s.CRC, ErrTail)
		}
	}
	return nil
}

// maxTailPiece is the size, in bytes, of the largest range in Checkpoint.Tail. It equals the
// size of the largest request.
const maxTailPiece = 64 << 20
