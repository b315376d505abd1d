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

	// A compressed grain may have up to twice as many bytes as the unpacked grain, plus
	// packedSlack bytes. qemu has the same factor of two. The factor is generous, because
	// deflate makes even data that cannot be compressed only a few bytes larger.
	packedSlack = 1 << 10

	// batchSize is the largest number of bytes of a read that fetches several grains. Larger
	// reads would save little time compared with the time for unpacking, and each reader would
	// need more memory.
	batchSize = 256 << 10
)

// unpacker has the buffers and the decoder that one reader of compressed grains needs.
type unpacker struct {
	packed []byte // compressed bytes, as read from the file
	grain  []byte // a whole unpacked grain, if the disk ends in the middle of it
	inflate.Decoder
}

var unpackers = sync.Pool{New: func() any { return new(unpacker) }}

// maxPacked returns the largest number of bytes that a compressed grain may take in the
// file, including its marker.
func (g *geometry) maxPacked() int64 { return markerSize + 2*g.grainSize + packedSlack }

// unpackAt fills p with the bytes of the extent that begin at the given offset. The file must
// have all grains in which these bytes are. The run r must have the table entries of these
// grains. The first of these grains is grain number i of r.
func (s *sparse) unpackAt(p []byte, off int64, r *run, i int64) error {
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

// unpackPiece fills p with a part of grain g. The part begins at the given offset in the
// unpacked grain. This grain has two numbers: g is its number in the extent, and i is its
// number in the run r. unpackPiece caches the unpacked grain, because the next read is likely
// to need another part of the same grain.
func (s *sparse) unpackPiece(u *unpacker, p []byte, g, offset int64, r *run, i int64) error {
	return s.mem.Piece(p, s.id, g, offset, s.part(g), func(grain []byte) error {
		_, _, err := s.unpackWhole(u, grain, g, r, i)
		return err
	})
}

// unpackWhole unpacks whole grains into p, beginning with grain g of the extent. In the run r,
// this grain has the number i. It always unpacks grain g. It also unpacks the following grains
// as long as they fit into p and lie so close together in the file that one read can fetch all
// of them. It returns the number of bytes of p that it filled, and the number of grains that it
// unpacked.
func (s *sparse) unpackWhole(u *unpacker, p []byte, g int64, r *run, i int64) (n, grains int64, err error) {
	place := func(i int64) int64 { pos, _ := r.place(i); return pos } // sectorEntries: no error
	start := place(i)
	if err := s.checkPlace(start, start+markerSize, g<<s.grainShift); err != nil {
		return 0, 0, err // before anything is read there
	}
	// The length of a compressed grain is not known before the grain is read. But if the next
	// grain of the extent lies after it in the file, the grain must end where the next grain
	// begins, or before.
	end := start
	for last := start; ; {
		n += s.part(g + grains)
		grains++
		next := int64(0)
		if i+grains < r.n {
			next = place(i + grains)
		}
		follows := next > last && next-last <= s.maxPacked() && next <= s.fileSize-markerSize
		switch {
		case !s.marked: // the length of the grain is not recorded
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
		pos := place(i + k)
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
			// The grain is longer than expected, and its end was not read. Read the
			// whole grain.
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

// The method unpack unpacks grain g into dst. If the extent ends within the grain, dst has
// space only for the bytes up to the end of the extent. The grain is in the file at the offset
// pos, and src has bytes of the file that begin there. If src does not have the whole grain,
// unpack returns the number of bytes, counted from pos, that it needs.
func (s *sparse) unpack(u *unpacker, dst, src []byte, g, pos int64) (missing int64, err error) {
	if s.marked {
		lba, size := binary.LittleEndian.Uint64(src), int64(binary.LittleEndian.Uint32(src[8:]))
		if want := uint64(g) * s.grain; lba != want {
			return 0, s.errorf(g, "the marker of the grain says that the grain is at sector %d of the extent, want sector %d: the grain table or the grain is damaged", lba, want)
		}
		if size == 0 || markerSize+size > s.maxPacked() {
			return 0, s.errorf(g, "the marker of the grain has a length of %d compressed bytes, want 1 to %d for a grain of %d bytes", size, s.maxPacked()-markerSize, s.grainSize)
		}
		if end := pos + markerSize + size; end > s.fileSize {
			return 0, s.errorf(g, "the %d compressed bytes of the grain end at offset %d, but the file has %d bytes: the file is truncated", size, end, s.fileSize)
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
		// The extent ends within its last grain, and dst has space only for a part of that
		// grain. The file may have the whole grain. Unpack it, and copy the part.
		u.grain = image.Grow(u.grain, s.grainSize)
		if n, _, err = u.Zlib(u.grain, src); err == nil && n >= len(dst) {
			n = copy(dst, u.grain)
		}
	}
	switch {
	case errors.Is(err, inflate.ErrTooLarge):
		return 0, s.errorf(g, "the grain unpacks to more than %d bytes", s.grainSize)
	case err != nil:
		return 0, s.errorf(g, "the compressed bytes of the grain are damaged: %w", err)
	case n < len(dst):
		return 0, s.errorf(g, "the grain unpacks to %d bytes, want %d", n, len(dst))
	}
	return 0, nil
}
