package client

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/vddkcp/vddkcp/nbd"
)

const (
	// maxSpans bounds how scattered the chunks of one reply may come.
	maxSpans = 4096
	// maxRuns bounds how much of one allocation reply is kept.
	maxRuns = 64 << 10
	// maxDescriptors is how many a reply has at most, by
	// NBD_REPLY_TYPE_BLOCK_STATUS.
	maxDescriptors = 1 << 20
	// maxErrorChunk bounds an error with its text and what may follow that.
	maxErrorChunk = 14 + 2*nbd.MaxString
)

// spans are ranges of bytes, ascending, not empty, with gaps between them.
type spans struct {
	list     []span
	hasChunk bool // the first chunk has come
}

type span struct{ from, to int64 }

func (s *spans) started() bool { return s.hasChunk }

// add adds a range that does not overlap any.
func (s *spans) add(from, to int64) error {
	i, _ := slices.BinarySearchFunc(s.list, from, func(e span, from int64) int {
		if e.to < from {
			return -1
		}
		return 1
	})
	// list[i] is the first that touches from or lies above it.
	if i < len(s.list) && s.list[i].to == from {
		if i+1 < len(s.list) && s.list[i+1].from < to {
			return overlap(from, to, s.list[i+1])
		}
		s.list[i].to = to
		if i+1 < len(s.list) && s.list[i+1].from == to {
			s.list[i].to = s.list[i+1].to
			s.list = slices.Delete(s.list, i+1, i+2)
		}
		return nil
	}
	if i < len(s.list) && s.list[i].from < to {
		return overlap(from, to, s.list[i])
	}
	if i < len(s.list) && s.list[i].from == to {
		s.list[i].from = from
		return nil
	}
	if len(s.list) == maxSpans {
		return fmt.Errorf("chunks leave %d gaps, want fewer", maxSpans)
	}
	s.list = slices.Insert(s.list, i, span{from, to})
	return nil
}

func overlap(from, to int64, e span) error {
	return fmt.Errorf("chunk [%d, %d) overlaps [%d, %d), which came before", from, to, max(from, e.from), min(to, e.to))
}

// missing returns the first range of [from, to) that was not added.
func (s *spans) missing(from, to int64) (span, bool) {
	for _, e := range s.list {
		if e.from > from {
			return span{from, e.from}, true
		}
		from = e.to
	}
	return span{from, to}, from < to
}

// status is a reply to a query of the allocation: what follows the query's
// offset, at least a byte. It may be less or more than was asked for.
type status struct {
	runs     []run
	received bool
}

// run is a piece of a disk that reads as zeros or does not say.
type run struct {
	n    int64
	zero bool
}

// add reports whether there was room for the run.
func (s *status) add(r run) bool {
	if n := len(s.runs); n > 0 && s.runs[n-1].zero == r.zero {
		s.runs[n-1].n += r.n
		return true
	}
	if len(s.runs) == maxRuns {
		return false
	}
	s.runs = append(s.runs, r)
	return true
}

// readChunk takes a chunk of a structured reply, its magic aside.
func (c *conn) readChunk(r reader) error {
	var b [nbd.ChunkSize - 4]byte
	if err := r.readFull(b[:]); err != nil {
		return &lostError{fmt.Errorf("in the header of a chunk, with %s: %w", c.outstanding(), err)}
	}
	chunk := nbd.ParseChunk(&b)
	k, err := c.find(chunk.Cookie)
	if err != nil {
		return err
	}
	if !c.structured {
		return violation("reply to %v: a structured one, which was not agreed on", k)
	}
	k.have.hasChunk = true
	switch {
	case chunk.Type == nbd.ChunkNone:
		if chunk.Len != 0 || chunk.Flags&nbd.ChunkDone == 0 {
			err = violation("reply to %v: chunk without content of %d bytes, flags %#x: want no bytes and the last chunk", k, chunk.Len, chunk.Flags)
		}
	case chunk.Type == nbd.ChunkData && k.cmd == nbd.CmdRead:
		err = readData(r, k, chunk)
	case chunk.Type == nbd.ChunkHole && k.cmd == nbd.CmdRead:
		err = readHole(r, k, chunk)
	case chunk.Type == nbd.ChunkBlockStatus && k.cmd == nbd.CmdBlockStatus:
		err = c.readStatus(r, k, chunk)
	case chunk.Type.IsError():
		err = readError(r, k, chunk)
	default:
		err = violation("reply to %v: chunk of type %d, want another one", k, chunk.Type)
	}
	if err != nil || chunk.Flags&nbd.ChunkDone == 0 {
		return err
	}
	if k.failed == nil {
		switch k.cmd {
		case nbd.CmdRead:
			if gap, ok := k.have.missing(k.off, k.off+k.n); ok {
				return violation("reply to %v: it ends without [%d, %d)", k, gap.from, gap.to)
			}
		case nbd.CmdBlockStatus:
			if !k.status.received {
				return violation("reply to %v: it ends without an allocation", k)
			}
		}
	}
	c.markReplied(k, k.failed)
	return nil
}

