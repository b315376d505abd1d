package server

import (
	"encoding/binary"
	"io"
	"os"

	"github.com/vddkcp/vddkcp/nbd"
)

// This file composes the heads of all replies in the transmission phase: simple replies,
// or the chunks of structured replies if the client negotiated them. Support for
// extended headers would be added here.

// reply is one message in the answer to a request. It consists of a head and the bytes
// that follow the head. A simple reply is one message; a structured reply has one
// message for each chunk.
type reply struct {
	op   *op
	last bool                     // no other message follows in the answer to op
	head [nbd.ChunkSize + 12]byte // the longest head is that of a hole
	n    int                      // length of the head in bytes; 0: there is none

	body []byte  // bytes that follow the head
	buf  *buffer // memory of body, released after the reply was sent

	// If file is not nil, a part of this file follows the head instead of body:
	// length bytes from the offset pos on. The kernel copies them to the socket
	// (sendfile).
	file   *os.File
	pos    int64
	length int64

	// If stream is not nil, it is called to write the data that follow the head. It
	// does not write the first skip bytes, because the kernel has already copied
	// them from file. It returns the bytes with which the reply ends.
	stream func(w io.Writer, skip int64) (tail []byte, err error)
}

// setHead makes b the head of r. If b does not fit in the array for the head, because
// it contains an error text, it becomes the body instead.
func (r *reply) setHead(b []byte) {
	if len(b) <= len(r.head) {
		r.n = copy(r.head[:], b)
	} else {
		r.n, r.body = 0, b
	}
}

// setEnd makes r the last message of the answer. This message has no data. It reports
// that the request succeeded, or its error. For a dropped request the message is empty.
func (o *op) setEnd(r *reply) {
	r.last, r.body = true, nil
	r.setHead(o.appendEnd(r.head[:0]))
}

// setData gives r the head for n bytes of data at offset off of the disk. If last is
// set, the reply ends with these data, so that no error can be reported after them.
func (o *op) setData(r *reply, off int64, n int, last bool) {
	if !o.c.structured {
		r.setHead(nbd.SimpleReply{Cookie: o.Cookie}.Append(r.head[:0]))
		return
	}
	b := o.appendChunk(r.head[:0], nbd.ChunkData, 8+n, last)
	r.setHead(binary.BigEndian.AppendUint64(b, uint64(off)))
}

// setHole makes r a chunk which says that the n bytes at offset off of the disk are
// zeros.
func (o *op) setHole(r *reply, off int64, n int, last bool) {
	b := o.appendChunk(r.head[:0], nbd.ChunkHole, 8+4, last)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	r.setHead(binary.BigEndian.AppendUint32(b, uint32(n)))
}

// setStatus gives r the head of a chunk of block status. n bytes of descriptors for the
// metadata context with the given id follow the head.
func (o *op) setStatus(r *reply, id uint32, n int, last bool) {
	b := o.appendChunk(r.head[:0], nbd.ChunkBlockStatus, 4+n, last)
	r.setHead(binary.BigEndian.AppendUint32(b, id))
}

// appendEnd appends the last message of the answer to b: see setEnd.
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
