package transfer

import (
	"context"
	"runtime"

	"github.com/vddkcp/vddkcp/sink"
)

// encoded are the units of a piece as the sink stores them, in order.
type encoded struct {
	holds bool   // memory that is p.codes' own
	bytes []byte // all of them, one after the other
	units []unit
}

// unit is a unit of the sink's that is not all zeros.
type unit struct {
	start, end int // of the piece's buffer
	codeEnd    int // of encoded.bytes; it begins where the one before ends
	plain      bool
}

// encoderOf returns dst as an Encoder that has something to encode, else nil.
func encoderOf(dst sink.Disk) sink.Encoder {
	if e, ok := sink.Ability[sink.Encoder](dst); ok && e.NewEncoding() != nil {
		return e
	}
	return nil
}

// encoders is how many goroutines beside the readers keep the processors busy
// with encoding.
func encoders() int { return runtime.GOMAXPROCS(0) }

// prepareEncoding makes what encoding needs. There are no more Encodings than
// processors: each has tables that fill most of a processor's cache, and with
// one for every worker they would push each other out.
func (p *pipeline) prepareEncoding() {
	p.encodings = make(chan sink.Encoding, encoders())
	for range cap(p.encodings) {
		p.encodings <- p.encoder.NewEncoding()
	}
	p.codes = make(chan []byte, 2*p.o.Requests+encoders())
	for range cap(p.codes) {
		p.codes <- nil
	}
}

// takeCode gives a piece the memory for its encoded units. The producer calls
// it, in order: a piece that waited for what later ones hold would wait forever.
func (p *pipeline) takeCode(ctx context.Context, c *piece) error {
	if p.encoder == nil {
		return nil
	}
	select {
	case c.coded.bytes = <-p.codes:
		c.coded.holds = true
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// encode encodes all units of a piece that are not zeros.
func (p *pipeline) encode(c *piece) error {
	encoding := <-p.encodings // whoever has one waits for nothing
	defer func() { p.encodings <- encoding }()
	size, needed := int(p.dst.Unit()), false
	for _, r := range c.runs {
		if r.zero {
			continue
		}
		for start := r.start; start < r.end; {
			end := min(start+size, r.end)
			code, plain, err := encoding.Encode(c.coded.bytes, c.buf[start:end], c.off+int64(start))
			if err != nil {
				return err
			}
			needed = needed || plain
			c.coded.bytes = code
			c.coded.units = append(c.coded.units, unit{start, end, len(code), plain})
			start = end
		}
	}
	if !needed && c.free != nil && len(p.sums) == 0 {
		// The source can fill it again while this piece waits for its turn. (A
		// digest's blocks refer to it until they are folded.)
		c.free()
		c.buf, c.free = nil, nil
	}
	return nil
}

// place gives the encoded units of a run to the sink, the first of which is
// the next of c's, and returns how many there were.
func (p *pipeline) place(c *piece, r run, next int) (units int, err error) {
	for _, u := range c.coded.units[next:] {
		if u.start >= r.end {
			break
		}
		off, n := c.off+int64(u.start), int64(u.end-u.start)
		code := c.coded.bytes[c.coded.begin(next+units):u.codeEnd]
		units++
		if !u.plain && len(code) == 0 {
			if err := p.dst.SameAt(p.sinkContext, off, n); err != nil {
				return units, err
			}
			continue
		}
		if u.plain {
			code = c.buf[u.start:u.end]
		}
		if err := p.encoder.Place(off, code, u.plain); err != nil {
			return units, err
		}
		p.o.Counters.AddWritten(n)
	}
	return units, nil
}

// begin is where the code of the i-th unit begins.
func (e *encoded) begin(i int) int {
	if i == 0 {
		return 0
	}
	return e.units[i-1].codeEnd
}

// recycle lets the memory of c's encoded units go.
func (p *pipeline) recycle(c *piece) {
	if c.coded.holds {
		p.codes <- c.coded.bytes[:0]
	}
	c.coded = encoded{units: c.coded.units[:0]}
}
