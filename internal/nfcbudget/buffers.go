package nfcbudget

// Unit is what the size of buffers is a multiple of, in bytes.
const Unit = 64 << 10

// Buffers are what each connection of an NFC transport reserves on the host.
type Buffers struct {
	Size  int64 // bytes, a multiple of 64 KiB
	Count int
}

// Bytes is what they take together.
func (b Buffers) Bytes() int64 { return b.Size * int64(b.Count) }

// Halved returns the next smaller buffers: the size first, which costs speed
// only where the network is slow.
func (b Buffers) Halved() (smaller Buffers, ok bool) {
	switch {
	case b.Size >= 2*Unit:
		return Buffers{b.Size / 2 / Unit * Unit, b.Count}, true
	case b.Count >= 2:
		return Buffers{b.Size, b.Count / 2}, true
	}
	return b, false
}
