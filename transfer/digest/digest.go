// Package digest computes digests of the content of a disk.
//
// [New] returns a [Sum], which gets the content of the disk in ascending order. Ranges of zeros
// are added with [Sum.Zero], and bytes with [Sum.Data]. For hashing in parallel,
// [Algorithm.Hash] fills [Blocks] in other goroutines, and [Sum.Blocks] adds them. [Sum.Value]
// returns the digest. A Sum can be marshalled and continued later.
package digest

import (
	"context"
	"crypto/sha256"
	"encoding"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"hash"

	"github.com/vddkcp/vddkcp/internal/zero"
)

// Algorithm names a way to compute a digest of 32 bytes.
type Algorithm string

const (
	// Blksum is a digest that hashes blocks of 64 KiB. It is the SHA-256 of two things: the
	// SHA-256 of each block in order (the last block may be shorter), and then the size of the
	// disk in bytes as a little-endian 64-bit number. test/blkhash.py of nirs/blkhash defines
	// it. blksum (since March 2024) and nbdcopy --blkhash print the same value. The hash of a
	// block of zeros is a constant, so holes cost almost nothing.
	Blksum Algorithm = "blksum"
	// SHA256 is the SHA-256 of the content, which sha256sum prints for a raw disk. Holes cost
	// as much as data, and the digest cannot be computed in parallel.
	SHA256 Algorithm = "sha256"
)

// Parse returns the algorithm with the name s.
func Parse(s string) (Algorithm, error) {
	switch a := Algorithm(s); a {
	case Blksum, SHA256:
		return a, nil
	}
	return "", fmt.Errorf("unknown digest algorithm %q, want %s or %s", s, Blksum, SHA256)
}

// BlockSize is the size of the blocks of Blksum, in bytes.
const BlockSize = 64 << 10

// zeros is a block of zeros, from which hashes are computed. No code may change its bytes.
var zeros [BlockSize]byte

// zeroHash is the SHA-256 of a block of zeros.
const zeroHash = "\xde\x2f\x25\x60\x64\xa0\xaf\x79\x77\x47\xc2\xb9\x75\x05\xdc\x0b" +
	"\x9f\x3d\xf0\xde\x4f\x48\x9e\xac\x73\x1c\x23\xae\x9c\xa9\xcc\x31"

// Sum computes a digest. It gets the content of a disk in ascending order, from offset 0,
// without gaps. A Sum is made by New, or by calling UnmarshalBinary on the zero value. It is
// not safe for concurrent use.
type Sum struct {
	algorithm Algorithm
	size      int64 // bytes added so far

	// outer is the hash that becomes the digest. For SHA256 it hashes the content, and for
	// Blksum the hashes of whole blocks.
	outer hash.Hash
	// inner is used only for Blksum. It hashes the incomplete last block, which has size %
	// BlockSize bytes. While innerZeros is true, this block has only zeros so far, and inner is not
	// in use.
	inner      hash.Hash
	innerZeros bool

	hash      [sha256.Size]byte // scratch
	zeroBatch []byte            // zeroHash, zeroBatch times
}

// New returns a Sum of an empty disk.
func New(a Algorithm) *Sum {
	s := new(Sum)
	s.reset(a)
	return s
}

// zeroBatch is the largest number of zero blocks that are added to the outer hash
// with one call.
const zeroBatch = 512

// The method reset makes s a Sum of an empty disk.
func (s *Sum) reset(a Algorithm) {
	*s = Sum{algorithm: a, outer: sha256.New(), innerZeros: true}
	if a == Blksum {
		s.inner = sha256.New()
		s.zeroBatch = make([]byte, 0, zeroBatch*len(zeroHash))
		for range zeroBatch {
			s.zeroBatch = append(s.zeroBatch, zeroHash...)
		}
	}
}

// Algorithm returns the algorithm of the digest.
func (s *Sum) Algorithm() Algorithm { return s.algorithm }

// Size returns the number of bytes that were added so far.
func (s *Sum) Size() int64 { return s.size }

// The method partial returns the number of bytes in the incomplete last block.
func (s *Sum) partial() int { return int(s.size % BlockSize) }

// Zero adds n zero bytes.
func (s *Sum) Zero(n int64) {
	// ZeroContext fails only if the context ends, which this context never does.
	_ = s.ZeroContext(context.Background(), n)
}

