package server

import (
	"encoding/binary"

	"github.com/vddkcp/vddkcp/nbd"
)

// end makes r the end of the reply, without data.
func (o *op) end(r *reply) *reply {
	r.last, r.body = true, nil
	h := r.head[:0]
	switch {
	case o.dropped:
	case !o.c.structured:
		h = nbd.SimpleReply{Errno: o.errno, Cookie: o.Cookie}.Append(h)
	case o.errno == 0:
		h = nbd.Chunk{Flags: nbd.ChunkDone, Type: nbd.ChunkNone, Cookie: o.Cookie}.Append(h)
	default:
		h = nbd.Chunk{Flags: nbd.ChunkDone, Type: nbd.ChunkError, Cookie: o.Cookie, Len: uint32(6 + len(o.text))}.Append(h)
		r.body = appendError(nil, o.errno, o.text)
	}
	r.n = len(h)
	return r
}

// wholeHead makes the head of a reply whose data are in one piece; done says
// that nothing can go wrong after it.
func (o *op) wholeHead(r *reply, done bool) {
	h := r.head[:0]
	if !o.c.structured {
		h = nbd.SimpleReply{Cookie: o.Cookie}.Append(h)
	} else {
		chunk := nbd.Chunk{Type: nbd.ChunkData, Cookie: o.Cookie, Len: 8 + o.Len}
		if done {
			chunk.Flags = nbd.ChunkDone
		}
		h = binary.BigEndian.AppendUint64(chunk.Append(h), o.Off)
	}
	r.n = len(h)
}

// appendError appends an error's number and its text.
func appendError(b []byte, e nbd.Errno, text string) []byte {
	b = binary.BigEndian.AppendUint32(b, uint32(e))
	b = binary.BigEndian.AppendUint16(b, uint16(len(text)))
	return append(b, text...)
}
