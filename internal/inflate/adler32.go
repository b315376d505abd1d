package inflate

import "encoding/binary"

// adler32 is the checksum of a zlib stream (RFC 1950, section 8.2): a is one
// more than the sum of the bytes, b the sum of the values that a takes on the
// way, both modulo 65521. hash/adler32 adds byte by byte, here eight bytes of a
// word are added at once, in lanes of 16 bits.
func adler32(p []byte) uint32 {
	const (
		mod   = 65521
		words = 22 // at which the largest lane is 255*22*21/2, still below 1<<16
		lanes = 0x00ff00ff00ff00ff
		wide  = 0x0000ffff0000ffff
	)
	a, b := uint64(1), uint64(0)
	for len(p) >= words*8 {
		block := (*[words * 8]byte)(p)
		p = p[words*8:]

		var even, odd uint64   // sums of the bytes at even and odd places
		var evens, odds uint64 // sums of those sums, as they are before each word
		for i := 0; i < len(block); i += 8 {
			w := binary.LittleEndian.Uint64(block[i : i+8])
			evens += even
			odds += odd
			even += w & lanes
			odd += w >> 8 & lanes
		}

		// A byte counts in b once for each byte from its place to the end: eight
		// times for each word after its own, and 8, 7, .. 1 times in its own.
		b += a * words * 8
		before := evens&wide + evens>>16&wide + odds&wide + odds>>16&wide
		b += 8 * (before>>32 + before&0xffffffff)
		b += 8*(even&0xffff) + 6*(even>>16&0xffff) + 4*(even>>32&0xffff) + 2*(even>>48)
		b += 7*(odd&0xffff) + 5*(odd>>16&0xffff) + 3*(odd>>32&0xffff) + odd>>48
		sum := even + odd // a lane holds at most 2*255*22
		sum = sum&wide + sum>>16&wide
		a += sum>>32 + sum&0xffffffff
		// (a and b need the modulus only against overflow of 64 bits)
		a %= mod
		b %= mod
	}
	for _, c := range p {
		a += uint64(c)
		b += a
	}
	return uint32(b%mod<<16 | a%mod)
}
