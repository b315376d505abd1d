package client

import (
	"encoding/binary"
	"fmt"

	"github.com/vddkcp/vddkcp/nbd"
)

const (
	// maxRuns is how many extents of one reply are stored. Later ones are ignored.
	maxRuns = 64 << 10
	// maxDescriptors is the maximum number of descriptors in a chunk of block status,
	// as proto.md defines it for NBD_REPLY_TYPE_BLOCK_STATUS.
	maxDescriptors = 1 << 20
	// maxErrorChunk is the maximum length of the payload of an error chunk, in bytes.
	maxErrorChunk = 14 + 2*nbd.MaxString
)

// The struct status holds the extents in a reply to the request BLOCK_STATUS. The first
// extent begins at the offset of the request. All extents together may be shorter or
// longer than the range of the request, but have at least one byte.
type status struct {
	runs     []run
	received bool // a chunk of block status has been received
}

// A run describes an extent: its length in bytes, and whether it reads as zeros.
type run struct {
	n    int64
	zero bool
}

// add appends an extent. If it has the same kind as the last one, the two are merged.
// add returns false if there are already maxRuns extents.
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

// readChunk reads the part of a chunk of a structured reply that follows the magic number.
// After the last chunk it checks that the reply is complete.
func (c *conn) readChunk(r reader) error {
	var b [nbd.ChunkSize - 4]byte
	if err := r.readFull(b[:]); err != nil {
		return &lostError{fmt.Errorf("cannot read the header of a reply chunk (%s): %w", c.outstanding(), err)}
	}
	chunk := nbd.ParseChunk(&b)
	k, err := c.find(chunk.Cookie)
	if err != nil {
		return err
	}
	if !c.structured {
		return violation("reply to %v: found a structured reply, want a simple reply, because structured replies were not negotiated", k)
	}
	k.hasChunk = true
	switch {
	case chunk.Type == nbd.ChunkNone:
		if chunk.Len != 0 || chunk.Flags&nbd.ChunkDone == 0 {
			err = violation("reply to %v: found a chunk of type NONE with a payload of %d bytes and flags %#x, want no payload and the flag DONE, which marks the last chunk", k, chunk.Len, chunk.Flags)
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
		err = violation("chunk type %d does not belong in a reply to %v", chunk.Type, k)
	}
	if err != nil || chunk.Flags&nbd.ChunkDone == 0 {
		return err
	}
	if k.failed == nil {
		switch k.cmd {
		case nbd.CmdRead:
			if gap, ok := k.have.Missing(k.off, k.off+k.n); ok {
				return violation("reply to %v: the reply has ended, and its bytes [%d, %d) are missing", k, gap.From, gap.To)
			}
		case nbd.CmdBlockStatus:
			if !k.status.received {
				return violation("reply to %v: the reply has ended without a chunk with extents", k)
			}
		}
	}
	c.markReplied(k, k.failed)
	return nil
}

// The function claim records that the reply to a read request has a chunk of n bytes at
// the given offset of the disk. It returns the part of the read buffer for these bytes.
func claim(k *call, off uint64, n int64) ([]byte, error) {
	if off < uint64(k.off) || off > uint64(k.off+k.n) || n > k.off+k.n-int64(off) {
		return nil, violation("reply to %v: found a chunk of %d bytes at offset %d, want a chunk inside the range of the request", k, n, off)
	}
	if err := k.have.Add(int64(off), int64(off)+n); err != nil {
		return nil, violation("reply to %v: %w", k, err)
	}
	from := int64(off) - k.off
	return k.data[from : from+n], nil
}

// readData reads the payload of a data chunk into the buffer of the read request.
func readData(r reader, k *call, chunk nbd.Chunk) error {
	if chunk.Len < 9 {
		return violation("reply to %v: found a data chunk with a payload of %d bytes, want at least 9 bytes", k, chunk.Len)
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

// readHole reads the payload of a hole chunk. In the buffer of the read request, it
// fills the range of the hole with zeros.
func readHole(r reader, k *call, chunk nbd.Chunk) error {
	if chunk.Len != 12 {
		return violation("reply to %v: found a hole chunk with a payload of %d bytes, want 12 bytes", k, chunk.Len)
	}
	var b [12]byte
	if err := r.readFull(b[:]); err != nil {
		return lostInReply(k, err)
	}
	n := binary.BigEndian.Uint32(b[8:])
	if n == 0 {
		return violation("reply to %v: found an empty hole, want a hole of at least 1 byte", k)
	}
	p, err := claim(k, binary.BigEndian.Uint64(b[:]), int64(n))
	if err != nil {
		return err
	}
	clear(p)
	return nil
}

// readStatus reads a chunk of block status and stores its first maxRuns extents. Only the last
// extent may end after the range of the request.
func (c *conn) readStatus(r reader, k *call, chunk nbd.Chunk) error {
	n := int64(chunk.Len) / 8
	if chunk.Len < 12 || chunk.Len%8 != 4 || n > maxDescriptors {
		return violation("reply to %v: found a block status chunk with a payload of %d bytes, want 4 bytes plus 8 bytes for each extent, and 1 to %d extents", k, chunk.Len, maxDescriptors)
	}
	var b [8]byte
	if err := r.readFull(b[:4]); err != nil {
		return lostInReply(k, err)
	}
	if id := binary.BigEndian.Uint32(b[:]); !c.contexts || id != c.context {
		return violation("reply to %v: found extents of the metadata context with the ID %d, want the negotiated ID %d", k, id, c.context)
	}
	if k.status.received {
		return violation("reply to %v: found a second chunk with extents, want only one", k)
	}
	k.status.received = true
	pos, room := k.off, true
	for range n {
		if err := r.readFull(b[:]); err != nil {
			return lostInReply(k, err)
		}
		length, flags := int64(binary.BigEndian.Uint32(b[:])), binary.BigEndian.Uint32(b[4:])
		if length == 0 {
			return violation("reply to %v: found an extent of 0 bytes at offset %d, want at least 1 byte", k, pos)
		}
		if pos >= k.off+k.n {
			return violation("reply to %v: found an extent at offset %d, past the end of the request", k, pos)
		}
		pos += length
		room = room && k.status.add(run{length, flags&nbd.StateZero != 0})
	}
	return nil
}

// readError reads the payload of an error chunk. The payloads of all error types begin
// with the same fields, so chunks of unknown error types are accepted.
func readError(r reader, k *call, chunk nbd.Chunk) error {
	head, want := 6, 6
	if chunk.Type == nbd.ChunkErrorOffset {
		want = 14
	}
	if int64(chunk.Len) < int64(want) || chunk.Len > maxErrorChunk {
		return violation("reply to %v: found an error chunk with a payload of %d bytes, want %d to %d bytes", k, chunk.Len, want, maxErrorChunk)
	}
	b := make([]byte, chunk.Len)
	if err := r.readFull(b[:head]); err != nil {
		return lostInReply(k, err)
	}
	errno, n := nbd.Errno(binary.BigEndian.Uint32(b)), int(binary.BigEndian.Uint16(b[4:]))
	if n > len(b)-want || n > nbd.MaxString {
		return violation("reply to %v: found an error text of %d bytes in a payload of %d bytes, want a text of at most %d bytes", k, n, len(b), min(len(b)-want, nbd.MaxString))
	}
	if errno == 0 {
		return violation("reply to %v: found an error chunk with error number 0, which stands for success", k)
	}
	if err := r.readFull(b[head:]); err != nil {
		return lostInReply(k, err)
	}
	failed := &serverError{errno: errno, text: nbd.Text(b[head : head+n]), at: -1}
	if chunk.Type == nbd.ChunkErrorOffset {
		at := binary.BigEndian.Uint64(b[head+n:])
		if at < uint64(k.off) || at >= uint64(k.off+k.n) {
			return violation("reply to %v: found an error at offset %d, want an offset inside the range of the request", k, at)
		}
		failed.at = int64(at)
	}
	if k.failed == nil {
		k.failed = failed
	}
	return nil
}

// lostInReply returns the error for a connection that broke while the reply to a call
// was being read.
func lostInReply(k *call, err error) error {
	return &lostError{fmt.Errorf("cannot read the reply to %v: %w", k, err)}
}
