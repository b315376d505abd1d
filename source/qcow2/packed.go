package qcow2

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/inflate"
)

// batchSize is the largest number of bytes of a read that fetches several compressed
// clusters. Larger reads would save little time compared with the time for unpacking, and
// each reader would need more memory.
const batchSize = 256 << 10

// unpacker has the buffers and decoders that one reader of compressed clusters needs.
type unpacker struct {
	packed  []byte // compressed bytes, as read from the file
	cluster []byte // a whole unpacked cluster, if the disk ends in the middle of it
	inflate.Decoder
	zstd *zstd.Decoder
}

var unpackers = sync.Pool{New: func() any { return new(unpacker) }}

// The method part returns the number of bytes of cluster c that belong to the disk. For
// the last cluster this may be less than the size of a cluster.
func (d *Disk) part(c int64) int64 { return min(d.cluster, d.size-c<<d.clusterShift) }

// The method place returns the range [start, end) of the file, in bytes, that holds a
// compressed cluster. The range may be too long by up to a sector, because the table
// entry has the length in sectors (section "Compressed Clusters Descriptor" of the
// specification).
func (d *Disk) place(entry uint64) (start, end int64) {
	x := 62 - (d.clusterShift - 8)
	start = int64(entry & (1<<x - 1))
	sectors := int64(entry&(1<<62-1)) >> x
	return start, start&^511 + (sectors+1)*512
}

// checkPacked returns an error if the compressed bytes of cluster c cannot begin at the
// given offset in the file, because this offset is past the end of the file, or in the
// header or a table.
func (d *Disk) checkPacked(c, offset int64) error {
	switch {
	case offset>>56 != 0:
		return d.errorAt(c, "the compressed bytes are at offset %#x, want less than 64 PiB: the L2 table is damaged", offset)
	case offset >= d.fileSize:
		return d.errorAt(c, "the compressed bytes are at offset %d, but the file has %d bytes: the file is truncated or damaged", offset, d.fileSize)
	case d.inMetadata(offset, offset+1):
		return d.errorAt(c, "the compressed bytes are at offset %d, in %s: the L2 table is damaged", offset, d.metadataAt(offset, offset+1))
	}
	return nil
}

