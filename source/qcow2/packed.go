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

// batchSize is how many compressed bytes are read at once where several
// clusters are wanted. More would save nothing beside the time that unpacking
// takes, and each reader has as much memory.
const batchSize = 256 << 10

// unpacker is the scratch memory of one reader of compressed clusters.
type unpacker struct {
	packed  []byte // compressed bytes, as read
	cluster []byte // a whole cluster, where the disk ends in the middle of it
	inflate.Decoder
	zstd *zstd.Decoder
}

var unpackers = sync.Pool{New: func() any { return new(unpacker) }}

// part is how many bytes of cluster c are in the disk: all, but for the last.
func (d *Disk) part(c int64) int64 { return min(d.cluster, d.size-c<<d.clusterShift) }

// place returns where in the file the bytes of a compressed cluster are, at
// most: the descriptor counts whole sectors ("Compressed Clusters Descriptor").
func (d *Disk) place(entry uint64) (start, end int64) {
	x := 62 - (d.clusterShift - 8)
	start = int64(entry & (1<<x - 1))
	sectors := int64(entry&(1<<62-1)) >> x
	return start, start&^511 + (sectors+1)*512
}

// checkPacked returns an error where the bytes of cluster c can't be at start.
func (d *Disk) checkPacked(c, start int64) error {
	switch {
	case start>>56 != 0:
		return d.errorAt(c, "its compressed bytes are at offset %#x, want less than 64 PiB: the L2 table is damaged", start)
	case start >= d.fileSize:
		return d.errorAt(c, "its compressed bytes are at offset %d, the file has %d: it is truncated or damaged", start, d.fileSize)
	case d.inMetadata(start, start+1):
		return d.errorAt(c, "its compressed bytes are at offset %d, in %s: the L2 table is damaged", start, d.metadataAt(start, start+1))
	}
	return nil
}

// unpackAt fills p with the bytes at off, which lie in compressed clusters of r.
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

// unpackPiece fills p with the bytes at in of cluster c, and keeps the cluster:
// the next piece is likely to be of it.
func (d *Disk) unpackPiece(u *unpacker, p []byte, c, in int64, r *run) error {
	return d.mem.Piece(p, d.id, c, in, d.part(c), func(cluster []byte) error {
		_, err := d.unpackWhole(u, cluster, c, r)
		return err
	})
}

// unpackWhole fills p, but for a piece of a cluster at its end, with clusters
// from c on. It takes as many as lie closely together in the file, in any
// order, and can be read at once, at least one, and returns their bytes in the
// disk.
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
	end = min(end, d.fileSize) // the last sector may be cut
	u.packed = image.Grow(u.packed, end-start)
	if err := image.ReadFull(d.file, u.packed, start); err != nil {
		return 0, d.errorAt(c, "%w", err)
	}
	done := int64(0)
	for ; c <= last; c++ {
		entry, _ := d.entry(r, c)
		s, e := d.place(entry)
		// What comes behind it in p is filled later.
		dst := p[done : done+d.part(c) : min(done+d.part(c)+zstdSlack, int64(len(p)))]
		if err := d.unpack(u, dst, u.packed[s-start:min(e, end)-start], c); err != nil {
			return 0, d.errorAt(c, "its compressed bytes at offset %d to %d: %w", s, e, err)
		}
		done += int64(len(dst))
	}
	return n, nil
}

var (
	errMore = errors.New("they unpack to more than a cluster")
	errZstd = errors.New("no zstd frame")
)

// unpack fills dst, the part of cluster c that is in the disk, from src, which
// may go on behind it.
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
		return fmt.Errorf("%w of %d: they are damaged", err, d.cluster)
	case err != nil:
		return fmt.Errorf("they are damaged: %w", err)
	case n < len(dst) || n < len(whole) && c != d.clusters()-1:
		return fmt.Errorf("they unpack to %d bytes, want %d: they are damaged", n, len(whole))
	}
	if len(whole) != len(dst) {
		copy(dst, whole)
	}
	return nil
}

// maxWindow is the largest window of a zstd frame that is taken. It needs no
// memory of its own: what is unpacked is the window.
const maxWindow = 1 << 31

// zstdSlack is how many bytes behind what it decodes a zstd decoder likes to
// write over: else it copies byte by byte.
const zstdSlack = 32

// unzstd decodes frames of src into dst until that is full, and returns the
// number of bytes. What dst has behind its length, up to zstdSlack bytes, may be
// written over.
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
		// A writer may make several frames of a cluster. What follows the last
		// one is anything.
		src = src[size:]
		if len(src) < 4 || binary.LittleEndian.Uint32(src) != zstdMagic {
			return n, nil
		}
	}
}

const zstdMagic = 0xfd2fb528

// frameSize returns the bytes of the zstd frame that src begins with (RFC 8878,
// 3.1.1): the decoder takes no bytes behind it.
func frameSize(src []byte) (int, error) {
	cut := func(at int) error { return fmt.Errorf("the zstd frame is cut at its byte %d", at) }
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
