package transfer

import (
	"hash/crc32"
	"math/bits"

	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// inspector examines the content of pieces after their buffers were filled. It is safe for
// concurrent use with different pieces.
type inspector struct {
	counters  *progress.Counters
	sums      []*digest.Sum // pieces are hashed for each of these digests
	crc       bool          // pieces get a CRC, for checkpoints
	keepZeros bool          // zeros are not searched for
	block     int64         // zeros are searched for in blocks of this many bytes
	least     int64         // a shorter run of zeros counts as data, in bytes
}

func newInspector(o Options, unit int64, sums []*digest.Sum, crc bool) inspector {
	return inspector{
		counters: o.Counters, sums: sums, crc: crc, keepZeros: o.KeepZeros,
		block: max(unit, 1<<(bits.Len64(uint64(min(o.Sparse, defaultSparse)))-1)), least: o.Sparse,
	}
}

// The method inspect searches the filled buffer of a piece for zeros, and computes the hashes and
// the CRC of the content.
func (i *inspector) inspect(c *piece) {
	i.counters.AddRead(c.Len)
	if c.file == nil {
		i.scan(c)
	}
	if c.hashed == nil && len(i.sums) > 0 {
		c.hashed = make([]digest.Blocks, len(i.sums))
	}
	for n, s := range i.sums {
		s.Algorithm().Hash(c.Off, c.buf, &c.hashed[n])
	}
	if i.crc {
		c.crc = crc32.Checksum(c.buf, castagnoli)
	}
}

// The method scan searches the buffer of a piece for zeros, and stores the runs that it finds in
// the field runs of the piece.
func (i *inspector) scan(c *piece) {
	if i.keepZeros {
		c.runs = append(c.runs[:0], run{0, len(c.buf), false})
		return
	}
	c.runs = scan(c.runs[:0], c.buf, c.Off, i.block, i.least)
}

// A run is a range [start, end) of a buffer, in bytes. If the field zero is true, the whole range
// is zeros. If it is false, the range counts as data.
type run struct {
	start, end int
	zero       bool
}

// The function scan divides the bytes b into runs of zeros and runs of data. These bytes are the
// content of the disk from the given offset on. scan appends the runs to the given list and returns
// the longer list. A run ends at an offset of the disk that is a multiple of blockSize, or at the
// end of b. Fewer than minZeros bytes of zeros count as data, except at the start and the end of b,
// because there the zeros may continue in a neighbouring piece.
func scan(list []run, b []byte, off, blockSize, minZeros int64) []run {
	next := func(at int) int { return int(min(int64(at)+blockSize-(off+int64(at))%blockSize, int64(len(b)))) }
	for at := 0; at < len(b); {
		start, end := at, next(at)
		isZero := zero.Is(b[at:end])
		for at = end; at < len(b); at = end {
			end = next(at)
			if zero.Is(b[at:end]) != isZero {
				break
			}
		}
		if isZero && int64(at-start) < minZeros && start > 0 && at < len(b) {
			isZero = false
		}
		if n := len(list); n > 0 && list[n-1].zero == isZero {
			list[n-1].end = at
		} else {
			list = append(list, run{start, at, isZero})
		}
	}
	return list
}
