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

// A reply is one message that answers a request. A simple reply of the protocol is one
// such message. A structured reply is several messages: one for each chunk. A message
// consists of a head and the bytes that follow the head.
type reply struct {
	op   *op
	last bool                     // this is the last message that answers op
	head [nbd.ChunkSize + 12]byte // the longest head is that of a hole
	n    int                      // length of the head in bytes; 0: there is none

	body []byte  // bytes that follow the head
	buf  *buffer // memory of body, released after the reply was sent

	// If file is not nil, the head is followed by bytes of this file and not by the
	// field body. The fields pos and length hold the offset of these bytes in the
	// file and their number. The kernel copies them to the socket (sendfile).
	file   *os.File
	pos    int64
	length int64

	// If stream is not nil, it is a function that writes the data that follow the
	// head. The kernel may have copied a part at the beginning of the data from
	// file already. The parameter copied is the length of this part. The function
	// does not write this part again. stream returns the bytes with which the
	// message ends.
	stream func(w io.Writer, copied int64) (tail []byte, err error)
}

// setHead makes the bytes b the head of a reply. If b contains an error text, it may
// not fit in the array for the head. In this case b becomes the body, and there is no
// head.
func (r *reply) setHead(b []byte) {
	if len(b) <= len(r.head) {
		r.n = copy(r.head[:], b)
	} else {
		r.n, r.body = 0, b
	}
}

// setEnd makes r the last message that answers the request o. This message has no data,
// and reports success or an error. If o is to get no reply because the connection or
// the server is ending (o.dropped), the message has no bytes.
func (o *op) setEnd(r *reply) {
	r.last, r.body = true, nil
	r.setHead(o.appendEnd(r.head[:0]))
}

// setData sets the head of a reply with n bytes of data, which are at the given offset
// of the disk. If last is true, the reply to the request o ends with these data, and no
// error can be reported after them.
func (o *op) setData(r *reply, off int64, n int, last bool) {
	if !o.c.structured {
		r.setHead(nbd.SimpleReply{Cookie: o.Cookie}.Append(r.head[:0]))
		return
	}
	b := o.appendChunk(r.head[:0], nbd.ChunkData, 8+n, last)
	r.setHead(binary.BigEndian.AppendUint64(b, uint64(off)))
}

// setHole makes r a chunk which says that the n bytes at the given offset of the disk
// are zeros. If last is true, the reply to the request o ends with this chunk.
func (o *op) setHole(r *reply, off int64, n int, last bool) {
	b := o.appendChunk(r.head[:0], nbd.ChunkHole, 8+4, last)
	b = binary.BigEndian.AppendUint64(b, uint64(off))
	r.setHead(binary.BigEndian.AppendUint32(b, uint32(n)))
}

// setStatus sets the head of a chunk of block status. After the head, the chunk has n
// bytes of descriptors for the metadata context with the given ID.
func (o *op) setStatus(r *reply, id uint32, n int, last bool) {
	b := o.appendChunk(r.head[:0], nbd.ChunkBlockStatus, 4+n, last)
	r.setHead(binary.BigEndian.AppendUint32(b, id))
}

// appendEnd appends to b the last message that answers the request o: see setEnd.
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