// ZeroContext adds n zero bytes and checks ctx every few milliseconds. If ctx ends, it
// returns the cause, and the Sum has only a part of the zeros.
func (s *Sum) ZeroContext(ctx context.Context, n int64) error {
	piece := int64(8 << 20)
	if s.algorithm == Blksum {
		piece = 16 << 30
	}
	for n > 0 {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		part := min(n, piece)
		s.zero(part)
		n -= part
	}
	return nil
}

// The method zero adds n zero bytes.
func (s *Sum) zero(n int64) {
	if s.algorithm != Blksum {
		s.size += n
		for n > 0 {
			part := min(n, int64(len(zeros)))
			s.outer.Write(zeros[:part])
			n -= part
		}
		return
	}
	if part := min(n, BlockSize-int64(s.partial())); s.partial() > 0 {
		s.innerZero(int(part))
		n -= part
	}
	for blocks := n / BlockSize; blocks > 0; {
		part := min(blocks, zeroBatch)
		s.outer.Write(s.zeroBatch[:part*int64(len(zeroHash))])
		s.size += part * BlockSize
		blocks -= part
	}
	if part := n % BlockSize; part > 0 {
		s.innerZero(int(part))
	}
}

// innerZero adds n zero bytes. They must all lie in one block of BlockSize bytes.
func (s *Sum) innerZero(n int) {
	if !s.innerZeros {
		s.inner.Write(zeros[:n])
	}
	s.advance(n)
}

// The method advance counts n bytes as added. They must all lie in one block of BlockSize bytes. If
// the block is then complete, advance adds the hash of the block to the outer hash.
func (s *Sum) advance(n int) {
	s.size += int64(n)
	if s.partial() > 0 {
		return
	}
	if s.innerZeros {
		s.outer.Write(s.zeroBatch[:len(zeroHash)])
		return
	}
	s.inner.Sum(s.hash[:0])
	s.outer.Write(s.hash[:])
	s.innerZeros = true
}

// Data adds the bytes p. It does not keep p.
func (s *Sum) Data(p []byte) {
	if s.algorithm != Blksum {
		s.outer.Write(p)
		s.size += int64(len(p))
		return
	}
	for len(p) > 0 {
		n := min(len(p), BlockSize-s.partial())
		s.part(p[:n])
		p = p[n:]
	}
}

// The method part adds the bytes p. They must all lie in one block of BlockSize bytes.
func (s *Sum) part(p []byte) {
	switch {
	case zero.Is(p):
		s.innerZero(len(p))
	case len(p) == BlockSize:
		s.hash = sha256.Sum256(p)
		s.outer.Write(s.hash[:])
		s.size += BlockSize
	default:
		if s.innerZeros {
			s.inner.Reset()
			s.inner.Write(zeros[:s.partial()])
			s.innerZeros = false
		}
		s.inner.Write(p)
		s.advance(len(p))
	}
}

// Blocks holds those hashes of a piece of a disk that do not depend on the content before the
// piece. The zero value is ready for Hash. Using a Blocks again avoids allocations.
type Blocks struct {
	algorithm  Algorithm
	off        int64
	head, tail []byte // bytes of incomplete blocks at both ends
	hashes     []byte // of the complete blocks between head and tail
}

// Hash fills dst with the hashes of p, which is the content of the disk from the given offset on.
// It is safe for concurrent use with different dst. dst refers to p, so p must not change until dst
// is passed to Sum.Blocks. For Blksum, Hash hashes the blocks that lie completely in p, and
// Sum.Blocks later hashes the incomplete blocks at both ends. For SHA256, Sum.Blocks hashes all of
// p.
func (a Algorithm) Hash(off int64, p []byte, dst *Blocks) {
	*dst = Blocks{algorithm: a, off: off, hashes: dst.hashes[:0]}
	if a != Blksum {
		dst.head = p
		return
	}
	head := min(len(p), int((BlockSize-off%BlockSize)%BlockSize))
	dst.head, p = p[:head], p[head:]
	for ; len(p) >= BlockSize; p = p[BlockSize:] {
		if block := p[:BlockSize]; zero.Is(block) {
			dst.hashes = append(dst.hashes, zeroHash...)
		} else {
			h := sha256.Sum256(block)
			dst.hashes = append(dst.hashes, h[:]...)
		}
	}
	dst.tail = p
}