// inCall notes a chunk of content, and returns where its bytes go.
func claim(k *call, off uint64, n int64) ([]byte, error) {
	if off < uint64(k.off) || off > uint64(k.off+k.n) || n > k.off+k.n-int64(off) {
		return nil, violation("reply to %v: chunk of %d bytes at %d, want one inside the request", k, n, off)
	}
	if err := k.have.add(int64(off), int64(off)+n); err != nil {
		return nil, violation("reply to %v: %w", k, err)
	}
	from := int64(off) - k.off
	return k.data[from : from+n], nil
}

func readData(r reader, k *call, chunk nbd.Chunk) error {
	if chunk.Len < 9 {
		return violation("reply to %v: chunk of data of %d bytes, want 9 at least", k, chunk.Len)
	}
	var b [8]byte
	if err := r.readFull(b[:]); err != nil {
		return lostInReply(k, err)
	}
	p, err := claim(k, binary.BigEndian.Uint64(b[:]), int64(chunk.Len)-8)
	if err != nil {
		return err
	}
	if err := r.readFull(p); err != nil {
		return lostInReply(k, err)
	}
	return nil
}

func readHole(r reader, k *call, chunk nbd.Chunk) error {
	if chunk.Len != 12 {
		return violation("reply to %v: hole of %d bytes on the wire, want 12", k, chunk.Len)
	}
	var b [12]byte
	if err := r.readFull(b[:]); err != nil {
		return lostInReply(k, err)
	}
	n := binary.BigEndian.Uint32(b[8:])
	if n == 0 {
		return violation("reply to %v: an empty hole", k)
	}
	p, err := claim(k, binary.BigEndian.Uint64(b[:]), int64(n))
	if err != nil {
		return err
	}
	clear(p)
	return nil
}

// readStatus keeps what lies in the request, and of that the first runs. Only
// the last descriptor may pass the request's end.
func (c *conn) readStatus(r reader, k *call, chunk nbd.Chunk) error {
	n := int64(chunk.Len) / 8
	if chunk.Len < 12 || chunk.Len%8 != 4 || n > maxDescriptors {
		return violation("reply to %v: allocation of %d bytes on the wire, want 4 + 8 for each of 1 to %d extents", k, chunk.Len, maxDescriptors)
	}
	var b [8]byte
	if err := r.readFull(b[:4]); err != nil {
		return lostInReply(k, err)
	}
	if id := binary.BigEndian.Uint32(b[:]); !c.contexts || id != c.context {
		return violation("reply to %v: metadata context %d, want %d", k, id, c.context)
	}
	if k.status.received {
		return violation("reply to %v: its allocation comes twice", k)
	}
	k.status.received = true
	pos, room := k.off, true
	for range n {
		if err := r.readFull(b[:]); err != nil {
			return lostInReply(k, err)
		}
		length, flags := int64(binary.BigEndian.Uint32(b[:])), binary.BigEndian.Uint32(b[4:])
		if length == 0 {
			return violation("reply to %v: empty extent at %d", k, pos)
		}
		if pos >= k.off+k.n {
			return violation("reply to %v: extent at %d, past the end of the request", k, pos)
		}
		pos += length
		room = room && k.status.add(run{length, flags&nbd.StateZero != 0})
	}
	return nil
}

// readError takes an error, of any type: they begin alike.
func readError(r reader, k *call, chunk nbd.Chunk) error {
	head, want := 6, 6
	if chunk.Type == nbd.ChunkErrorOffset {
		want = 14
	}
	if int64(chunk.Len) < int64(want) || chunk.Len > maxErrorChunk {
		return violation("reply to %v: error of %d bytes on the wire, want %d to %d", k, chunk.Len, want, maxErrorChunk)
	}
	b := make([]byte, chunk.Len)
	if err := r.readFull(b[:head]); err != nil {
		return lostInReply(k, err)
	}
	errno, n := nbd.Errno(binary.BigEndian.Uint32(b)), int(binary.BigEndian.Uint16(b[4:]))
	if n > len(b)-want || n > nbd.MaxString {
		return violation("reply to %v: error text of %d bytes in a chunk of %d, want at most %d", k, n, len(b), min(len(b)-want, nbd.MaxString))
	}
	if errno == 0 {
		return violation("reply to %v: error 0, want one that is none", k)
	}
	if err := r.readFull(b[head:]); err != nil {
		return lostInReply(k, err)
	}
	failed := &serverError{errno: errno, text: nbd.Text(b[head : head+n]), at: -1}
	if chunk.Type == nbd.ChunkErrorOffset {
		at := binary.BigEndian.Uint64(b[head+n:])
		if at < uint64(k.off) || at >= uint64(k.off+k.n) {
			return violation("reply to %v: error at %d, want an offset inside the request", k, at)
		}
		failed.at = int64(at)
	}
	if k.failed == nil {
		k.failed = failed
	}
	return nil
}

func lostInReply(k *call, err error) error {
	return &lostError{fmt.Errorf("in the reply to %v: %w", k, err)}
}
