// Package zero finds zeros in memory.
package zero

import "bytes"

// Is reports whether all of b is zero. An empty b is.
func Is(b []byte) bool {
	// A block is zero when its first byte is and each byte equals the one
	// before it; bytes.Equal compares at memory speed.
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b[:len(b)-1], b[1:])
}
