package inflate

import (
	"encoding/binary"
	"fmt"
)

// Zlib is like [Decoder.Inflate], but decodes a zlib stream (RFC 1950), which consists of a header,
// a deflate stream and a checksum. Zlib checks the header and the checksum. The second result,
// consumed, is the number of bytes of all three parts. If the stream needs a preset dictionary,
// Zlib returns an error that wraps ErrCorrupt.
func (d *Decoder) Zlib(dst, src []byte) (n, consumed int, err error) {
	if len(src) < 2 {
		return 0, len(src), fmt.Errorf("%w: offset %d: the stream ends in the zlib header", ErrTruncated, len(src))
	}
	switch cmf, flg := src[0], src[1]; {
	case cmf&15 != 8:
		return 0, 0, fmt.Errorf("%w: zlib header %#04x: compression method %d, expected 8", ErrCorrupt, src[:2], cmf&15)
	case cmf>>4 > 7:
		return 0, 0, fmt.Errorf("%w: zlib header %#04x: window size code %d, expected at most 7", ErrCorrupt, src[:2], cmf>>4)
	case binary.BigEndian.Uint16(src)%31 != 0:
		return 0, 0, fmt.Errorf("%w: zlib header %#04x: the number is not a multiple of 31", ErrCorrupt, src[:2])
	case flg&0x20 != 0:
		return 0, 0, fmt.Errorf("%w: zlib header %#04x: the stream needs a preset dictionary, which is not supported", ErrCorrupt, src[:2])
	}
	s := stream{dst: dst, src: src, in: 2}
	err = d.inflate(&s)
	s.unread()
	if err != nil {
		return s.out, s.in, err
	}
	if len(src)-s.in < 4 {
		return s.out, len(src), fmt.Errorf("%w: offset %d: the stream ends in the checksum", ErrTruncated, len(src))
	}
	if want, got := binary.BigEndian.Uint32(src[s.in:]), adler32(dst[:s.out]); got != want {
		return s.out, s.in, fmt.Errorf("%w: offset %d: the stream ends with the checksum %#08x, but the decompressed data has the checksum %#08x", ErrCorrupt, s.in, want, got)
	}
	return s.out, s.in + 4, nil
}