// Blocks adds the piece of the disk that b describes. It panics if the piece does not begin at
// s.Size, or if it was hashed for another algorithm than that of s.
func (s *Sum) Blocks(b *Blocks) {
	if b.algorithm != s.algorithm || b.off != s.size {
		panic(fmt.Sprintf("digest: a %s piece at offset %d was added to a %s sum of %d bytes", b.algorithm, b.off, s.algorithm, s.size))
	}
	s.Data(b.head)
	if len(b.hashes) > 0 {
		s.outer.Write(b.hashes)
		s.size += int64(len(b.hashes)/sha256.Size) * BlockSize
	}
	s.Data(b.tail)
}

// Value returns the digest of the bytes that were added so far, in lower-case hexadecimal
// digits. More bytes can be added afterwards.
func (s *Sum) Value() string {
	if s.algorithm != Blksum {
		return hex.EncodeToString(s.outer.Sum(nil))
	}
	outer, err := s.outer.(hash.Cloner).Clone()
	if err != nil {
		panic("digest: cannot clone SHA-256: " + err.Error()) // the standard library's SHA-256 never refuses
	}
	if n := s.partial(); n > 0 && s.innerZeros {
		h := sha256.Sum256(zeros[:n])
		outer.Write(h[:])
	} else if n > 0 {
		outer.Write(s.inner.Sum(nil))
	}
	var size [8]byte
	binary.LittleEndian.PutUint64(size[:], uint64(s.size))
	outer.Write(size[:])
	return hex.EncodeToString(outer.Sum(nil))
}

// A marshalled Sum consists of these fields: the magic, the first letter of the algorithm, a
// byte that is 1 if the inner hash is in use and else 0, the size as a big-endian 64-bit
// number, the outer hash, and the inner hash if it is in use. The hashes are in the format in
// which package crypto/sha256 marshals them.
const (
	magic      = "vddkcp digest 1\n"
	headerSize = len(magic) + 2 + 8
)

// MarshalBinary implements encoding.BinaryMarshaler.
func (s *Sum) MarshalBinary() ([]byte, error) {
	b := append([]byte(magic), s.algorithm[0], 0)
	if !s.innerZeros {
		b[len(b)-1] = 1
	}
	b = binary.BigEndian.AppendUint64(b, uint64(s.size))
	b, err := s.outer.(encoding.BinaryAppender).AppendBinary(b)
	if err == nil && !s.innerZeros {
		b, err = s.inner.(encoding.BinaryAppender).AppendBinary(b)
	}
	return b, err
}

// UnmarshalBinary implements encoding.BinaryUnmarshaler. It gives s the state that was
// marshalled. After an error s must not be used.
func (s *Sum) UnmarshalBinary(b []byte) error {
	if len(b) < headerSize || string(b[:len(magic)]) != magic {
		return errors.New("digest state: unknown format or version")
	}
	letter, inner, size := b[len(magic)], b[len(magic)+1], int64(binary.BigEndian.Uint64(b[headerSize-8:]))
	b = b[headerSize:]
	switch letter {
	case Blksum[0]:
		s.reset(Blksum)
	case SHA256[0]:
		s.reset(SHA256)
	default:
		return fmt.Errorf("digest state: unknown algorithm %q, want %q or %q", letter, Blksum[0], SHA256[0])
	}
	s.size = size
	s.innerZeros = inner == 0
	if size < 0 || inner > 1 || !s.innerZeros && (s.algorithm != Blksum || s.partial() == 0) {
		return fmt.Errorf("digest state: the flag that says whether a hash of an incomplete last block follows is %d, but a %s digest of %d bytes of data cannot have this value", inner, s.algorithm, size)
	}
	parts := 1
	if !s.innerZeros {
		parts = 2
	}
	if len(b)%parts != 0 {
		return fmt.Errorf("digest state: the %d bytes after the header cannot be divided into %d hashes of equal length", len(b), parts)
	}
	n := len(b) / parts
	if err := s.outer.(encoding.BinaryUnmarshaler).UnmarshalBinary(b[:n]); err != nil {
		return fmt.Errorf("digest state: cannot restore the outer hash: %w", err)
	}
	if !s.innerZeros {
		if err := s.inner.(encoding.BinaryUnmarshaler).UnmarshalBinary(b[n:]); err != nil {
			return fmt.Errorf("digest state: cannot restore the inner hash: %w", err)
		}
	}
	return nil
}
