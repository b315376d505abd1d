package inflate

import "encoding/binary"

const (
	adlerWords = 22 // 255*22*21/2 still fits a lane of 16 bits, see sumWords
	adlerBlock = adlerWords * 8
	adlerPart  = 5952 * adlerBlock // about 1 MiB, whose sums fit 64 bits easily
)

// adler32 returns the checksum of the data in a zlib stream (RFC 1950, section 8.2). The checksum
// consists of two sums, a and b, modulo 65521. a is one more than the sum of the bytes. b is the
// sum of the values that a has after each byte. Unlike hash/adler32, which adds one byte at a
// time, this function adds the eight bytes of a word at once.
func adler32(p []byte) uint32 {
	const (
		mod  = 65521
		wide = 0x0000ffff0000ffff
	)
	a, b := uint64(1), uint64(0)
	for len(p) >= adlerBlock {
		part := p[:min(len(p)/adlerBlock*adlerBlock, adlerPart)]
		p = p[len(part):]
		for ; len(part) >= adlerBlock; part = part[adlerBlock:] {
			even, odd, evens, odds := sumWords((*[adlerBlock]byte)(part))
			// Each byte is added to b several times: once for itself, and once for each later byte
			// of the block. For each word after its own word, it is added 8 times. For its own
			// word, it is added 8 times if it is the first byte of the word, 7 times if it is the
			// second one, and so on.
			before := evens&wide + evens>>16&wide + odds&wide + odds>>16&wide
			b += a*adlerBlock + 8*(before>>32+before&0xffffffff)
			b += 8*(even&0xffff) + 6*(even>>16&0xffff) + 4*(even>>32&0xffff) + 2*(even>>48)
			b += 7*(odd&0xffff) + 5*(odd>>16&0xffff) + 3*(odd>>32&0xffff) + odd>>48
			a += (even + odd) * 0x0001000100010001 >> 48 // the sum of the lanes
		}
		a %= mod
		b %= mod
	}
	for _, c := range p {
		a += uint64(c)
		b += a
	}
	return uint32(b%mod<<16 | a%mod)
}

// sumWords sums the bytes of a block, one word of eight bytes at a time. The result even is the sum
// of the bytes at the even places of all words, and the result odd is that of the bytes at the odd
// places. The result evens is the sum of the values that even had before each word. The result odds
// is the sum of the values that odd had before each word. Each result contains four separate sums
// of 16 bits, called lanes: one for each of the four even places of a word in even and evens, and
// one for each of the four odd places in odd and odds.
//
// The function is not inlined, because its caller would need too many registers then.
//
//go:noinline
func sumWords(block *[adlerBlock]byte) (even, odd, evens, odds uint64) {
	for i := 0; i <= len(block)-16; i += 16 {
		w := binary.LittleEndian.Uint64(block[i:])
		e := w & 0x00ff00ff00ff00ff
		evens += even
		odds += odd
		even += e
		odd += (w ^ e) >> 8

		w = binary.LittleEndian.Uint64(block[i+8:])
		e = w & 0x00ff00ff00ff00ff
		evens += even
		odds += odd
		even += e
		odd += (w ^ e) >> 8
	}
	return
}
