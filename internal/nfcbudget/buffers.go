package nfcbudget

// Unit is a number of bytes. The size of each buffer is a multiple of it.
const Unit = 64 << 10

// Buffers say how much memory an ESXi host reserves for a connection: Count buffers of Size
// bytes each.
type Buffers struct {
	Size  int64 // bytes of one buffer, a multiple of Unit
	Count int
}

// Bytes returns the number of bytes of all buffers of a connection together.
func (b Buffers) Bytes() int64 { return b.Size * int64(b.Count) }

// Halved returns buffers that need at most half the memory. ok is false if the buffers cannot be
// smaller. As long as the size of the buffers can be halved, Halved halves the size and keeps
// the number of buffers. The reason is that smaller buffers make a copy slower only on a slow
// network.
func (b Buffers) Halved() (smaller Buffers, ok bool) {
	switch {
	case b.Size >= 2*Unit:
		return Buffers{b.Size / 2 / Unit * Unit, b.Count}, true
	case b.Count >= 2:
		return Buffers{b.Size, b.Count / 2}, true
	}
	return b, false
}
