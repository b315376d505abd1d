package inflate

import "math/bits"

// entry is an entry of a decoding table. The next bits of the stream are the index of the entry.
//
//	bits 0-5    number of bits to consume: the code and its extra bits
//	bits 6-7    number of literals, 1 or 2
//	bits 8-12   number of bits of the (first) code alone
//	bits 13-15  flags
//	bits 16-31  the literals, or the base to which the extra bits are added
//
// The literal/length table and the distance table are indexed by the first bits of a code. Longer
// codes continue in a subtable, which is indexed by the next bits. All numbers of bits are counted
// from the start of the code, even in the entries of a subtable.
//
// An entry that leads to a subtable is different. Its bits 16-31 are the index of the first entry
// of the subtable. Its bits 0-5 are the sum of two numbers: the number of bits that index the
// table, and the number of bits that index the subtable.
type entry uint32

const (
	oneLiteral  entry = 1 << 6
	isLiteral   entry = 1 << 15
	isException entry = 1 << 14 // isSubtable, isEnd, or an invalid code; the fast loop tests only this bit
	isSubtable  entry = 1 << 13
	isEnd       entry = 1 << 16 // end of block
)

const (
	maxLitlen   = 288 // number of symbols of fixed codes; dynamic codes have at most 286
	maxDist     = 32
	maxPrecode  = 19
	maxCodeBits = 15

	litlenBits  = 11
	distBits    = 8
	precodeBits = 7

	// These are the numbers of entries of the tables with their subtables. They are rounded up to
	// powers of two. A complete code of 288 symbols, with 11 bits in the table and 4 in the
	// subtables, needs at most 2342 entries. A complete code of 32 symbols, with 8 bits in the
	// table and 7 in the subtables, needs at most 402.
	litlenSize = 4096
	distSize   = 512
)

// The method bits returns the number of bits that the entry consumes: the code and its extra bits.
func (e entry) bits() uint { return uint(e & 63) }

// The method value returns the base of the entry plus its extra bits. The parameter bits contains
// the stream from the start of the code on.
func (e entry) value(bits uint64) uint {
	return uint(e>>16) + uint(bits&(1<<(e&63)-1)>>(e>>8&31))
}

// These tables have an entry for each symbol. The entry says what the symbol means (RFC 1951,
// section 3.2.5). It does not contain the number of bits of the symbol's code. The function build
// adds this number.
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

// The method build fills a decoding table for the canonical code whose code lengths are lens (RFC
// 1951, section 3.2.2). The table is indexed by tableBits bits. The parameter meaning has an entry
// for each symbol. No code length is more than maxCodeBits.
//
// The method build returns true if the code is complete, is empty, or has a single symbol of one
// bit. zlib accepts the same codes with two exceptions: zlib refuses a precode that is empty or has
// a single symbol, and a block without a code for its end. The exceptions make no difference,
// because no block can be decoded with these codes.
func (d *Decoder) build(table []entry, tableBits uint, lens []uint8, meaning []entry) bool {
	var count [maxCodeBits + 1]uint16
	for _, n := range lens {
		count[n&15]++
	}
	count[0] = 0

	// The symbols are sorted by code length, and symbols with equal lengths by value. That is
	// the order of their codes.
	var place [maxCodeBits + 2]uint16
	left := 1 // number of codes of n bits that do not begin with a shorter code
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

	// A table that is indexed by n bits begins as two copies of the table that is indexed by n-1
	// bits. Then the codes of n bits are put into the entries that no shorter code uses. The
	// variable code contains the bits of the next code in reversed order, as the stream has them.
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
				// The codes of a subtable have the same first bits, the prefix. The new subtable
				// gets the smallest size that has room for all codes with its prefix.
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

// buildDegenerate builds the table of an incomplete code. It returns false unless the code is
// empty or has a single symbol of one bit.
func buildDegenerate(table []entry, lens []uint8, meaning []entry, longest uint) bool {
	if longest > 1 {
		return false
	}
	for i := range table {
		table[i] = isException | 1<<8 | 1
	}
	for sym, n := range lens {
		if n == 1 { // at most one symbol has length 1, or the code would be complete
			for i := 0; i < len(table); i += 2 {
				table[i] = meaning[sym] + (1<<8 | 1)
			}
		}
	}
	return true
}

// The function increment returns the code that follows the given code. Both codes have n bits in
// reversed order.
func increment(code, n uint) uint {
	zeros := code ^ (1<<n - 1)
	if zeros == 0 {
		return 0 // code was the last one
	}
	carry := uint(1) << (bits.Len(zeros) - 1)
	return code&(carry-1) | carry
}

// pairFrom is a number of bytes. pairLiterals is called for a block only if at least this number of
// bytes of input follow the header of the block. The call makes decoding faster, but takes time
// itself. Streams of a few hundred bytes were decoded 1.3 times as fast without the call.
const pairFrom = 2048

// pairLiterals lets entries of the literal table stand for two literals, so that both are
// decoded in one step. This is possible if the index of an entry contains the whole codes of
// both literals.
func (d *Decoder) pairLiterals() {
	t := (*[1 << litlenBits]entry)(d.litlen[:])
	for i := len(t) - 1; i >= 0; i-- { // in descending order, so that t[i>>n] still has one literal
		e := t[i]
		second := t[i>>(e&15)]
		n := e&15 + second&15
		// The variable fits is 1 if the entries e and second are both literals and the codes of
		// these literals together fit into an index. It is 0 in all other cases. It is computed
		// without branches, because the CPU could not predict them.
		fits := (n - litlenBits - 1) >> 31 & (e & second >> 15 & 1)
		t[i] = e + -fits&(second&15|oneLiteral|second>>16<<24)
	}
}
