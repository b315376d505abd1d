package transfer

import (
	"os"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
)

// A part is a range of the disk that is copied in one way. If the field file is not nil, the target
// shares the blocks of this range with that file of the source. If it is nil, the range is zeroed,
// or left to the backing image, or read and written.
type part struct {
	source.Extent
	file *os.File // whose bytes from pos on are those of the range; nil: not shared
	pos  int64    // bytes
	idle int64    // bytes of the range that are read and written, but are not planned as work; only in parts that are read and written
}

// The method plain reports whether the part has to be read and written.
func (p part) plain() bool { return p.Kind == source.Data && p.file == nil }

// The method head removes the first n bytes of the part and returns them as a part of their own. If
// the part is shorter, it removes all bytes.
func (p *part) head(n int64) part {
	h := *p
	h.Len = min(n, p.Len)
	p.Off, p.Len = h.End(), p.Len-h.Len
	p.idle = 0 // a part with idle bytes lies inside one request, so it is never divided
	if p.file != nil {
		p.pos += h.Len
	}
	return h
}

// A piece is a part of the disk that a pipeline processes, with its buffer and the results of the
// stages. Pieces are reused for other parts.
type piece struct {
	part
	buffer // of Len bytes; released early when all of them are encoded

	read   bool            // the piece has, or had, a buffer that is filled with the content
	runs   []run           // the zeros and the data in buf
	coded  encoded         // the data in buf as the sink stores it, if the sink is an Encoder
	hashed []digest.Blocks // hashes of buf, one for each digest of the copy
	crc    uint32          // CRC-32C of buf, for checkpoints
}
