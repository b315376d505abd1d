package nfcbudget

// Unit is the number of bytes that the size of a buffer is a multiple of.
const Unit = 64 << 10

// Buffers are the memory that a host reserves for each connection: Count buffers of Size
// bytes.
type Buffers struct {
	Size  int64 // bytes of one buffer, a multiple of Unit
	Count int
}

// Bytes returns the number of bytes of all buffers of a connection.
func (b Buffers) Bytes() int64 { return b.Size * int64(b.Count) }

// Halved returns the next smaller buffers, or false if there are none. It halves the size
// first, and the count only if the size is minimal, because smaller buffers reduce the
// speed only if the network is slow.
func (b Buffers) Halved() (smaller Buffers, ok bool) {
	switch {
	case b.Size >= 2*Unit:
		return Buffers{b.Size / 2 / Unit * Unit, b.Count}, true
	case b.Count >= 2:
		return Buffers{b.Size, b.Count / 2}, true
	}
	return b, false
}
