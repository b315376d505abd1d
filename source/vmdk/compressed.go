package vmdk

import (
	"encoding/binary"
	"errors"
	"sync"

	"github.com/vddkcp/vddkcp/internal/inflate"

	"github.com/vddkcp/vddkcp/internal/image"
)

const (
	markerSize = 12 // lba uint64, size uint32; then the compressed bytes

	// packedSlack is by how much more than twice its size a grain may grow by
	// compression. Twice is what qemu reads; deflate needs a few bytes.
	packedSlack = 1 << 10

	// batchSize is how many compressed bytes are read at once where several
	// grains are wanted. More would save nothing beside the time that unpacking
	// takes, and each reader has as much memory.
	batchSize = 256 << 10
)

// unpacker is the scratch memory of one reader of compressed grains.
type unpacker struct {
	packed []byte // compressed bytes, as read
	grain  []byte // a whole grain, where the disk ends in the middle of it
	inflate.Decoder
}

var unpackers = sync.Pool{New: func() any { return new(unpacker) }}

// maxPacked is the most bytes that a grain may take in the file.
func (s *sparse) maxPacked() int64 { return markerSize + 2*s.grainSize + packedSlack }

// part is how many bytes of grain g are in the disk: all, but for the last.
func (s *sparse) part(g int64) int64 { return min(s.grainSize, s.size-g<<s.grainShift) }

// unpackAt fills p with the bytes at off, which lie in grains that have data:
// those of r from entry i on.
func (s *sparse) unpackAt(p []byte, off int64, r run, i int64) error {
	u := unpackers.Get().(*unpacker)
	defer unpackers.Put(u)
	for len(p) > 0 {
		g, in := off>>s.grainShift, off&(s.grainSize-1)
		n := min(int64(len(p)), s.part(g)-in)
		grains := int64(1)
		var err error
		if n < s.part(g) {
			err = s.unpackPiece(u, p[:n], g, in, r, i)
		} else {
			n, grains, err = s.unpackWhole(u, p, g, r, i)
		}
		if err != nil {
			return err
		}
		p, off, i = p[n:], off+n, i+grains
	}
	return nil
}

// unpackPiece fills p with the bytes at in of grain g, and keeps the grain: the
// next piece is likely to be of it.
func (s *sparse) unpackPiece(u *unpacker, p []byte, g, in int64, r run, i int64) error {
	return s.mem.Piece(p, s.id, g, in, s.part(g), func(grain []byte) error {
		_, _, err := s.unpackWhole(u, grain, g, r, i)
		return err
	})
}

// unpackWhole fills p, but for a piece of a grain at its end, with grains from
// g on, entry i of r. It takes as many as lie closely together in the file and
// can be read at once, at least one, and returns their bytes in the disk and
// their number.
func (s *sparse) unpackWhole(u *unpacker, p []byte, g int64, r run, i int64) (n, grains int64, err error) {
	start := int64(r.entry(i)) * sectorSize
	if err := s.checkPlace(start, start+markerSize, g<<s.grainShift); err != nil {
		return 0, 0, err // before anything is read there
	}
	// The entry of the next grain, where it follows in the file, says where
	// this one ends at the latest.
	end := start
	for last := start; ; {
		n += s.part(g + grains)
		grains++
		next := int64(0)
		if i+grains < r.n {
			next = int64(r.entry(i+grains)) * sectorSize
		}
		follows := next > last && next-last <= s.maxPacked() && next <= s.fileSize-markerSize
		switch {
		case s.flags&flagMarkers == 0: // nothing but the next grain says how long
			end = min(last+s.maxPacked(), s.fileSize)
		case follows:
			end = next
		default:
			end = min(last+markerSize+s.grainSize+packedSlack, s.fileSize)
		}
		if !follows || next+markerSize+s.grainSize-start > batchSize ||
			n == int64(len(p)) || s.part(g+grains) > int64(len(p))-n {
			break
		}
		last = next
	}
	u.packed = image.Grow(u.packed, end-start)
	if err := image.ReadFull(s.file, u.packed, start); err != nil {
		return 0, 0, s.errorf(g, "%w", err)
	}
	done := int64(0)
	for k := range grains {
		pos := int64(r.entry(i+k)) * sectorSize
		if err := s.checkPlace(pos, pos+markerSize, (g+k)<<s.grainShift); err != nil {
			return 0, 0, err
		}
		dst := p[done : done+s.part(g+k)]
		missing, err := s.unpack(u, dst, u.packed[pos-start:], g+k, pos)
		if err != nil {
			return 0, 0, err
		}
		done += int64(len(dst))
		if missing > 0 {
			// It is longer than most, and the rest was not read.
			u.packed = image.Grow(u.packed, missing)
			if err := image.ReadFull(s.file, u.packed, pos); err != nil {
				return 0, 0, s.errorf(g+k, "%w", err)
			}
			if _, err := s.unpack(u, dst, u.packed, g+k, pos); err != nil {
				return 0, 0, err
			}
			return done, k + 1, nil
		}
	}
	return n, grains, nil
}

// unpack fills dst, the part of grain g that is in the disk, from src, what the
// file has at pos and after. Where src is too short it returns how many bytes
// from pos on it needs.
func (s *sparse) unpack(u *unpacker, dst, src []byte, g, pos int64) (missing int64, err error) {
	if s.flags&flagMarkers != 0 {
		lba, size := binary.LittleEndian.Uint64(src), int64(binary.LittleEndian.Uint32(src[8:]))
		if want := uint64(g) * s.grain; lba != want {
			return 0, s.errorf(g, "its marker is of sector %d, want %d: the grain table or the grain is damaged", lba, want)
		}
		if size == 0 || markerSize+size > s.maxPacked() {
			return 0, s.errorf(g, "its marker gives %d compressed bytes, want 1 to %d for a grain of %d bytes", size, s.maxPacked()-markerSize, s.grainSize)
		}
		if end := pos + markerSize + size; end > s.fileSize {
			return 0, s.errorf(g, "its %d compressed bytes end at %d, the file has %d: it is truncated", size, end, s.fileSize)
		}
		if err := s.checkPlace(pos, pos+markerSize+size, g<<s.grainShift); err != nil {
			return 0, err
		}
		if markerSize+size > int64(len(src)) {
			return markerSize + size, nil
		}
		src = src[markerSize : markerSize+size]
	}
	n, _, err := u.Zlib(dst, src)
	if errors.Is(err, inflate.ErrTooLarge) && int64(len(dst)) < s.grainSize {
		// The last grain may be whole, though the disk ends in it.
		u.grain = image.Grow(u.grain, s.grainSize)
		if n, _, err = u.Zlib(u.grain, src); err == nil && n >= len(dst) {
			n = copy(dst, u.grain)
		}
	}
	switch {
	case errors.Is(err, inflate.ErrTooLarge):
		return 0, s.errorf(g, "it unpacks to more than a grain of %d bytes", s.grainSize)
	case err != nil:
		return 0, s.errorf(g, "its compressed bytes are damaged: %w", err)
	case n < len(dst):
		return 0, s.errorf(g, "it unpacks to %d bytes, want %d", n, len(dst))
	}
	return 0, nil
}
