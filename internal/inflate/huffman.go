package inflate

import "math/bits"

// An entry of a decoding table says what to do with the bits that index it.
//
//	bits 0-5    bits to take: the code and the extra bits that follow it
//	bits 6-7    literals, 1 or 2
//	bits 8-12   bits of the (first) code alone
//	bits 13-15  flags
//	bits 16-31  the literals, or the base that the extra bits are added to
//
// In an entry that leads to a subtable, bits 0-5 are those that index it, bits
// 16-31 its place. The literal/length table and the distance table are each
// indexed by the first bits of a code; longer codes go on in a subtable, whose
// entries hold the whole code.
type entry uint32

const (
	oneLiteral  entry = 1 << 6
	isLiteral   entry = 1 << 15
	isException entry = 1 << 14 // any of the below: one test in the fast loop
	isSubtable  entry = 1 << 13
	isEnd       entry = 1 << 16 // of block; an exception that is neither is a code of no meaning
)

const (
	maxLitlen   = 288 // symbols of fixed blocks; dynamic ones have at most 286
	maxDist     = 32
	maxPrecode  = 19
	maxCodeBits = 15

	litlenBits  = 11
	distBits    = 8
	precodeBits = 7

	// Powers of two that hold the table and any subtables: a complete code of
	// 288 symbols with 11 bits before and 4 in the subtables takes at most 2342
	// entries, one of 32 symbols with 8 and 7 bits at most 402.
	litlenSize = 4096
	distSize   = 512
)

// bits is the number of bits of the code and its extra bits.
func (e entry) bits() uint { return uint(e & 63) }

// value is the base plus the extra bits, where bits begins with the code.
func (e entry) value(bits uint64) uint {
	return uint(e>>16) + uint(bits&(1<<(e&63)-1)>>(e>>8&31))
}

// What the symbols mean (RFC 1951, section 3.2.5): entries that lack the bits of
// the code, which build adds.
var (
	litlenSymbols  = makeLitlenSymbols()
	distSymbols    = makeDistSymbols()
	precodeSymbols = makePrecodeSymbols()
)

func makeLitlenSymbols() *[maxLitlen]entry {
	t := new([maxLitlen]entry)
	for i := range 256 {
		t[i] = entry(i)<<16 | isLiteral | oneLiteral
	}
	t[256] = isException | isEnd
	base := entry(3)
	for i := 257; i < 285; i++ {
		extra := max(entry(i-261)/4, 0)
		if i < 265 {
			extra = 0
		}
		t[i] = base<<16 | extra
		base += 1 << extra
	}
	t[285] = 258 << 16
	t[286] = isException
	t[287] = isException
	return t
}

func makeDistSymbols() *[maxDist]entry {
	t := new([maxDist]entry)
	base := entry(1)
	for i := range 30 {
		extra := entry(max(i-2, 0) / 2)
		t[i] = base<<16 | extra
		base += 1 << extra
	}
	t[30] = isException
	t[31] = isException
	return t
}

func makePrecodeSymbols() *[maxPrecode]entry {
	t := new([maxPrecode]entry)
	for i := range t {
		t[i] = entry(i) << 16
	}
	return t
}

// build makes table, indexed by tableBits bits, of the canonical code that has
// these lengths, at most maxCodeBits each (RFC 1951, section 3.2.2), for
// symbols with these meanings.
//
// It reports whether the code is one that zlib takes: complete, or without a
// symbol, or of one symbol with one bit. (zlib refuses the latter two for a
// precode, and a block whose code lacks the end of block: no block can be
// decoded with those anyway.)
func (d *Decoder) build(table []entry, tableBits uint, lens []uint8, meaning []entry) bool {
	var count [maxCodeBits + 1]uint16
	for _, n := range lens {
		count[n&15]++
	}
	count[0] = 0

	// The symbols, sorted by code length, then by value: the order of their codes.
	var place [maxCodeBits + 2]uint16
	left := 1 // codes of n bits that no shorter code begins
	longest := uint(0)
	for n := uint(1); n <= maxCodeBits; n++ {
		place[n+1] = place[n] + count[n]
		left = left<<1 - int(count[n])
		if left < 0 {
			return false
		}
		if count[n] != 0 {
			longest = n
		}
	}
	if left != 0 {
		return buildDegenerate(table[:1<<tableBits], lens, meaning, longest)
	}
	sorted := &d.sorted
	for sym, n := range lens {
		if n != 0 {
			p := &place[n&15]
			sorted[*p] = uint16(sym)
			*p++
		}
	}

	// A table of n bits is two copies of the one of n-1 bits, with the codes of
	// n bits put in where no shorter ones are. In code, the bits of the next
	// code are reversed, as the stream has them.
	code, next := uint(0), 0
	for n := uint(1); n <= tableBits; n++ {
		half := 1 << (n - 1)
		copy(table[half:2*half], table[:half])
		for range count[n] {
			sym := sorted[next]
			next++
			table[code] = meaning[sym] + entry(n<<8|n)
			code = increment(code, n)
		}
	}

	free, prefix, subBits := uint(1)<<tableBits, ^uint(0), uint(0)
	start := free
	for n := tableBits + 1; n <= longest; n++ {
		for remaining := int(count[n]); remaining > 0; remaining-- {
			if p := code & (1<<tableBits - 1); p != prefix {
				// A new subtable, just large enough for all codes with this prefix.
				prefix = p
				subBits = n - tableBits
				for room := 1<<subBits - remaining; room > 0; room = room<<1 - int(count[tableBits+subBits]) {
					subBits++
				}
				start = free
				free += 1 << subBits
				table[prefix] = entry(start<<16) | isException | isSubtable | entry(tableBits<<8) | entry(tableBits+subBits)
			}
			sym := sorted[next]
			next++
			e := meaning[sym] + entry(n<<8|n)
			for i := code >> tableBits; i < 1<<subBits; i += 1 << (n - tableBits) {
				table[start+i] = e
			}
			code = increment(code, n)
		}
	}
	return true
}

// buildDegenerate is build for incomplete codes.
func buildDegenerate(table []entry, lens []uint8, meaning []entry, longest uint) bool {
	if longest > 1 {
		return false
	}
	for i := range table {
		table[i] = isException | 1<<8 | 1
	}
	for sym, n := range lens {
		if n == 1 { // the only one: with two the code were complete
			for i := 0; i < len(table); i += 2 {
				table[i] = meaning[sym] + (1<<8 | 1)
			}
		}
	}
	return true
}

// increment returns the code of n bits after code, both with their bits reversed.
func increment(code, n uint) uint {
	zeros := code ^ (1<<n - 1)
	if zeros == 0 {
		return 0 // after the last one
	}
	carry := uint(1) << (bits.Len(zeros) - 1)
	return code&(carry-1) | carry
}

// pairFrom is how many bytes must follow the header of a block for pairLiterals to
// save more time than it takes (measured; streams of a few hundred bytes decode
// 1.3 times as fast without).
const pairFrom = 2048

// pairLiterals puts into each entry of a literal that leaves room for the code of
// another one after it, that one too.
func (d *Decoder) pairLiterals() {
	t := (*[1 << litlenBits]entry)(d.litlen[:])
	for i := len(t) - 1; i >= 0; i-- { // downwards: t[i>>n] holds one literal yet
		e := t[i]
		second := t[i>>(e&15)]
		n := e&15 + second&15
		// Without branches, which would be taken at random.
		fits := (n - litlenBits - 1) >> 31 & (e & second >> 15 & 1)
		t[i] = e + -fits&(second&15|oneLiteral|second>>16<<24)
	}
}
