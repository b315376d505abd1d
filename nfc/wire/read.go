package wire

import "fmt"

const (
	// ReadSize is the size of the payload of a Read and of a Fragment, in bytes.
	ReadSize = 44
	// MaxRead is the maximum length of a Read, in bytes. Hosts of version 7.0.3 answer with no
	// more.
	MaxRead = 1 << 20
	// PackedSlack is the number of bytes by which a compressed fragment may be longer than the
	// buffers of the session.
	PackedSlack = 64 << 10
)

// Compression says how the data of a fragment are compressed.
type Compression uint32

const (
	Plain  Compression = 0
	Zlib   Compression = 1
	FastLZ Compression = 2 // this package cannot decode it
	SkipZ  Compression = 3 // leaves out zeros; see DecodeSkipZ
)

// String returns the name of the compression.
func (c Compression) String() string {
	switch c {
	case Plain:
		return "none"
	case Zlib:
		return "zlib"
	case FastLZ:
		return "fastlz"
	case SkipZ:
		return "skipz"
	}
	return fmt.Sprintf("unknown compression %d", uint32(c))
}

// directionRead is the number that stands for a read in IO requests and their answers.
const directionRead = 1

// A Read is the request to read a part of an open disk.
type Read struct {
	Handle      uint64
	Off         int64       // a multiple of 512 bytes
	Len         int         // bytes, a multiple of 512, at most MaxRead
	Compression Compression // the host may send any fragment without compression
}

// Append appends the frame to b, with op as its opId.
func (r Read) Append(b []byte, op uint32) []byte {
	b = Header{Type: IO, Size: ReadSize, OpID: op}.Append(b)
	var p [ReadSize]byte
	put64(p[:], 0, r.Handle)
	put32(p[:], 8, directionRead)
	put32(p[:], 12, uint32(r.Compression))
	put64(p[:], 16, uint64(r.Off))
	put64(p[:], 24, uint64(r.Len))
	put32(p[:], 32, uint32(r.Len))
	put32(p[:], 36, uint32(r.Len))
	return append(b, p[:]...)
}

// A Fragment is the payload of a part of the answer to a Read. The data follow it.
type Fragment struct {
	Status      uint64      // 0 if the read succeeded
	Compression Compression // of this fragment
	Off         int64       // offset of the request in the disk, in bytes
	RequestLen  uint32      // length of the request in bytes
	Place       uint32      // where the fragment begins, in bytes after Off
	Len         uint32      // length of the fragment after decompression, in bytes
	Packed      uint32      // number of bytes that follow
	Direction   uint32      // 1 in the answer to a read
}

// ParseFragment decodes the payload of an answer to a Read. The caller checks the fields; see
// Check.
func ParseFragment(b *[ReadSize]byte) Fragment {
	return Fragment{
		Status:      u64(b[:], 0),
		Direction:   u32(b[:], 8),
		Compression: Compression(u32(b[:], 12)),
		Off:         int64(u64(b[:], 16)),
		RequestLen:  u32(b[:], 24),
		Place:       u32(b[:], 28),
		Len:         u32(b[:], 32),
		Packed:      u32(b[:], 36),
	}
}

