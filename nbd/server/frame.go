package server

import (
	"encoding/binary"
	"io"
	"os"

	"github.com/vddkcp/vddkcp/nbd"
)

// This file composes the head of every reply in the transmission phase: simple
// replies where the client did not negotiate structured ones, and chunks where it
// did. A client with extended headers would need other heads, and only here.

// reply is one message of the answer to a request: a head, and the bytes that
// follow the head. A simple reply is one message; a structured reply is one
// message for each chunk.
type reply struct {
	op   *op
	last bool                     // no other message follows in the answer to op
	head [nbd.ChunkSize + 12]byte // large enough for the longest head, which is that of a hole
	n    int                      // length of the head in bytes; 0: nothing is sent

	body []byte  // follows the head
	buf  *buffer // holds body; returned to the shared memory after the reply is sent

	// If file is not nil, length bytes of it from pos on follow the head instead
	// of body. The kernel copies them to the socket (sendfile).
	file   *os.File
	pos    int64
	length int64

	// stream, unless it is nil, writes the data that follow the head, without the
	// first sent bytes, which sendfile has sent. It returns the bytes that end
	// the reply.
	stream func(w io.Writer, sent int64) (tail []byte, err error)
}

// setHead makes b the head of r. A head with an error text that does not fit
// in the array becomes the body.
func (r *reply) setHead(b []byte) {
	if len(b) <= len(r.head) {
		r.n = copy(r.head[:], b)
	} else {
		r.n, r.body = 0, b
	}
}

// setEnd makes r the last message of the answer, without data: it reports the
// error of the request, or success. A dropped request gets an empty message.
func (o *op) setEnd(r *reply) {
	r.last, r.body = true, nil
	r.setHead(o.appendEnd(r.head[:0]))
}

// setData gives r the head of n bytes of data at offset off. last says that no
// other message follows, so that no error can be reported after the data.
func (o *op) setData(r *reply, off int64, n int, last bool) {
	if !o.c.structured {
		r.setHead(nbd.SimpleReply{Cookie: o.Cookie}.Append(r.head[:0]))
		return
	}
	b := o.appendChunk(r.head[:0], nbd.ChunkData, 8+n, last)
	r.setHead(binary.BigEndian.AppendUint64(b, uint64(off)))
}

// setHole makes r the chunk that says that n bytes at offset off are zeros.
func (o *op) setHole(r *reply, off int64, n int, last bool) {
	b := o.appendChunk(r.head[:0], nbd.ChunkHole, 8+4, last)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	r.setHead(binary.BigEndian.AppendUint32(b, uint32(n)))
}

// setStatus gives r the head of a chunk of block status, whose n bytes of
// descriptors belong to the metadata context with the given id.
func (o *op) setStatus(r *reply, id uint32, n int, last bool) {
	b := o.appendChunk(r.head[:0], nbd.ChunkBlockStatus, 4+n, last)
	r.setHead(binary.BigEndian.AppendUint32(b, id))
}

// appendEnd appends the message that ends the answer, which is that of setEnd.
func (o *op) appendEnd(b []byte) []byte {
	switch {
	case o.dropped:
		return b
	case !o.c.structured:
		return nbd.SimpleReply{Errno: o.errno, Cookie: o.Cookie}.Append(b)
	case o.errno == 0:
		return o.appendChunk(b, nbd.ChunkNone, 0, true)
	}
	b = o.appendChunk(b, nbd.ChunkError, 4+2+len(o.text), true)
	b = binary.BigEndian.AppendUint32(b, uint32(o.errno))
	b = binary.BigEndian.AppendUint16(b, uint16(len(o.text)))
	return append(b, o.text...)
}

// appendChunk appends the header of a chunk whose payload has n bytes.
func (o *op) appendChunk(b []byte, t nbd.ChunkType, n int, last bool) []byte {
	chunk := nbd.Chunk{Type: t, Cookie: o.Cookie, Len: uint32(n)}
	if last {
		chunk.Flags = nbd.ChunkDone
	}
	return chunk.Append(b)
}
