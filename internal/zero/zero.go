// Package zero detects memory that is all zeros.
package zero

import "bytes"

// Is reports whether all bytes of b are zero. It returns true for an empty b.
func Is(b []byte) bool {
	// All bytes are zero if the first byte is zero and each byte equals the previous
	// one. bytes.Equal makes that comparison at the speed of memory.
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[:len(b)-1], b[1:])
}
