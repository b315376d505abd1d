// Package zero detects memory that contains only zeros.
package zero

import "bytes"

// Is reports whether all bytes of b are zero. It returns true if b is empty.
func Is(b []byte) bool {
	// All bytes are zero if the first byte is zero and each byte equals the byte before it.
	// bytes.Equal compares b with itself, shifted by one byte, as fast as memory can be read.
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[:len(b)-1], b[1:])
}
