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

// zeros reports whether the checksum is that of a range of zeros.
func (s Stretch) zeros() bool { return s.CRC == zeroSum(s.Len) }

// zeroSums caches the results of zeroSum by length. Nearly all ranges that are looked up have
// the same length.
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

// Proves reports whether the ranges in Tail, which were copied last, can identify the target.
// They can if they contain a byte that is not zero. Ranges of zeros prove nothing, because
// every new disk has zeros.
func (c *Checkpoint) Proves() bool { return proves(c.Tail) }

// proves reports whether the ranges of a tail contain a byte that is not zero.
func proves(tail []Stretch) bool {
	return slices.ContainsFunc(tail, func(s Stretch) bool { return s.Len > 0 && s.Len <= maxTailPiece && !s.zeros() })
}

// castagnoli is the table of CRC-32C, which current processors compute in hardware.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sums returns the digests that a copy with the options o needs, in the states that the checkpoint
// has saved. If the state of the digest o.Digest is missing, sums returns an error. With o.Verify
// the copy also needs a blksum digest, to compare the target with. If only the state of this
// blksum is missing, the result has no blksum: computing it would need the content below Offset,
// which is not read again.
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
			return nil, fmt.Errorf("the checkpoint at offset %d has a %s digest of the first %d bytes, but needs one of the first %d bytes", c.Offset, s.Algorithm(), s.Size(), c.Offset)
		}
		kept[s.Algorithm()] = s
	}
	var sums []*digest.Sum
	for _, w := range wanted {
		switch s := kept[w.Algorithm()]; {
		case s != nil:
			sums = append(sums, s)
		case w.Algorithm() == o.Digest:
			return nil, fmt.Errorf("the checkpoint has no %s digest of the first %d bytes, which an earlier run copied and this run does not read again", o.Digest, c.Offset)
		}
	}
	return sums, nil
}

// ErrTail says that a disk does not have the content whose checksums are in Checkpoint.Tail.
var ErrTail = errors.New("the content differs from the data that was copied just before the checkpoint")

// CheckTail reads those ranges of d that Tail lists, and compares their checksums with those in
// Tail. d is the source or the target of the copy. The error is an ErrTail if a checksum differs,
// or if Tail is not valid.
func (c *Checkpoint) CheckTail(ctx context.Context, d io.ReaderAt) error {
	for _, s := range c.Tail {
		if s.Off < 0 || s.Len < 0 || s.Len > maxTailPiece || s.Off > c.Offset-s.Len {
			return fmt.Errorf("the checkpoint is damaged: it has a checksum of %d bytes at offset %d, expected at most %d bytes before offset %d: %w", s.Len, s.Off, maxTailPiece, c.Offset, ErrTail)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := make([]byte, s.Len)
		if n, err := d.ReadAt(b, s.Off); n < len(b) {
			return fmt.Errorf("cannot read bytes [%d, %d), whose checksum is in the checkpoint: %w", s.Off, s.Off+s.Len, err)
		}
		if sum := crc32.Checksum(b, castagnoli); sum != s.CRC {
			return fmt.Errorf("bytes [%d, %d) have the checksum %08x, want %08x: %w", s.Off, s.Off+s.Len, sum, s.CRC, ErrTail)
		}
	}
	return nil
}

// maxTailPiece is the size, in bytes, of the largest range in Checkpoint.Tail. It equals the
// size of the largest request.
const maxTailPiece = 64 << 20
