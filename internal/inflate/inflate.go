// Package inflate decodes DEFLATE streams (RFC 1951), with [Decoder.Inflate], and zlib streams
// (RFC 1950), with [Decoder.Zlib], from memory to memory.
//
// It is for the compressed units of disk images. Their input and output are completely in
// memory, and the size of their output is known in advance. Therefore the package needs no
// window, no buffering and no state between calls. It takes much less time than a decoder such
// as compress/flate, which reads from an io.Reader.
package inflate

import (
	"encoding/binary"
	"errors"
	"fmt"
)

var (
	// ErrCorrupt says that a stream violates the format. It is always wrapped in an error with
	// details.
	ErrCorrupt = errors.New("corrupt deflate data")
	// ErrTruncated says that the input ends before the end of the stream. It is always wrapped in
	// an error with details.
	ErrTruncated = errors.New("truncated deflate data")
	// ErrTooLarge says that a stream has more data than fits into the buffer for the output. The
	// buffer then contains the beginning of the data. ErrTooLarge is always wrapped in an error
	// with details.
	ErrTooLarge = errors.New("deflate data is larger than expected")
)

// Decoder decodes one stream at a time. The zero value is ready to use. A Decoder has tables of
// about 20 KiB and keeps no state between calls. Therefore one Decoder should be used for many
// streams. Only one goroutine may use it at a time.
type Decoder struct {
	litlen [litlenSize]entry
	dist   [distSize]entry
	fixed  bool // litlen and dist are the tables of fixed codes

	precode [1 << precodeBits]entry
	lens    [maxLitlen + maxDist]uint8 // code lengths in the order of the symbols
	sorted  [maxLitlen]uint16          // symbols in the order of their codes, for build
}

// Inflate decodes the deflate stream (RFC 1951) at the start of src into dst. n is the number of
// bytes that it has written to dst. consumed is the number of bytes of src that the stream
// occupies; src may have more bytes after the stream. The content of dst after the first n bytes
// is undefined.
//
// Errors wrap [ErrCorrupt], [ErrTruncated] or [ErrTooLarge] and name the offset in src. n is
// then the number of correct bytes before the error.
func (d *Decoder) Inflate(dst, src []byte) (n, consumed int, err error) {
	s := stream{dst: dst, src: src}
	err = d.inflate(&s)
	s.unread()
	return s.out, s.in, err
}

// The type stream is the state while one stream is decoded.
type stream struct {
	dst []byte
	out int // number of bytes written to dst
	src []byte
	in  int // number of bytes read from src

	// The field bits is the bit buffer. Its lowest nbits bits are the next bits of the stream. The
	// bits above them are either zero or already have the values that refill will read from src.
	// Therefore refill can add bytes with OR.
	bits  uint64
	nbits uint
}

// The method unread empties the bit buffer: the whole bytes in it count as not read from src.
func (s *stream) unread() {
	s.in -= int(s.nbits >> 3)
	s.bits, s.nbits = 0, 0
}

// The method refill reads bytes of src into the bit buffer, until it has at least 56 bits or src is
// used up.
func (s *stream) refill() {
	if s.in+8 <= len(s.src) {
		s.bits |= binary.LittleEndian.Uint64(s.src[s.in:]) << (s.nbits & 63)
		s.in += int((63 - s.nbits) >> 3)
		s.nbits |= 56
		return
	}
	for s.nbits < 56 && s.in < len(s.src) {
		s.bits |= uint64(s.src[s.in]) << (s.nbits & 63)
		s.in++
		s.nbits += 8
	}
}

// The method take removes n bits from the bit buffer and returns them. n is at most 16. The caller
// has called refill before.
func (s *stream) take(n uint) (uint, error) {
	if s.nbits < n {
		return 0, s.truncated()
	}
	v := uint(s.bits) & (1<<n - 1)
	s.bits >>= n
	s.nbits -= n
	return v, nil
}

// The method offset returns the offset in src of the byte with the next bit of the stream.
func (s *stream) offset() int { return s.in - int(s.nbits+7)>>3 }

func (s *stream) corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: offset %d: %s", ErrCorrupt, s.offset(), fmt.Sprintf(format, args...))
}

func (s *stream) truncated() error {
	return fmt.Errorf("%w: offset %d", ErrTruncated, len(s.src))
}

