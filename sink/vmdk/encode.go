package vmdk

import (
	"fmt"

	"github.com/klauspost/compress/zlib"
)

// encoding compresses grains, each as a zlib stream of its own (RFC 1950).
type encoding struct {
	zlib    *zlib.Writer
	out     appender
	whole   []byte // of the last grain, where the disk ends in it
	scratch []byte
}

// newEncoding takes a level that is checked.
func newEncoding(level int) *encoding {
	e := new(encoding)
	e.zlib, _ = zlib.NewWriterLevel(&e.out, level)
	return e
}

// Encode implements sink.Encoding. A unit that is shorter than a grain, the last
// one of a disk, is filled up with zeros: readers expect whole grains. What does
// not shrink is stored, in deflate's own way, with some 30 bytes more.
func (e *encoding) Encode(dst, unit []byte, _ int64) (enc []byte, plain bool, err error) {
	if len(unit) == 0 || len(unit) > grainSize {
		return dst, false, fmt.Errorf("a unit of %d bytes, want 1 to %d", len(unit), grainSize)
	}
	if len(unit) < grainSize {
		if e.whole == nil {
			e.whole = make([]byte, grainSize)
		}
		clear(e.whole[copy(e.whole, unit):])
		unit = e.whole
	}
	e.out.b = dst
	defer func() { e.out.b = nil }()
	e.zlib.Reset(&e.out)
	if _, err := e.zlib.Write(unit); err != nil {
		return dst, false, err
	}
	if err := e.zlib.Close(); err != nil {
		return dst, false, err
	}
	return e.out.b, false, nil
}

// appender is a slice to write to.
type appender struct{ b []byte }

func (a *appender) Write(p []byte) (int, error) {
	a.b = append(a.b, p...)
	return len(p), nil
}
