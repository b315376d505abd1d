package inflate

import "encoding/binary"

const (
	// What one turn of the fast loop may read of src and write to dst without
	// asking again.
	fastIn  = 16
	fastOut = 4 + 16
)

// decodeFast is decode while there is so much of src and dst left that most
// checks can be left out. It reports whether it came to the end of the block.
func (d *Decoder) decodeFast(s *stream) (end bool, err error) {
	dst, src := s.dst[:len(s.dst):len(s.dst)], s.src[s.in:len(s.src):len(s.src)]
	out := s.out
	bits, nbits := s.bits, s.nbits

loop:
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
				if e&isEnd != 0 {
					bits >>= e & 63
					nbits -= uint(e)
					end = true
				}
				break // what is not the end is left to decodeCareful
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
				err = s.corrupt("no such distance code")
				break
			}
		}
		dist := int(e.value(bits))
		bits >>= e & 63
		nbits -= uint(e)

		if dist > out {
			err = s.corrupt("distance %d with %d bytes before it", dist, out)
			break
		}
		if dist >= 8 {
			from, to := (*[16]byte)(dst[out-dist:]), (*[16]byte)(w[k:])
			binary.LittleEndian.PutUint64(to[:8], binary.LittleEndian.Uint64(from[:8]))
			binary.LittleEndian.PutUint64(to[8:], binary.LittleEndian.Uint64(from[8:]))
			if length <= 16 {
				out += length
				continue
			}
			if len(dst)-out >= length+16 {
				for i := 16; i < length; i += 16 {
					from, to := (*[16]byte)(dst[out-dist+i:]), (*[16]byte)(dst[out+i:])
					binary.LittleEndian.PutUint64(to[:8], binary.LittleEndian.Uint64(from[:8]))
					binary.LittleEndian.PutUint64(to[8:], binary.LittleEndian.Uint64(from[8:]))
				}
				out += length
				continue
			}
		} else if len(dst)-out >= length+8 && out >= 8 {
			// The last dist bytes, repeated to a word.
			w := binary.LittleEndian.Uint64(dst[out-8:]) >> (uint(8-dist) * 8 & 63)
			step := 8
			switch dist {
			case 1:
				w *= 0x0101010101010101
			case 2:
				w *= 0x0001000100010001
			case 4:
				w |= w << 32
			case 3:
				w |= w<<24 | w<<48
				step = 6
			default:
				w |= w << (uint(dist) * 8 & 63)
				step = dist
			}
			for i := out; i < out+length; i += step {
				binary.LittleEndian.PutUint64(dst[i:], w)
			}
			out += length
			continue
		}
		n := min(length, len(dst)-out)
		for range n {
			dst[out] = dst[out-dist]
			out++
		}
		if n < length {
			err = s.tooLarge()
			break loop
		}
	}
	s.out, s.in = out, len(s.src)-len(src)
	s.bits, s.nbits = bits, nbits&63
	return end, err
}
