package inflate

import "encoding/binary"

const (
	// What one turn of the fast loop may read of src and write to dst without
	// asking again.
	fastIn  = 16
	fastOut = 4 + 16
)

// decodeFast decodes the symbols of a block while there is so much of src and dst
// left that most checks can be left out; decodeCareful takes what follows.
//
// The function is longer than 80 lines because the variables of its loop must stay in
// registers, which calls of other functions would prevent.
func (d *Decoder) decodeFast(s *stream) error {
	// With cap the same as len the loop has two registers more.
	dst, src := s.dst[:len(s.dst):len(s.dst)], s.src[s.in:len(s.src):len(s.src)]
	out := s.out
	bits, nbits := s.bits, s.nbits // of nbits, only the lowest 6 bits count here

	for len(src) >= fastIn && len(dst)-out >= fastOut {
		bits |= binary.LittleEndian.Uint64(src[:8]) << (nbits & 63)
		src = src[(63-nbits&63)>>3 : len(src) : len(src)]
		nbits |= 56

		w := (*[fastOut]byte)(dst[out:])
		k := uint(0)
		e := d.litlen[bits&(1<<litlenBits-1)]
		if e&isLiteral != 0 {
			bits >>= e & 63
			nbits -= uint(e)
			binary.LittleEndian.PutUint16(w[:2], uint16(e>>16))
			k = uint(e >> 6 & 3)
			e = d.litlen[bits&(1<<litlenBits-1)]
			if e&isLiteral != 0 {
				bits >>= e & 63
				nbits -= uint(e)
				binary.LittleEndian.PutUint16(w[k:k+2], uint16(e>>16))
				k += uint(e >> 6 & 3)
				e = d.litlen[bits&(1<<litlenBits-1)]
				if e&isLiteral != 0 {
					bits >>= e & 63
					nbits -= uint(e)
					binary.LittleEndian.PutUint16(w[k:k+2], uint16(e>>16))
					out += int(k + uint(e>>6&3))
					continue
				}
			}
		}
		out += int(k)
		if e&isException != 0 {
			if e&isSubtable != 0 {
				e = d.litlen[e.value(bits)&(litlenSize-1)]
			}
			if e&isLiteral != 0 {
				bits >>= e & 63
				nbits -= uint(e)
				w[k] = byte(e >> 16)
				out++
				continue
			}
			if e&isException != 0 {
				s.save(out, src, bits, nbits)
				return nil // the end, or an error: left to decodeCareful
			}
		}
		length := int(e.value(bits))
		bits >>= e & 63
		nbits -= uint(e)

		if nbits&63 < maxCodeBits+13 {
			bits |= binary.LittleEndian.Uint64(src[:8]) << (nbits & 63)
			src = src[(63-nbits&63)>>3 : len(src) : len(src)]
			nbits |= 56
		}
		e = d.dist[bits&(1<<distBits-1)]
		if e&isException != 0 {
			if e&isSubtable != 0 {
				e = d.dist[e.value(bits)&(distSize-1)]
			}
			if e&isException != 0 {
				s.save(out, src, bits, nbits)
				return s.noDistance()
			}
		}
		dist := int(e.value(bits))
		bits >>= e & 63
		nbits -= uint(e)

		to := dst[out:]
		switch {
		case dist > out: // repeat says so
		case dist >= 8:
			// Words at dist or more do not overlap; what is written past length
			// is written again by what comes next.
			copy16((*[16]byte)(w[k:]), (*[16]byte)(dst[out-dist:]))
			if length <= 16 {
				out += length
				continue
			}
			if len(to) >= length+16 {
				from := dst[out-dist:]
				for i := 16; i < length; i += 16 {
					copy16((*[16]byte)(to[i:]), (*[16]byte)(from[i:]))
				}
				out += length
				continue
			}
		case out >= 8 && len(to) >= length+8:
			// The last dist bytes, repeated to a word, and in it step bytes that
			// are whole repeats.
			word, step := binary.LittleEndian.Uint64(dst[out-8:])>>(64-8*dist&63), 8
			switch dist {
			case 1:
				word *= 0x0101010101010101
			case 2:
				word *= 0x0001000100010001
			case 3:
				word |= word<<24 | word<<48
				step = 6
			case 4:
				word |= word << 32
			default:
				word |= word << (8 * dist & 63)
				step = dist
			}
			for i := 0; i < length; i += step {
				binary.LittleEndian.PutUint64(to[i:], word)
			}
			out += length
			continue
		}
		s.save(out, src, bits, nbits)
		if err := s.repeat(length, dist); err != nil {
			return err
		}
		out = s.out
	}
	s.save(out, src, bits, nbits)
	return nil
}

// save puts the state of decodeFast back into s.
func (s *stream) save(out int, src []byte, bits uint64, nbits uint) {
	s.out, s.in = out, len(s.src)-len(src)
	s.bits, s.nbits = bits, nbits&63
}

// copy16 copies 16 bytes, word by word: from may lie 8 bytes or more before to.
func copy16(to, from *[16]byte) {
	binary.LittleEndian.PutUint64(to[:8], binary.LittleEndian.Uint64(from[:8]))
	binary.LittleEndian.PutUint64(to[8:], binary.LittleEndian.Uint64(from[8:]))
}
