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

// Checkpoint is a state from which a copy can be resumed: everything below Offset
// is done and durable.
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

// zeros reports whether the content has the checksum of zeros.
func (s Stretch) zeros() bool { return s.CRC == zeroSum(s.Len) }

// zeroSums caches the results of zeroSum by length. Nearly all pieces have the
// same length.
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

// Proves reports whether the content of Tail can identify the target, because it has a byte
// that is not zero. A tail of zeros proves nothing, because every new disk has zeros.
func (c *Checkpoint) Proves() bool { return proves(c.Tail) }

// proves reports whether the content of tail has a byte that is not zero.
func proves(tail []Stretch) bool {
	return slices.ContainsFunc(tail, func(s Stretch) bool { return s.Len > 0 && s.Len <= maxTailPiece && !s.zeros() })
}

// castagnoli is the table of CRC-32C, which current processors compute in hardware.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sums returns the digests that a copy needs, with the states that they had at the
// checkpoint. A blksum that only Options.Verify needs is left out if the checkpoint
// has none, because the content below Offset is not read again.
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
			return nil, fmt.Errorf("the checkpoint at offset %d has a %s digest of the first %d bytes, want a digest of the first %d bytes", c.Offset, s.Algorithm(), s.Size(), c.Offset)
		}
		kept[s.Algorithm()] = s
	}
	var sums []*digest.Sum
	for _, w := range wanted {
		switch s := kept[w.Algorithm()]; {
		case s != nil:
			sums = append(sums, s)
		case w.Algorithm() == o.Digest:
			return nil, fmt.Errorf("the checkpoint has no %s digest of the first %d bytes, which an earlier run has copied", o.Digest, c.Offset)
		}
	}
	return sums, nil
}

// ErrTail says that a disk does not have the content that Checkpoint.Tail describes.
var ErrTail = errors.New("the disk does not hold the data that was copied last before the checkpoint")

// CheckTail reads the ranges of Tail from d, a source or a target, and compares their
// checksums. The error is an ErrTail if a checksum differs, or if Tail is not valid.
func (c *Checkpoint) CheckTail(ctx context.Context, d io.ReaderAt) error {
	for _, s := range c.Tail {
		if s.Off < 0 || s.Len < 0 || s.Len > maxTailPiece || s.Off > c.Offset-s.Len {
			return fmt.Errorf("the checkpoint at offset %d has an invalid tail of %d bytes at offset %d: %w", c.Offset, s.Len, s.Off, ErrTail)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := make([]byte, s.Len)
		if n, err := d.ReadAt(b, s.Off); n < len(b) {
			return fmt.Errorf("read [%d, %d): %w", s.Off, s.Off+s.Len, err)
		}
		if sum := crc32.Checksum(b, castagnoli); sum != s.CRC {
			return fmt.Errorf("bytes [%d, %d) have the checksum %08x, want %08x: %w", s.Off, s.Off+s.Len, sum, s.CRC, ErrTail)
		}
	}
	return nil
}

// maxTailPiece is the size of the largest piece of a tail, in bytes. It equals the size of the
// largest request.
const maxTailPiece = 64 << 20
