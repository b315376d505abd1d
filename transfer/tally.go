package transfer

import (
	"bytes"
	"encoding/binary"
	"math/bits"
)

// tally counts the bytes that differ between two disks, and the ranges of consecutive differing
// bytes. Its user adds blocks in ascending order. Blocks that were not added are equal in both
// disks.
type tally struct {
	ranges, bytes int64
	first, end    int64 // start of the first range and end of the last one, in bytes; valid if ranges > 0
	a, b          byte  // the bytes of the two disks at first
}

// The method join adds the counts of another tally to t. The other tally, the parameter next, has
// counted a later part of the disks than t. A range that continues from the part of t into the
// later part counts once.
func (t *tally) join(next *tally) {
	if next.ranges == 0 {
		return
	}
	if t.ranges == 0 {
		*t = *next
		return
	}
	t.ranges += next.ranges
	if t.end == next.first {
		t.ranges--
	}
	t.bytes += next.bytes
	t.end = next.end
}

// tallyBlock is the size, in bytes, of a block. Blocks that are equal in both disks are skipped.
// The size must be a multiple of 8.
const tallyBlock = 4 << 10

// tallyZeros is compared with the data of one disk if the other disk has a hole. No code may change
// its bytes.
var tallyZeros [tallyBlock]byte

// The method add compares n bytes of one disk, the slice a, with n bytes of the other disk, the
// slice b. In both disks these bytes begin at the given offset. A slice that is nil stands for
// zeros.
func (t *tally) add(a, b []byte, off int64, n int) {
	if a != nil && b != nil && bytes.Equal(a[:n], b[:n]) {
		return
	}
	for at := 0; at < n; at += tallyBlock {
		m := min(n-at, tallyBlock)
		x, y := tallyZeros[:m], tallyZeros[:m]
		if a != nil {
			x = a[at : at+m]
		}
		if b != nil {
			y = b[at : at+m]
		}
		if !bytes.Equal(x, y) {
			t.addBlock(x, y, off+int64(at))
		}
	}
}

// addBlock adds a block in which at least one byte differs. The block begins at the given offset,
// and x and y are its contents in the two disks. addBlock compares words of 8 bytes.
func (t *tally) addBlock(x, y []byte, off int64) {
	if t.ranges == 0 {
		i := 0
		for x[i] == y[i] {
			i++
		}
		t.first, t.a, t.b = off+int64(i), x[i], y[i]
	}
	carry := uint64(0) // 0x80 if the byte before the word differs
	if t.ranges > 0 && t.end == off {
		carry = 0x80
	}
	at := 0
	for ; at+8 <= len(x) && at+8 <= len(y); at += 8 {
		carry = t.addWord(binary.LittleEndian.Uint64(x[at:])^binary.LittleEndian.Uint64(y[at:]), carry, off+int64(at))
	}
	if at < len(x) {
		var p, q [8]byte
		copy(p[:], x[at:])
		copy(q[:], y[at:])
		t.addWord(binary.LittleEndian.Uint64(p[:])^binary.LittleEndian.Uint64(q[:]), carry, off+int64(at))
	}
}

// addWord adds a word of 8 bytes, which begins at the given offset. The parameter diff is the XOR
// of the words of both disks, read as little-endian numbers. So a byte of diff is 0 if this byte is
// equal in both disks. The parameter carry is 0x80 if the byte before the word differs between the
// disks, else 0. The result is the carry for the next word.
func (t *tally) addWord(diff, carry uint64, off int64) uint64 {
	// In each byte of the variable differ, the highest bit is set if the byte of diff at the same
	// place is not 0. All other bits of differ are 0.
	const low = 0x7F7F7F7F7F7F7F7F
	differ := (diff&low + low | diff) &^ low
	if differ == 0 {
		return 0
	}
	// A range begins at each byte that differs between the disks if the byte before it is equal in
	// both disks.
	t.ranges += int64(bits.OnesCount64(differ &^ (differ<<8 | carry)))
	t.bytes += int64(bits.OnesCount64(differ))
	t.end = off + 8 - int64(bits.LeadingZeros64(differ)/8)
	return differ >> 56
}
