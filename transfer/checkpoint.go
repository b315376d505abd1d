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

// Checkpoint is where a copy can go on: what lies below Offset is done and
// durable.
type Checkpoint struct {
	Offset int64     `json:"offset"` // bytes
	State  []byte    `json:"state"`  // the sink's
	Sums   [][]byte  `json:"sums"`   // the digests' states, marshalled
	Tail   []Stretch `json:"tail"`   // what was written last below Offset, ascending
}

// Stretch is a range of a disk, in bytes, and the CRC-32C of its content.
type Stretch struct {
	Off int64  `json:"off"`
	Len int64  `json:"len"`
	CRC uint32 `json:"crc"`
}

// zeros reports whether the content has the checksum of zeros.
func (s Stretch) zeros() bool { return s.CRC == zeroSum(s.Len) }

// zeroSums are the results of zeroSum by length; nearly all pieces have the same.
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
	if n == maxTailPiece || n&(n-1) == 0 { // the map stays small
		zeroSums.Store(n, sum)
	}
	return sum
}

// Proves reports whether a target that has the content of Tail can only be the
// one that was written: a piece of it has a byte that is not zero. Zeros are on
// every new device, too.
func (c *Checkpoint) Proves() bool { return proves(c.Tail) }

func proves(tail []Stretch) bool {
	return slices.ContainsFunc(tail, func(s Stretch) bool { return s.Len > 0 && s.Len <= maxTailPiece && !s.zeros() })
}

// castagnoli has instructions of its own on every processor of the day.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sums returns the digests that a copy needs, in the state that they had at the
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
			return nil, fmt.Errorf("the checkpoint's digest: %w", err)
		}
		if s.Size() != c.Offset {
			return nil, fmt.Errorf("the checkpoint at %d has a %s of %d bytes", c.Offset, s.Algorithm(), s.Size())
		}
		kept[s.Algorithm()] = s
	}
	var sums []*digest.Sum
	for _, w := range wanted {
		switch s := kept[w.Algorithm()]; {
		case s != nil:
			sums = append(sums, s)
		case w.Algorithm() == o.Digest:
			return nil, fmt.Errorf("the checkpoint has no %s, and all below %d is copied already", o.Digest, c.Offset)
		}
	}
	return sums, nil
}

// ErrTail says that what a checkpoint tells of the last bytes below it is not
// what they are.
var ErrTail = errors.New("the bytes that were written last are not those of the checkpoint")

// CheckTail reads what was written last below a checkpoint and compares it. An
// error is an ErrTail where it differs.
func (c *Checkpoint) CheckTail(ctx context.Context, d io.ReaderAt) error {
	for _, s := range c.Tail {
		if s.Off < 0 || s.Len < 0 || s.Len > maxTailPiece || s.Off > c.Offset-s.Len {
			return fmt.Errorf("the checkpoint at %d tells of [%d, +%d): %w", c.Offset, s.Off, s.Len, ErrTail)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := make([]byte, s.Len)
		if n, err := d.ReadAt(b, s.Off); n < len(b) {
			return fmt.Errorf("read [%d, %d) back: %w", s.Off, s.Off+s.Len, err)
		}
		if sum := crc32.Checksum(b, castagnoli); sum != s.CRC {
			return fmt.Errorf("[%d, %d) has the checksum %08x, want %08x: %w", s.Off, s.Off+s.Len, sum, s.CRC, ErrTail)
		}
	}
	return nil
}

// maxTailPiece is the largest request that there is, in bytes.
const maxTailPiece = 64 << 20
