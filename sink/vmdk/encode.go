package vmdk

import (
	"fmt"

	"github.com/klauspost/compress/zlib"
)

// encoding implements sink.Encoding. It compresses each grain to a zlib stream of
// its own (RFC 1950).
type encoding struct {
	zlib    *zlib.Writer
	out     appender
	whole   []byte // the last grain, padded, if the disk ends within it
	scratch []byte
}

// newEncoding returns an encoding with the given compression level, which must be
// valid.
func newEncoding(level int) *encoding {
	e := new(encoding)
	e.zlib, _ = zlib.NewWriterLevel(&e.out, level)
	return e
}

// Encode implements sink.Encoding. A unit that is shorter than a grain, at the end
// of the disk, is padded with zeros, since readers expect whole grains. Data that
// cannot be compressed becomes stored (uncompressed) blocks of deflate, which are
// about 30 bytes longer than the data.
func (e *encoding) Encode(dst, unit []byte, _ int64) (enc []byte, plain bool, err error) {
	if len(unit) == 0 || len(unit) > grainSize {
		return dst, false, fmt.Errorf("cannot encode a unit of %d bytes: want 1 to %d bytes (one grain)", len(unit), grainSize)
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

// appender is an io.Writer that appends everything to a slice of bytes.
type appender struct{ b []byte }

func (a *appender) Write(p []byte) (int, error) {
	a.b = append(a.b, p...)
	return len(p), nil
}