func (s *stream) tooLarge() error {
	return fmt.Errorf("%w: offset %d: the decompressed data has more than %d bytes", ErrTooLarge, s.offset(), len(s.dst))
}

// The method inflate decodes all blocks of a stream (RFC 1951, section 3.2.3).
func (d *Decoder) inflate(s *stream) error {
	for {
		s.refill()
		final, err := s.take(1)
		if err != nil {
			return err
		}
		kind, err := s.take(2)
		if err != nil {
			return err
		}
		switch kind {
		case 0:
			err = s.stored()
		case 1:
			d.readFixed()
			err = d.decode(s)
		case 2:
			if err = d.readDynamic(s); err == nil {
				err = d.decode(s)
			}
		default:
			err = s.corrupt("invalid block type 3")
		}
		if err != nil {
			return err
		}
		if final == 1 {
			return nil
		}
	}
}

// The method stored copies the data of a block that is not compressed (RFC 1951, section 3.2.4).
func (s *stream) stored() error {
	s.unread() // also drops the bits up to the next byte
	if len(s.src)-s.in < 4 {
		s.in = len(s.src)
		return s.truncated()
	}
	n := int(binary.LittleEndian.Uint16(s.src[s.in:]))
	if c := int(binary.LittleEndian.Uint16(s.src[s.in+2:])); c != n^0xffff {
		return s.corrupt("the length %#04x of the stored block does not match its complement %#04x", n, c)
	}
	s.in += 4
	got := copy(s.dst[s.out:], s.src[s.in:min(s.in+n, len(s.src))])
	s.in += got
	s.out += got
	switch {
	case got == n:
		return nil
	case s.in == len(s.src):
		return s.truncated()
	}
	return s.tooLarge()
}

// The method decode decodes the symbols of one compressed block and writes their data to dst.
func (d *Decoder) decode(s *stream) error {
	if err := d.decodeFast(s); err != nil {
		return err
	}
	return d.decodeCareful(s)
}

// decodeCareful decodes one symbol at a time, with all checks. decode calls it near the ends of
// src and dst, where decodeFast cannot be used.
func (d *Decoder) decodeCareful(s *stream) error {
	for {
		s.refill() // the 56 bits suffice for a length (15+5) and a distance (15+13)
		e := d.litlen[s.bits&(1<<litlenBits-1)]
		if e&isSubtable != 0 {
			e = d.litlen[e.value(s.bits)&(litlenSize-1)]
		}
		if e&isLiteral != 0 { // one literal, even if e has two
			n := uint(e >> 8 & 31)
			if s.nbits < n {
				return s.truncated()
			}
			if s.out == len(s.dst) {
				return s.tooLarge()
			}
			s.dst[s.out] = byte(e >> 16)
			s.out++
			s.bits >>= n
			s.nbits -= n
			continue
		}
		if s.nbits < e.bits() {
			return s.truncated()
		}
		if e&isException != 0 {
			if e&isEnd == 0 {
				return s.corrupt("invalid length code")
			}
			s.bits >>= e.bits()
			s.nbits -= e.bits()
			return nil
		}
		length := int(e.value(s.bits))
		s.bits >>= e.bits()
		s.nbits -= e.bits()

		e = d.dist[s.bits&(1<<distBits-1)]
		if e&isSubtable != 0 {
			e = d.dist[e.value(s.bits)&(distSize-1)]
		}
		if s.nbits < e.bits() {
			return s.truncated()
		}
		if e&isException != 0 {
			return s.noDistance()
		}
		dist := int(e.value(s.bits))
		s.bits >>= e.bits()
		s.nbits -= e.bits()
		if err := s.repeat(length, dist); err != nil {
			return err
		}
	}
}

func (s *stream) noDistance() error {
	return s.corrupt("invalid distance code")
}

// The method repeat copies earlier bytes of the output to the end of the output. The earlier bytes
// begin dist bytes before the end. The number of bytes is length. The two ranges may overlap.
func (s *stream) repeat(length, dist int) error {
	if dist > s.out {
		return s.corrupt("a match has the distance %d, but only %d bytes come before it", dist, s.out)
	}
	start, end := s.out-dist, min(s.out+length, len(s.dst))
	for s.out < end { // if the ranges overlap, later bytes repeat earlier ones
		s.out += copy(s.dst[s.out:end], s.dst[start:s.out])
	}
	if end-start-dist < length {
		return s.tooLarge()
	}
	return nil
}
