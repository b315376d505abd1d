// Package inflate decodes DEFLATE (RFC 1951), also inside zlib streams (RFC
// 1950), from memory to memory. It is for the compressed units of disk images,
// whose input and output lie whole in memory and whose output size is known
// beforehand: that saves the window, the buffering and the resumable state of a
// decoder of streams, and most of its time.
package inflate

import (
	"encoding/binary"
	"errors"
	"fmt"
)

var (
	// ErrCorrupt is wrapped by the error of a stream that breaks the format.
	ErrCorrupt = errors.New("corrupt deflate data")
	// ErrTruncated is wrapped by the error of a stream that src ends within.
	ErrTruncated = errors.New("deflate data end too early")
	// ErrTooLarge is wrapped by the error of a stream that holds more bytes
	// than dst takes. dst is full then, with the first bytes of the stream.
	ErrTooLarge = errors.New("deflate data hold more than expected")
)

// Decoder decodes one stream at a time. The zero value is ready. It holds about
// 20 KiB of tables and nothing of a stream past the call: reuse it, on one
// goroutine at a time.
type Decoder struct {
	litlen [litlenSize]entry
	dist   [distSize]entry
	fixed  bool // the tables are those of fixed blocks

	precode [1 << precodeBits]entry
	lens    [maxLitlen + maxDist]uint8 // code lengths, as the block has them
	sorted  [maxLitlen]uint16          // symbols by code length, for build
}

// Inflate decodes the deflate stream (RFC 1951) that src begins with into dst.
// It returns the number of bytes written and of bytes of src that the stream
// takes; src may go on after it. Of dst, only dst[:n] is to be relied on: what
// follows, up to len(dst), may have been overwritten. The former content of dst
// does not matter.
//
// The error wraps [ErrCorrupt], [ErrTruncated] or [ErrTooLarge] and names the
// offset in src. n then counts the good bytes before the error.
func (d *Decoder) Inflate(dst, src []byte) (n, consumed int, err error) {
	s := stream{dst: dst, src: src}
	err = d.inflate(&s)
	s.unread()
	return s.out, s.in, err
}

// stream is a stream being decoded.
type stream struct {
	dst []byte
	out int // bytes written to dst
	src []byte
	in  int // bytes taken from src

	// The next nbits bits of the stream are the lowest of bits. The bits above
	// them are zero or what follows in src: or-ing that in again changes
	// nothing.
	bits  uint64
	nbits uint
}

// unread gives the whole bytes in the bit buffer back to src.
func (s *stream) unread() {
	s.in -= int(s.nbits >> 3)
	s.bits, s.nbits = 0, 0
}

// refill makes nbits at least 56, or all that src has left.
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

// take removes n bits, at most 16, from the bit buffer, which was refilled.
func (s *stream) take(n uint) (uint, error) {
	if s.nbits < n {
		return 0, s.truncated()
	}
	v := uint(s.bits) & (1<<n - 1)
	s.bits >>= n
	s.nbits -= n
	return v, nil
}

// offset is where in src the next bit is.
func (s *stream) offset() int { return s.in - int(s.nbits+7)>>3 }

func (s *stream) corrupt(format string, args ...any) error {
	return fmt.Errorf("%w: offset %d: %s", ErrCorrupt, s.offset(), fmt.Sprintf(format, args...))
}

func (s *stream) truncated() error {
	return fmt.Errorf("%w: offset %d", ErrTruncated, len(s.src))
}

func (s *stream) tooLarge() error {
	return fmt.Errorf("%w: offset %d: expected at most %d bytes", ErrTooLarge, s.offset(), len(s.dst))
}

// inflate decodes the blocks of a stream (RFC 1951, section 3.2.3).
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
			err = s.corrupt("block type 3")
		}
		if err != nil {
			return err
		}
		if final == 1 {
			return nil
		}
	}
}

// stored copies a block that is not compressed (RFC 1951, section 3.2.4).
func (s *stream) stored() error {
	s.unread() // and with them the bits up to the next byte
	if len(s.src)-s.in < 4 {
		s.in = len(s.src)
		return s.truncated()
	}
	n := int(binary.LittleEndian.Uint16(s.src[s.in:]))
	if c := int(binary.LittleEndian.Uint16(s.src[s.in+2:])); c != n^0xffff {
		return s.corrupt("length of stored block %#04x, its complement %#04x", n, c)
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

// decode decodes the symbols of one block up to its end.
func (d *Decoder) decode(s *stream) error {
	if err := d.decodeFast(s); err != nil {
		return err
	}
	return d.decodeCareful(s)
}

// decodeCareful is decode near the ends of src and dst, symbol by symbol.
func (d *Decoder) decodeCareful(s *stream) error {
	for {
		s.refill() // 56 bits are enough for a length (15+5) and a distance (15+13)
		e := d.litlen[s.bits&(1<<litlenBits-1)]
		if e&isSubtable != 0 {
			e = d.litlen[e.value(s.bits)&(litlenSize-1)]
		}
		if e&isLiteral != 0 { // one by one, also where e has two
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
				return s.corrupt("no such length code")
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
	return s.corrupt("no such distance code")
}

// repeat appends length bytes from dist bytes back, which may overlap.
func (s *stream) repeat(length, dist int) error {
	if dist > s.out {
		return s.corrupt("distance %d with %d bytes before it", dist, s.out)
	}
	start, end := s.out-dist, min(s.out+length, len(s.dst))
	for s.out < end { // what overlaps, reads what was just written
		s.out += copy(s.dst[s.out:end], s.dst[start:s.out])
	}
	if end-start-dist < length {
		return s.tooLarge()
	}
	return nil
}
