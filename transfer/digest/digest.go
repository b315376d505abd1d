// Package digest computes digests of the content of a disk.
//
// One [Sum] folds the content in ascending order: ranges of zeros, plain
// bytes, and, for [Blksum], blocks that other goroutines hashed in any order
// with [Algorithm.Hash].
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

// Algorithm is a way to compute a digest. Every digest is 32 bytes long.
type Algorithm string

const (
	// Blksum is SHA-256 of the SHA-256 of each block of 64 KiB in order (a
	// shorter last block as it is), then the size in bytes as a little-endian
	// 64-bit number. The rule is test/blkhash.py's of nirs/blkhash; blksum
	// (since March 2024) and nbdcopy --blkhash print the same. A block of
	// zeros has a constant hash, so that holes cost almost nothing.
	Blksum Algorithm = "blksum"
	// SHA256 is plain SHA-256 of the content, what sha256sum prints for a raw
	// disk. Holes cost as much as data, and it can't be computed in parallel.
	SHA256 Algorithm = "sha256"
)

// Parse returns the algorithm of that name.
func Parse(s string) (Algorithm, error) {
	switch a := Algorithm(s); a {
	case Blksum, SHA256:
		return a, nil
	}
	return "", fmt.Errorf("digest algorithm %q: want %s or %s", s, Blksum, SHA256)
}

// BlockSize is Blksum's, in bytes.
const BlockSize = 64 << 10

// zeros is a block of zeros, to be hashed. It is never written.
var zeros [BlockSize]byte

// zeroHash is its SHA-256.
const zeroHash = "\xde\x2f\x25\x60\x64\xa0\xaf\x79\x77\x47\xc2\xb9\x75\x05\xdc\x0b" +
	"\x9f\x3d\xf0\xde\x4f\x48\x9e\xac\x73\x1c\x23\xae\x9c\xa9\xcc\x31"

// Sum is a digest in the making. It is for one goroutine, which gives it a
// disk's content in ascending order, from offset 0, without gaps. New makes
// one, and so does UnmarshalBinary of a zero Sum.
type Sum struct {
	algorithm Algorithm
	size      int64 // folded so far, bytes

	outer hash.Hash // SHA256: of the content; Blksum: of the hashes of whole blocks
	// The part of a block at the end of what was folded, size % BlockSize
	// bytes: as long as it is all zeros it is not in inner.
	inner      hash.Hash
	innerZeros bool

	hash      [sha256.Size]byte // scratch
	zeroBatch []byte            // many times zeroHash
}

// New returns a Sum of an empty disk.
func New(a Algorithm) *Sum {
	s := new(Sum)
	s.reset(a)
	return s
}

// How many zero blocks go into the outer hash with one call.
const zeroBatch = 512

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

// Algorithm is the one that New was called with.
func (s *Sum) Algorithm() Algorithm { return s.algorithm }

// Size is how many bytes were folded.
func (s *Sum) Size() int64 { return s.size }

// partial is how much of a block was begun.
func (s *Sum) partial() int { return int(s.size % BlockSize) }

// Zero folds n zeros.
func (s *Sum) Zero(n int64) {
	// It ends with its context only.
	_ = s.ZeroContext(context.Background(), n)
}

// ZeroContext folds n zeros and looks for the end of ctx every few
// milliseconds. After an error, ctx's cause, the Sum holds a part of them.
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

// innerZero folds n zeros that end in the block that they begin in.
func (s *Sum) innerZero(n int) {
	if !s.innerZeros {
		s.inner.Write(zeros[:n])
	}
	s.advance(n)
}

// advance counts n bytes, which end in the block that they begin in, and
// closes that block when it is whole.
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

// Data folds p, which it does not keep.
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

// part folds p, which ends in the block that it begins in.
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

// Blocks is a piece of a disk's content as far as a digest can be computed
// without what lies before it. The zero value is ready for Hash, and can be
// used again and again: then nothing is allocated.
type Blocks struct {
	algorithm  Algorithm
	off        int64
	head, tail []byte // no whole blocks
	hashes     []byte // of the whole blocks between them
}

// Hash makes dst the piece p, which lies at off in the disk. It is safe for
// concurrent use with different dst. Dst refers to p until Sum.Blocks has
// folded it: p must stay as it is so long. For Blksum that hashes every block
// that lies in p as a whole, and the rest (less than two blocks) is hashed when
// it is folded; for SHA256 all of it is.
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

// Blocks folds a piece, which must begin where the Sum ends and be of its
// algorithm: anything else is a mistake of the caller's, and panics.
func (s *Sum) Blocks(b *Blocks) {
	if b.algorithm != s.algorithm || b.off != s.size {
		panic(fmt.Sprintf("digest: a %s piece of offset %d folded into a %s sum of %d bytes", b.algorithm, b.off, s.algorithm, s.size))
	}
	s.Data(b.head)
	if len(b.hashes) > 0 {
		s.outer.Write(b.hashes)
		s.size += int64(len(b.hashes)/sha256.Size) * BlockSize
	}
	s.Data(b.tail)
}

// Value returns the digest of what was folded so far, as lower case
// hexadecimal digits. More can be folded afterwards.
func (s *Sum) Value() string {
	if s.algorithm != Blksum {
		return hex.EncodeToString(s.outer.Sum(nil))
	}
	outer, err := s.outer.(hash.Cloner).Clone()
	if err != nil {
		panic("digest: SHA-256 can't be cloned: " + err.Error()) // only a hardware key store could refuse
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

// A marshalled Sum: the magic, the algorithm's first letter, 1 where the last
// part of a block is in the inner hash, the size (big-endian), the outer hash
// and, where it is used, the inner one, as package sha256 marshals them.
const (
	magic      = "vddkcp digest 1\n"
	headerSize = len(magic) + 2 + 8
)

// MarshalBinary is encoding.BinaryMarshaler's.
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

// UnmarshalBinary is encoding.BinaryUnmarshaler's: s goes on where the
// marshalled Sum was. After an error s is not usable.
func (s *Sum) UnmarshalBinary(b []byte) error {
	if len(b) < headerSize || string(b[:len(magic)]) != magic {
		return errors.New("digest state: not one of this version")
	}
	letter, inner, size := b[len(magic)], b[len(magic)+1], int64(binary.BigEndian.Uint64(b[headerSize-8:]))
	b = b[headerSize:]
	switch letter {
	case Blksum[0]:
		s.reset(Blksum)
	case SHA256[0]:
		s.reset(SHA256)
	default:
		return fmt.Errorf("digest state: algorithm %q: want %q or %q", letter, Blksum[0], SHA256[0])
	}
	s.size = size
	s.innerZeros = inner == 0
	if size < 0 || inner > 1 || !s.innerZeros && (s.algorithm != Blksum || s.partial() == 0) {
		return fmt.Errorf("digest state: %s of %d bytes with inner %d is no state", s.algorithm, size, inner)
	}
	parts := 1
	if !s.innerZeros {
		parts = 2
	}
	if len(b)%parts != 0 {
		return fmt.Errorf("digest state: %d bytes of %d hashes", len(b), parts)
	}
	n := len(b) / parts
	if err := s.outer.(encoding.BinaryUnmarshaler).UnmarshalBinary(b[:n]); err != nil {
		return fmt.Errorf("digest state: %w", err)
	}
	if !s.innerZeros {
		if err := s.inner.(encoding.BinaryUnmarshaler).UnmarshalBinary(b[n:]); err != nil {
			return fmt.Errorf("digest state: inner hash: %w", err)
		}
	}
	return nil
}
