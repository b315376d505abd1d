package cow

import (
	"context"
	"iter"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/source"
)

// ReadAt implements source.Disk.
func (d *Disk) ReadAt(p []byte, off int64) (int, error) {
	return d.life.ReadAt(p, off, d.size, func(p []byte) (int, error) {
		for done := 0; done < len(p); {
			at := off + int64(done)
			state, n, err := d.run(at, int64(len(p)-done))
			if err == nil {
				part := p[done : done+int(n)]
				switch {
				case state == present:
					err = d.store.read(part, at)
				case state == zeroed:
					clear(part)
				case d.copyOnRead.Load():
					err = d.copyRange(part, at)
				default:
					err = image.ReadFull(d.base, part, at)
				}
			}
			if err != nil {
				return done, err
			}
			done += int(n)
		}
		return len(p), nil
	})
}

// maxCopied is the largest number of bytes that one call reads from the base in order
// to copy them into the layer.
const maxCopied = 4 << 20

// copyRange fills p with the bytes of the disk from the given offset on. It copies
// the absent blocks of this range from the base into the layer.
func (d *Disk) copyRange(p []byte, off int64) error {
	for len(p) > 0 {
		b := off / d.block
		n := min(d.wholeBlocks(off, min(int64(len(p)), maxCopied)), stripes)
		if n > 0 {
			length := min(n*d.block, d.size-off)
			if err := d.copyBlocks(b, n, p[:length]); err != nil {
				return err
			}
			p, off = p[length:], off+length
			continue
		}
		length, err := d.copyPart(p, off)
		if err != nil {
			return err
		}
		p, off = p[length:], off+int64(length)
	}
	return nil
}

// copyPart reads a part of one block into p: from the given offset to the end of the
// block that contains this offset, or less if p is shorter. It returns the number of
// bytes. If the block is absent, copyPart copies all of it into the layer.
func (d *Disk) copyPart(p []byte, off int64) (int, error) {
	buf, err := d.buffer()
	if err != nil {
		return 0, err
	}
	defer func() { d.buffers <- buf }()
	b := off / d.block
	block := buf[:d.length(b)]
	if err := d.copyBlocks(b, 1, block); err != nil {
		return 0, err
	}
	return copy(p, block[off-b*d.block:]), nil
}

// copyBlocks reads n blocks, the first of which is block b, into p. It copies those
// that are absent into the layer. If two calls run for the same block, the second one
// waits for the first one, and then finds the block in the layer.
func (d *Disk) copyBlocks(b, n int64, p []byte) error {
	d.locks.lock(b, n)
	defer d.locks.unlock(b, n)
	for off := b * d.block; len(p) > 0; {
		state, length, err := d.run(off, int64(len(p)))
		if err != nil {
			return err
		}
		part := p[:length]
		switch state {
		case present:
			err = d.store.read(part, off)
		case zeroed:
			clear(part)
		case absent:
			if err = image.ReadFull(d.base, part, off); err == nil && d.copyOnRead.Load() {
				d.storeRead(part, off)
			}
		}
		if err != nil {
			return err
		}
		p, off = p[length:], off+length
	}
	return nil
}

// storeRead writes the blocks in p, which were read from the base, into the layer. The
// caller must have locked these blocks exclusively. If writing fails, storeRead
// returns no error, so that the read succeeds, but from then on the disk does not copy
// blocks that are read.
func (d *Disk) storeRead(p []byte, off int64) {
	for len(p) > 0 {
		n := min(d.block, int64(len(p)))
		zeros := zero.Is(p[:n])
		for n < int64(len(p)) && zero.Is(p[n:min(n+d.block, int64(len(p)))]) == zeros {
			n = min(n+d.block, int64(len(p)))
		}
		state := zeroed
		err := error(nil)
		if !zeros {
			state = present
			err = d.store.write(p[:n], off)
		}
		if err == nil {
			_, err = d.table.set(off/d.block, d.blocks(n), state)
		}
		if err != nil {
			if d.copyOnRead.CompareAndSwap(true, false) {
				d.log.Warn("blocks that are read are no longer copied into the layer", "file", d.life.Name, "error", err)
			}
			return
		}
		p, off = p[n:], off+n
	}
}

// The method blocks returns the number of blocks that a range of n bytes touches if it
// begins at the start of a block.
func (d *Disk) blocks(n int64) int64 { return (n + d.block - 1) / d.block }

// The method length returns the length of block b in bytes. The last block of a disk
// may be shorter than the others.
func (d *Disk) length(b int64) int64 { return min(d.block, d.size-b*d.block) }

// wholeBlocks returns the number of whole blocks with which the range [off, off+n)
// begins.
func (d *Disk) wholeBlocks(off, n int64) int64 {
	if off%d.block != 0 {
		return 0
	}
	if off+n == d.size {
		return d.blocks(n)
	}
	return n / d.block
}

// Extents implements source.Disk. Blocks that are present in the layer are reported as
// Data and zeroed blocks as Zero, with Depth 0. Absent blocks are reported with the
// extents of the base, whose Depth is increased by one.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return image.Extents(d.life.Name, d.size, off, length, func(out *image.Merger) error {
		for end := off + length; off < end; {
			if err := d.life.Check(ctx); err != nil {
				return err
			}
			state, n, err := d.run(off, end-off)
			if err != nil {
				return err
			}
			switch state {
			case absent:
				err = out.AddParent(ctx, d.base, off, n)
			case present:
				err = out.Add(source.Extent{Off: off, Len: n, Kind: source.Data})
			case zeroed:
				err = out.Add(source.Extent{Off: off, Len: n, Kind: source.Zero})
			}
			if err != nil {
				return err
			}
			off += n
		}
		return nil
	})
}
