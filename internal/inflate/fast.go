package inflate

import "encoding/binary"

const (
	// An iteration of the fast loop uses at most fastIn bytes of src and fastOut bytes of dst.
	// The loop checks once for each iteration that at least so many bytes are left.
	fastIn  = 16
	fastOut = 4 + 16
)

// decodeFast decodes the symbols of a block with few checks. It stops when little of src or dst
// is left; decodeCareful decodes the rest.
//
// The function is longer than 80 lines because the variables of its loop must stay in registers,
// which calls of other functions would prevent.
func (d *Decoder) decodeFast(s *stream) error {
	// dst and src get a capacity equal to their length. The compiler then knows that the capacity
	// and the length are equal, and needs two registers fewer in the loop.
	dst, src := s.dst[:len(s.dst):len(s.dst)], s.src[s.in:len(s.src):len(s.src)]
	out := s.out
	bits, nbits := s.bits, s.nbits // only the lowest 6 bits of nbits are used in this function

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
				return nil // decodeCareful handles the end of the block and errors
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
		case dist > out: // repeat returns the error
		case dist >= 8:
			// The match begins 8 or more bytes before the end of the output. Therefore it can be
			// copied in words of 8 bytes: no word overlaps its copy. Bytes that are written after
			// the end of the match are overwritten by the next symbols.
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
			// The match begins less than 8 bytes before the end of the output, and repeats these
			// bytes. dist is their number. The variable word contains them, repeated to fill 8
			// bytes. The variable step is the number of bytes of this word that belong to complete
			// repetitions.
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

// The method save stores the local variables of decodeFast in the stream s.
func (s *stream) save(out int, src []byte, bits uint64, nbits uint) {
	s.out, s.in = out, len(s.src)-len(src)
	s.bits, s.nbits = bits, nbits&63
}

// copy16 copies 16 bytes as two words of 8 bytes. The ranges may overlap if src begins 8 or more
// bytes before dst.
func copy16(dst, src *[16]byte) {
	binary.LittleEndian.PutUint64(dst[:8], binary.LittleEndian.Uint64(src[:8]))
	binary.LittleEndian.PutUint64(dst[8:], binary.LittleEndian.Uint64(src[8:]))
}
