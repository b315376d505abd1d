// Package wire encodes and decodes what a client and an ESXi host send each other on port 902, the
// port of the protocol NFC. It does no I/O: package nfc reads and writes the connection.
//
// A connection begins with lines of text ([ParseBanner], [ParseReply]). Nine messages of 264 bytes
// follow ([Message]), and after them frames ([Header], [Request]). A frame has a header, a payload,
// and data that the size in the header does not count. The answer to a [Read] is one or more
// frames, each with a [Fragment] as its payload.
//
// All numbers are little endian. A host can send any length in a message or frame, so the functions
// of this package never allocate memory of such a length, and check lengths against limits. An
// error is a [*ProtocolError]. VMware has not published the protocol: bytes without a known meaning
// are zero in what a client sends, and are ignored, but shown in traces, in what a host sends.
package wire

import (
	"encoding/binary"
	"fmt"
	"strings"
)

// maxHex is the number of bytes that errors and traces show.
const maxHex = 64

// A ProtocolError says that a host sent something else than the protocol requires.
type ProtocolError struct {
	Want, Got string
	Bytes     []byte // the first bytes of what the host sent, at most 64, or nil
}

// Error returns what was expected, what was found, and the bytes in hexadecimal.
func (e *ProtocolError) Error() string {
	text := "expected " + e.Want + ", found " + e.Got
	if len(e.Bytes) > 0 {
		text += " (bytes " + Hex(e.Bytes) + ")"
	}
	return text
}

// The function violation returns a ProtocolError with a copy of the first bytes of b.
func violation(b []byte, want, got string) *ProtocolError {
	if len(b) == 0 {
		return &ProtocolError{Want: want, Got: got}
	}
	return &ProtocolError{Want: want, Got: got, Bytes: append([]byte(nil), b[:min(len(b), maxHex)]...)}
}

// Hex returns the first 64 bytes of b in hexadecimal, separated by spaces. If b has more bytes,
// "..." follows.
func Hex(b []byte) string {
	if len(b) > maxHex {
		return fmt.Sprintf("% x...", b[:maxHex])
	}
	return fmt.Sprintf("% x", b)
}

func u32(b []byte, at int) uint32 { return binary.LittleEndian.Uint32(b[at:]) }
func u64(b []byte, at int) uint64 { return binary.LittleEndian.Uint64(b[at:]) }

func put32(b []byte, at int, v uint32) { binary.LittleEndian.PutUint32(b[at:], v) }
func put64(b []byte, at int, v uint64) { binary.LittleEndian.PutUint64(b[at:], v) }

// checkText checks the length of a text that a host announced. b contains the message with the
// length.
func checkText(b []byte, what string, length uint32) (int, error) {
	if length > MaxText {
		return 0, violation(b, fmt.Sprintf("%s of at most %d bytes", what, MaxText), fmt.Sprintf("a length of %d bytes", length))
	}
	return int(length), nil
}

// A field is a number in a message or payload, for traces.
type field struct {
	name string
	at   int  // offset in bytes
	wide bool // the number has 8 bytes; otherwise 4
	hex  bool // the number is shown in hexadecimal
}

// describe returns the given fields of b in words. After them it lists the bytes outside these
// fields that are not zero, except for the first skip bytes of b. Fields beyond the end of b are
// left out.
func describe(b []byte, skip int, fields []field) string {
	var words []string
	known := make([]bool, len(b))
	for i := range skip {
		known[i] = true
	}
	for _, f := range fields {
		size := 4
		if f.wide {
			size = 8
		}
		if f.at+size > len(b) {
			continue
		}
		v := uint64(u32(b, f.at))
		if f.wide {
			v = u64(b, f.at)
		}
		format := "%s %d"
		if f.hex {
			format = "%s %#x"
		}
		words = append(words, fmt.Sprintf(format, f.name, v))
		for i := range size {
			known[f.at+i] = true
		}
	}
	if rest := unknown(b, known); rest != "" {
		words = append(words, rest)
	}
	return strings.Join(words, ", ")
}

// The function unknown lists the bytes of b that are not zero and not known, in groups of up to 4
// bytes with their offsets. It shows at most 64 bytes.
func unknown(b []byte, known []bool) string {
	var groups []string
	shown := 0
	for at := 0; at < len(b); at += 4 {
		end := min(at+4, len(b))
		differs := false
		for i := at; i < end; i++ {
			differs = differs || b[i] != 0 && !known[i]
		}
		if !differs {
			continue
		}
		if shown += end - at; shown > maxHex {
			groups = append(groups, "...")
			break
		}
		groups = append(groups, fmt.Sprintf("@%d: %x", at, b[at:end]))
	}
	if len(groups) == 0 {
		return ""
	}
	return "unknown bytes " + strings.Join(groups, " ")
}