// Check returns a *ProtocolError unless the fragment can be a part of the answer to r, in a session
// with buffers of bufferBytes. It does not check the status. The caller must also check that the
// fragment overlaps no other fragment of the answer.
func (f Fragment) Check(r Read, bufferBytes int) error {
	length, packed := int64(f.Len), int64(f.Packed)
	wrong := func(what string, want, got any) error {
		return violation(nil, fmt.Sprintf("%s %v in an answer to the read of %d bytes at offset %d", what, want, r.Len, r.Off), fmt.Sprintf("%v (%s)", got, f.Fields()))
	}
	switch {
	case f.Direction != directionRead:
		return wrong("the direction", directionRead, f.Direction)
	case f.Off != r.Off:
		return wrong("the offset", r.Off, uint64(f.Off))
	case int64(f.RequestLen) != int64(r.Len):
		return wrong("the length", r.Len, f.RequestLen)
	case length == 0:
		return wrong("a fragment of", "at least 1 byte", "0 bytes")
	case length > int64(bufferBytes):
		return wrong("a fragment of", fmt.Sprintf("at most %d bytes, the size of a buffer,", bufferBytes), length)
	case int64(f.Place)+length > int64(r.Len):
		return wrong("a fragment", "inside the read", fmt.Sprintf("bytes [%d, %d)", f.Place, int64(f.Place)+length))
	case f.Compression != Plain && f.Compression != r.Compression:
		allowed := Plain.String()
		if r.Compression != Plain {
			allowed = fmt.Sprintf("%v or %v", r.Compression, Plain)
		}
		return wrong("the compression", allowed, f.Compression)
	case f.Compression == Plain && packed != length:
		return wrong("an uncompressed fragment with", fmt.Sprintf("%d bytes of data", length), packed)
	case packed == 0 || f.Compression != Plain && packed > int64(bufferBytes)+PackedSlack:
		return wrong("a compressed fragment with", fmt.Sprintf("1 to %d bytes of data", int64(bufferBytes)+PackedSlack), packed)
	}
	return nil
}

// Fields returns all fields of the fragment in words.
func (f Fragment) Fields() string {
	return fmt.Sprintf("status %d, direction %d, compression %v, offset %d, length %d, fragment at %d, fragment length %d, %d bytes follow",
		f.Status, f.Direction, f.Compression, uint64(f.Off), f.RequestLen, f.Place, f.Len, f.Packed)
}

const (
	skipZHeader = 8 // u32 length of the decoded data, u32 zero
	skipZRun    = 8 // u32 offset, u32 length; the bytes of the run follow
)

// EmptySkipZ reports whether src, the data of a fragment with the compression SkipZ, is valid and
// describes n zeros.
func EmptySkipZ(src []byte, n int) bool {
	return len(src) == skipZHeader && uint64(u32(src, 0)) == uint64(n) && u32(src, 4) == 0
}

// DecodeSkipZ decodes the data of a fragment with the compression SkipZ into dst. The data must
// describe exactly len(dst) bytes: runs in ascending order that do not overlap, lie inside dst and
// are not empty, with nothing after the last run. All other bytes of dst become zero. After an
// error the content of dst is undefined.
func DecodeSkipZ(dst, src []byte) error {
	if len(src) < skipZHeader {
		return violation(src, fmt.Sprintf("at least %d bytes of skipz data", skipZHeader), fmt.Sprintf("%d bytes", len(src)))
	}
	if n := u32(src, 0); uint64(n) != uint64(len(dst)) {
		return violation(src, fmt.Sprintf("skipz data for %d bytes", len(dst)), fmt.Sprintf("skipz data for %d bytes", n))
	}
	if v := u32(src, 4); v != 0 {
		return violation(src, "the number 0 at offset 4 of skipz data", fmt.Sprintf("the number %d", v))
	}
	end := 0 // of the last run in dst
	for at := skipZHeader; at < len(src); {
		rest := src[at:]
		if len(rest) < skipZRun {
			return violation(rest, fmt.Sprintf("a skipz run, at least %d bytes, or the end of the data at offset %d", skipZRun, at), fmt.Sprintf("%d bytes", len(rest)))
		}
		off, n := int64(u32(rest, 0)), int64(u32(rest, 4))
		if off < int64(end) || n == 0 || off+n > int64(len(dst)) {
			return violation(rest, fmt.Sprintf("a skipz run of at least 1 byte inside [%d, %d) at offset %d of the data", end, len(dst), at), fmt.Sprintf("the run [%d, %d)", off, off+n))
		}
		if n > int64(len(rest)-skipZRun) {
			return violation(rest, fmt.Sprintf("%d bytes of a skipz run at offset %d of the data", n, at+skipZRun), fmt.Sprintf("%d bytes", len(rest)-skipZRun))
		}
		clear(dst[end:off])
		end = int(off + n)
		copy(dst[off:end], rest[skipZRun:])
		at += skipZRun + int(n)
	}
	clear(dst[end:])
	return nil
}
