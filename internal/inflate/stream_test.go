package inflate

import (
	"math/bits"
	"slices"
)

// writer builds a deflate stream bit by bit.
type writer struct {
	bytes []byte
	n     uint // number of used bits of the last byte
}

// bits writes the n lowest bits of v, beginning with the lowest.
func (w *writer) bits(v, n uint) *writer {
	for ; n > 0; n-- {
		if w.n%8 == 0 {
			w.bytes, w.n = append(w.bytes, 0), 0
		}
		w.bytes[len(w.bytes)-1] |= byte(v&1) << w.n
		w.n++
		v >>= 1
	}
	return w
}

// code writes a code, beginning with its first bit.
func (w *writer) code(c code) *writer { return w.bits(bits.Reverse(c.bits)>>(bits.UintSize-c.n), c.n) }

// raw fills up the last byte and writes whole bytes.
func (w *writer) raw(b ...byte) *writer {
	w.bytes = append(w.bytes, b...)
	w.n = 0
	return w
}

type code struct{ bits, n uint }

// codes returns the canonical codes with the given lengths, which need not form a
// complete code.
func codes(lens []uint) []code {
	all := make([]code, len(lens))
	next := uint(0)
	for n := uint(1); n <= 15; n++ {
		for sym := range lens {
			if lens[sym] == n {
				all[sym] = code{next, n}
				next++
			}
		}
		next <<= 1
	}
	return all
}

// lens returns n code lengths: those in the map by symbol, and 0 for other symbols.
func lens(n int, some map[int]uint) []uint {
	all := make([]uint, n)
	for sym, l := range some {
		all[sym] = l
	}
	return all
}

var (
	fixedLitlen = codes(fixedLens())
	fixedDist   = codes(slices.Repeat([]uint{5}, 32))
)

func fixedLens() []uint {
	all := make([]uint, 288)
	for i := range all {
		switch {
		case i < 144, i >= 280:
			all[i] = 8
		case i < 256:
			all[i] = 9
		default:
			all[i] = 7
		}
	}
	return all
}

// dynamic writes the header of a block with the given code lengths. Its precode has 4
// bits for each length and no repetitions.
func (w *writer) dynamic(last uint, litlen, dist []uint) *writer {
	w.bits(last, 1).bits(2, 2)
	w.bits(uint(len(litlen)-257), 5).bits(uint(len(dist)-1), 5).bits(19-4, 4)
	for i := range 19 {
		if i < 3 {
			w.bits(0, 3) // 16, 17, 18
		} else {
			w.bits(4, 3)
		}
	}
	for _, l := range append(litlen[:len(litlen):len(litlen)], dist...) {
		w.code(code{l, 4})
	}
	return w
}

// match writes a length and a distance with the given codes.
func (w *writer) match(litlen, dist []code, length, distance int) *writer {
	sym := 0
	for i := 257; i <= 285; i++ {
		if int(litlenSymbols[i]>>16) <= length {
			sym = i
		}
	}
	w.code(litlen[sym]).bits(uint(length)-uint(litlenSymbols[sym]>>16), litlenSymbols[sym].bits())
	for i := range 30 {
		if int(distSymbols[i]>>16) <= distance {
			sym = i
		}
	}
	return w.code(dist[sym]).bits(uint(distance)-uint(distSymbols[sym]>>16), distSymbols[sym].bits())
}
