package transfer

import (
	"context"
	"runtime"

	"github.com/vddkcp/vddkcp/sink"
)

// The type encoded holds the units of a piece, such as compressed clusters, as the sink stores
// them. The units are in ascending order.
type encoded struct {
	pooled bool   // bytes belongs to encoder.memory and must be returned there
	bytes  []byte // the code of all units, one after the other
	units  []unit
}

// The type unit describes a unit of the sink, such as a cluster, that is not all zeros.
type unit struct {
	start, end int  // range of the unit in the buffer of the piece, in bytes
	codeEnd    int  // end of the code in encoded.bytes; it begins where the code of the unit before ends
	plain      bool // the sink stores the unit as it is in the buffer
}

// The method code returns the encoded bytes of the i-th unit.
func (e *encoded) code(i int) []byte {
	begin := 0
	if i > 0 {
		begin = e.units[i-1].codeEnd
	}
	return e.bytes[begin:e.units[i].codeEnd]
}

// encoder encodes pieces for a sink that stores encoded units, such as compressed
// clusters. It is safe for concurrent use with different pieces.
type encoder struct {
	sink        sink.Encoder
	unit        int                // of the sink, in bytes
	keepBuffers bool               // a digest needs the buffer after encoding
	encodings   chan sink.Encoding // those not in use
	memory      chan []byte        // for the code of pieces; those not in use
}

// newEncoder returns an encoder for dst, or nil if dst does not store encoded units.
// requests is the number of concurrent reads of the copy.
func newEncoder(dst sink.Disk, requests int, keepBuffers bool) *encoder {
	s, ok := sink.Ability[sink.Encoder](dst)
	if !ok || s.NewEncoding() == nil {
		return nil
	}
	e := &encoder{
		sink: s, unit: int(dst.Unit()), keepBuffers: keepBuffers,
		encodings: make(chan sink.Encoding, encoders()),
		memory:    make(chan []byte, 2*requests+encoders()),
	}
	// There are as many Encodings as processors. The tables of one Encoding fill most of a
	// processor's cache, and those of more Encodings would evict each other.
	for range cap(e.encodings) {
		e.encodings <- s.NewEncoding()
	}
	for range cap(e.memory) {
		e.memory <- nil
	}
	return e
}

// encoders returns the number of goroutines that can encode at the same time.
func encoders() int { return runtime.GOMAXPROCS(0) }

// acquireMemory assigns memory for encoded units to a piece, and blocks until some is free. Only
// the producer of the pipeline may call it, for pieces in ascending order. In another order, later
// pieces could get all the memory. An earlier piece would then wait forever, because the pipeline
// finishes pieces in ascending order and only then frees their memory.
func (e *encoder) acquireMemory(ctx context.Context, c *piece) error {
	select {
	case c.coded.bytes = <-e.memory:
		c.coded.pooled = true
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// releaseMemory returns the memory for encoded units of a piece to the encoder, if the
// piece has some.
func (e *encoder) releaseMemory(c *piece) {
	if c.coded.pooled {
		e.memory <- c.coded.bytes[:0]
	}
	c.coded = encoded{units: c.coded.units[:0]}
}

// The method encode encodes the units of a piece that are not zeros. The piece c was scanned
// before: c.runs says where it has zeros.
func (e *encoder) encode(c *piece) error {
	encoding := <-e.encodings // cannot deadlock: an Encoding is never held while waiting
	defer func() { e.encodings <- encoding }()
	needed := false
	for _, r := range c.runs {
		if r.zero {
			continue
		}
		for start := r.start; start < r.end; {
			end := min(start+e.unit, r.end)
			code, plain, err := encoding.Encode(c.coded.bytes, c.buf[start:end], c.Off+int64(start))
			if err != nil {
				return err
			}
			needed = needed || plain
			c.coded.bytes = code
			c.coded.units = append(c.coded.units, unit{start, end, len(code), plain})
			start = end
		}
	}
	if !needed && !e.keepBuffers {
		// The piece is encoded now. While it waits for the collector, it no longer needs its
		// buffer, so the next read can use the buffer. The piece keeps the buffer in two cases: if
		// the copy computes a digest, because the hashes refer to the content of the buffer, and if
		// the sink stores a unit as it is in the buffer.
		c.releaseBuffer()
	}
	return nil
}
