package inflate

// readFixed builds the decoding tables for a block with fixed codes (RFC 1951, section 3.2.6).
func (d *Decoder) readFixed() {
	if d.fixed {
		return
	}
	lens := d.lens[:maxLitlen+maxDist]
	fill(lens[:144], 8)
	fill(lens[144:256], 9)
	fill(lens[256:280], 7)
	fill(lens[280:288], 8)
	fill(lens[288:], 5)
	d.build(d.litlen[:], litlenBits, lens[:maxLitlen], litlenSymbols[:])
	d.build(d.dist[:], distBits, lens[maxLitlen:], distSymbols[:])
	d.fixed = true
}

// The precode is the code that compresses the code lengths of a dynamic block. precodeOrder is
// the order in which a stream contains the code lengths of the precode itself.
var precodeOrder = [maxPrecode]uint8{16, 17, 18, 0, 8, 7, 9, 6, 10, 5, 11, 4, 12, 3, 13, 2, 14, 1, 15}

// readDynamic reads the codes of a block with dynamic codes (RFC 1951, section 3.2.7) and builds
// the decoding tables for them.
func (d *Decoder) readDynamic(s *stream) error {
	s.refill() // at least 14 bits
	counts, err := s.take(14)
	if err != nil {
		return err
	}
	litlen, dist, precodes := int(counts&31)+257, int(counts>>5&31)+1, int(counts>>10)+4
	if litlen > 286 {
		return s.corrupt("the block has %d literal and length codes, but at most 286 are valid", litlen)
	}
	if dist > 30 {
		return s.corrupt("the block has %d distance codes, but at most 30 are valid", dist)
	}

	var precode [maxPrecode]uint8
	for _, sym := range precodeOrder[:precodes] {
		if s.nbits < 3 {
			s.refill()
		}
		n, err := s.take(3)
		if err != nil {
			return err
		}
		precode[sym] = uint8(n)
	}
	if !d.build(d.precode[:], precodeBits, precode[:], precodeSymbols[:]) {
		return s.corrupt("the Huffman code for the code lengths is incomplete or oversubscribed")
	}

	lens := d.lens[:litlen+dist]
	if err := d.readLengths(s, lens); err != nil {
		return err
	}
	d.fixed = false
	if lens[256] == 0 {
		return s.corrupt("the block has no end-of-block code")
	}
	if !d.build(d.litlen[:], litlenBits, lens[:litlen], litlenSymbols[:]) {
		return s.corrupt("the Huffman code for literals and lengths is incomplete or oversubscribed")
	}
	if len(s.src)-s.in >= pairFrom {
		d.pairLiterals()
	}
	if !d.build(d.dist[:], distBits, lens[litlen:], distSymbols[:]) {
		return s.corrupt("the Huffman code for distances is incomplete or oversubscribed")
	}
	return nil
}

// readLengths reads the code lengths of a dynamic block into lens. The stream contains them
// compressed; d.precode is the table that decodes them.
func (d *Decoder) readLengths(s *stream, lens []uint8) error {
	for i := 0; i < len(lens); {
		s.refill() // at least a code of 7 bits and 7 extra bits
		e := d.precode[s.bits&(1<<precodeBits-1)]
		if s.nbits < e.bits() {
			return s.truncated()
		}
		if e&isException != 0 {
			return s.corrupt("invalid code in the list of code lengths")
		}
		s.bits >>= e.bits()
		s.nbits -= e.bits()
		sym := uint8(e >> 16)
		if sym < 16 {
			lens[i] = sym
			i++
			continue
		}
		var extra, base uint
		value := uint8(0)
		switch sym {
		case 16:
			if i == 0 {
				return s.corrupt("the first code length says to repeat the previous one, but there is none")
			}
			value, base, extra = lens[i-1], 3, 2
		case 17:
			base, extra = 3, 3
		default:
			base, extra = 11, 7
		}
		n, err := s.take(extra)
		if err != nil {
			return err
		}
		n += base
		if int(n) > len(lens)-i {
			return s.corrupt("a code length is repeated %d times, but only %d code lengths are left", n, len(lens)-i)
		}
		fill(lens[i:i+int(n)], value)
		i += int(n)
	}
	return nil
}

func fill(b []uint8, v uint8) {
	for i := range b {
		b[i] = v
	}
}
