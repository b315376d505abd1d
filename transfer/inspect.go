package transfer

import (
	"hash/crc32"

	"github.com/vddkcp/vddkcp/internal/zero"
)

// run is a part of a buffer, [start, end), all zeros or not.
type run struct {
	start, end int
	zero       bool
}

// scan splits b, which lies at off in the disk, into runs and appends them to
// runs, which it returns. Zeros are looked for in blocks of so many bytes, at
// multiples of it in the disk, and a run of them shorter than least counts as
// data, but for one at b's start or end: it may go on in the neighbour.
func scan(runs []run, b []byte, off, block, least int64) []run {
	next := func(at int) int { return int(min(int64(at)+block-(off+int64(at))%block, int64(len(b)))) }
	for at := 0; at < len(b); {
		start, end := at, next(at)
		isZero := zero.Is(b[at:end])
		for at = end; at < len(b); at = end {
			end = next(at)
			if zero.Is(b[at:end]) != isZero {
				break
			}
		}
		if isZero && int64(at-start) < least && start > 0 && at < len(b) {
			isZero = false
		}
		if n := len(runs); n > 0 && runs[n-1].zero == isZero {
			runs[n-1].end = at
		} else {
			runs = append(runs, run{start, at, isZero})
		}
	}
	return runs
}

// look finds out what is to be known of a piece that was read.
func (p *pipeline) look(c *piece) {
	p.o.Counters.AddRead(c.n)
	if c.file == nil {
		p.scan(c)
	}
	for i, s := range p.sums {
		s.Algorithm().Hash(c.off, c.buf, &c.hashed[i])
	}
	if p.keeper != nil {
		c.crc = crc32.Checksum(c.buf, castagnoli)
	}
}

// scan finds the zeros in a piece.
func (p *pipeline) scan(c *piece) {
	if p.o.KeepZeros {
		c.runs = append(c.runs[:0], run{0, len(c.buf), false})
		return
	}
	c.runs = scan(c.runs[:0], c.buf, c.off, p.block, p.o.Sparse)
}