// unpackAt fills p with the bytes of the disk that begin at the given offset. All of
// these bytes must lie in compressed clusters, and r must have the table entries of these
// clusters.
func (d *Disk) unpackAt(p []byte, off int64, r *run) error {
	u := unpackers.Get().(*unpacker)
	defer unpackers.Put(u)
	for len(p) > 0 {
		c, in := off>>d.clusterShift, off&(d.cluster-1)
		n := min(int64(len(p)), d.part(c)-in)
		var err error
		if n < d.part(c) {
			err = d.unpackPiece(u, p[:n], c, in, r)
		} else {
			n, err = d.unpackWhole(u, p, c, r)
		}
		if err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}

// unpackPiece fills p with a part of cluster c. The part begins at the given offset in
// the unpacked cluster. unpackPiece caches the unpacked cluster, because the next read
// is likely to need another part of the same cluster.
func (d *Disk) unpackPiece(u *unpacker, p []byte, c, offset int64, r *run) error {
	return d.mem.Piece(p, d.id, c, offset, d.part(c), func(cluster []byte) error {
		_, err := d.unpackWhole(u, cluster, c, r)
		return err
	})
}

// unpackWhole unpacks whole clusters into p, beginning with cluster c. It always
// unpacks cluster c. It also unpacks the following clusters as long as they fit into p
// and lie so close together in the file that one read can fetch all of them. Their
// order in the file does not matter. unpackWhole returns the number of bytes of p that
// it filled.
func (d *Disk) unpackWhole(u *unpacker, p []byte, c int64, r *run) (n int64, err error) {
	entry, _ := d.entry(r, c)
	start, end := d.place(entry)
	if err := d.checkPacked(c, start); err != nil {
		return 0, err
	}
	sum, n, last := end-start, d.part(c), c
	for n < int64(len(p)) && last+1 < r.end() && d.part(last+1) <= int64(len(p))-n {
		entry, _ := d.entry(r, last+1)
		s, e := d.place(entry)
		low, high := min(start, s), max(end, e)
		if sum += e - s; high-low > batchSize || high-low > 2*sum || d.checkPacked(last+1, s) != nil {
			break
		}
		start, end = low, high
		last++
		n += d.part(last)
	}
	end = min(end, d.fileSize) // the file may end in the middle of the last sector
	u.packed = image.Grow(u.packed, end-start)
	if err := image.ReadFull(d.file, u.packed, start); err != nil {
		return 0, d.errorAt(c, "%w", err)
	}
	done := int64(0)
	for ; c <= last; c++ {
		entry, _ := d.entry(r, c)
		s, e := d.place(entry)
		// The capacity of dst is larger than its length, because the zstd decoder may
		// write a few bytes past the end of the cluster. This does no harm: the next
		// cluster is unpacked later, and overwrites these bytes.
		dst := p[done : done+d.part(c) : min(done+d.part(c)+zstdSlack, int64(len(p)))]
		if err := d.unpack(u, dst, u.packed[s-start:min(e, end)-start], c); err != nil {
			return 0, d.errorAt(c, "compressed bytes from offset %d to %d: %w", s, e, err)
		}
		done += int64(len(dst))
	}
	return n, nil
}

var (
	errMore = errors.New("the compressed bytes unpack to more than a cluster")
	errZstd = errors.New("the compressed bytes are not a zstd frame")
)

// The method unpack unpacks cluster c into dst. If the disk ends within the cluster, dst
// has only the bytes up to the end of the disk. src begins with the compressed bytes, and
// may have other bytes after them.
func (d *Disk) unpack(u *unpacker, dst, src []byte, c int64) error {
	whole := dst
	if int64(len(dst)) < d.cluster {
		u.cluster = image.Grow(u.cluster, d.cluster)
		whole = u.cluster[:d.cluster:d.cluster]
	}
	var n int
	var err error
	if d.compression == compressZstd {
		n, err = u.unzstd(whole, src)
	} else {
		n, _, err = u.Inflate(whole, src)
		if errors.Is(err, inflate.ErrTooLarge) {
			err = errMore
		}
	}
	switch {
	case err == errMore:
		return fmt.Errorf("%w (%d bytes): the image is damaged", err, d.cluster)
	case err != nil:
		return fmt.Errorf("the compressed bytes are damaged: %w", err)
	case n < len(dst) || n < len(whole) && c != d.clusters()-1:
		return fmt.Errorf("the compressed bytes unpack to %d bytes, want %d: the image is damaged", n, len(whole))
	}
	if len(whole) != len(dst) {
		copy(dst, whole)
	}
	return nil
}

// maxWindow is the largest window of a zstd frame that the decoder accepts, in bytes. A
// large window costs no memory, because the decoder uses the decoded cluster as its
// window.
const maxWindow = 1 << 31

// zstdSlack is the size of the space after the decoded data that a zstd decoder may
// overwrite, in bytes. Without this space the decoder copies byte by byte, which is
// slow.
const zstdSlack = 32

// unzstd decodes zstd frames of src into dst, until dst is full or src has no more
// frames. It returns the number of decoded bytes. If the capacity of dst is larger than
// its length, unzstd may overwrite up to zstdSlack bytes after the end of dst.
func (u *unpacker) unzstd(dst, src []byte) (n int, err error) {
	if u.zstd == nil {
		u.zstd, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return 0, err
		}
	}
	for {
		size, err := frameSize(src)
		if err != nil {
			return n, err
		}
		free := dst[n:]
		got, err := u.zstd.DecodeAll(src[:size], free[:0])
		switch {
		case errors.Is(err, zstd.ErrDecoderSizeExceeded):
			return n, errMore
		case err != nil:
			return n, err
		case len(got) > len(free):
			return n, errMore
		}
		if len(got) > 0 && &got[0] != &free[0] {
			copy(free, got)
		}
		if n += len(got); n == len(dst) || len(got) == 0 {
			return n, nil
		}
		// A cluster may consist of several frames. After the last frame, src may have
		// any bytes.
		src = src[size:]
		if len(src) < 4 || binary.LittleEndian.Uint32(src) != zstdMagic {
			return n, nil
		}
	}
}

// zstdMagic is the number at the start of every zstd frame, in little-endian order.
const zstdMagic = 0xfd2fb528

// frameSize returns the size in bytes of the zstd frame at the start of src (RFC 8878,
// 3.1.1). unzstd needs this size because the decoder accepts only one frame: the decoder
// returns an error if other bytes follow the frame.
func frameSize(src []byte) (int, error) {
	cut := func(at int) error { return fmt.Errorf("the zstd frame is truncated at byte %d", at) }
	if len(src) < 5 {
		return 0, cut(len(src))
	}
	if m := binary.LittleEndian.Uint32(src); m != zstdMagic {
		return 0, fmt.Errorf("%w: found %#08x, want %#08x", errZstd, m, zstdMagic)
	}
	flags := src[4]
	at := 5 + [...]int{0, 1, 2, 4}[flags&3] + [...]int{0, 2, 4, 8}[flags>>6]
	if flags&0x20 == 0 {
		at++ // window descriptor
	} else if flags>>6 == 0 {
		at++ // a content size of one byte
	}
	for {
		if at > len(src)-3 {
			return 0, cut(len(src))
		}
		head := int(src[at]) | int(src[at+1])<<8 | int(src[at+2])<<16
		size := head >> 3
		if head>>1&3 == 1 {
			size = 1 // one byte, repeated
		}
		at += 3 + size
		if head&1 != 0 {
			break
		}
	}
	if flags&4 != 0 {
		at += 4 // checksum
	}
	if at > len(src) {
		return 0, cut(len(src))
	}
	return at, nil
}
