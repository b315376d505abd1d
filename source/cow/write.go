package cow

import (
	"context"
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/image"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// maxLocked is the largest number of blocks that a write locks at the same time.
const maxLocked = 256

// The method change runs a function that changes the bytes [off, off+n) of the disk. It
// returns an error without running the function if the disk is closed or its context
// has ended, if the range is not in the disk, or if an earlier write of the table of
// the blocks' states failed. The text of an error begins with the given operation.
func (d *Disk) change(ctx context.Context, operation string, off, n int64, call func() error) error {
	err := d.life.Begin(ctx)
	if err == nil {
		err = d.changeInCall(off, n, call)
		d.life.End()
	}
	if err != nil && err != errors.ErrUnsupported {
		return fmt.Errorf("%s %s [%d, %d): %w", operation, d.life.Name, off, off+n, err)
	}
	return err
}

// changeInCall does the work of change. Before the call, change has called
// d.life.Begin, so that Close waits until changeInCall returns.
func (d *Disk) changeInCall(off, n int64, call func() error) error {
	if !life.InDisk(off, n, d.size) {
		return fmt.Errorf("the range is outside the disk of %d bytes", d.size)
	}
	if err := d.table.failed(); err != nil {
		return err
	}
	return call()
}

// WriteAt implements source.Writable. It never extends the disk.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	done := 0
	err := d.change(d.life.Context, "write", off, int64(len(p)), func() error {
		for done < len(p) {
			n, err := d.writeSome(p[done:], off+int64(done))
			if err != nil {
				return err
			}
			done += n
		}
		return nil
	})
	return done, err
}

// writeSome writes the beginning of p, and returns the number of bytes that it wrote.
// If p begins with a whole block of the disk, it writes up to maxLocked whole blocks.
// Otherwise it writes only those bytes of p that lie in the same block as the first
// byte.
func (d *Disk) writeSome(p []byte, off int64) (int, error) {
	b := off / d.block
	if n := min(d.wholeBlocks(off, int64(len(p))), maxLocked); n > 0 {
		p = p[:min(n*d.block, int64(len(p)))]
		return len(p), d.writeBlocks(p, off, b, n)
	}
	p = p[:min(int64(len(p)), b*d.block+d.length(b)-off)]
	return len(p), d.writePart(p, off, b)
}

// writeBlocks writes n whole blocks, beginning with block b, and sets their state to
// present.
func (d *Disk) writeBlocks(p []byte, off, b, n int64) error {
	written, err := d.overwrite(p, off, b, n)
	if written || err != nil {
		return err
	}
	d.locks.lock(b, n)
	defer d.locks.unlock(b, n)
	if err := d.store.write(p, off); err != nil {
		return err
	}
	_, err = d.table.set(b, n, present)
	return err
}

// The method overwrite writes p if the layer already has all of the n blocks that begin
// with block b. Otherwise it writes nothing. It reports whether it has written p.
func (d *Disk) overwrite(p []byte, off, b, n int64) (written bool, err error) {
	d.locks.rLock(b, n)
	defer d.locks.rUnlock(b, n)
	state, same, err := d.table.run(b, n)
	if err != nil || state != present || same < n {
		return false, err
	}
	return true, d.store.write(p, off)
}

// writePart writes a part of block b. If the layer does not have the block, writePart
// writes the whole block: p, and around it zeros if the block is zeroed, or the bytes
// of the base if the block is absent.
func (d *Disk) writePart(p []byte, off, b int64) error {
	written, err := d.overwrite(p, off, b, 1)
	if written || err != nil {
		return err
	}
	// The buffer must be acquired before the block is locked. Otherwise a call that
	// holds the lock could wait for a buffer, while the call that has the buffer waits
	// for the lock.
	buf, err := d.buffer()
	if err != nil {
		return err
	}
	defer func() { d.buffers <- buf }()
	d.locks.of(b).Lock()
	defer d.locks.of(b).Unlock()
	state, _, err := d.table.run(b, 1)
	if err != nil {
		return err
	}
	start, block := b*d.block, buf[:d.length(b)]
	switch state {
	case present:
		return d.store.write(p, off)
	case zeroed:
		clear(block)
	case absent:
		if err := image.ReadFull(d.base, block, start); err != nil {
			return err
		}
	}
	copy(block[off-start:], p)
	if err := d.store.write(block, start); err != nil {
		return err
	}
	_, err = d.table.set(b, 1, present)
	return err
}

// ZeroAt implements source.Writable. It sets the state of whole blocks to zeroed
// without writing to them. It writes zeros to the parts of blocks at both ends of the
// range. With MayTrim it frees the space of the whole blocks in the layer. Without
// MayTrim it reserves this space, if the file system supports that. With FastOnly it
// returns an error if the range has no whole block.
func (d *Disk) ZeroAt(ctx context.Context, off, n int64, flags source.ZeroFlags) error {
	return d.change(ctx, "zero", off, n, func() error {
		first, whole := d.inner(off, n)
		if flags.Has(source.FastOnly) && whole == 0 && n > 0 {
			return errors.ErrUnsupported
		}
		return d.zero(ctx, off, n, first, whole, flags.Has(source.MayTrim), func(p []byte, off, b int64) error {
			if state, _, err := d.table.run(b, 1); err != nil || state == zeroed {
				return err
			}
			return d.writePart(p, off, b)
		})
	})
}

// Trim implements source.Writable. The whole blocks of the range read as zeros
// afterwards. The range may also begin and end with a part of a block. If the layer has
// the block of such a part, Trim overwrites the part with zeros. Otherwise the part
// keeps its content, because a trim must not use space.
func (d *Disk) Trim(ctx context.Context, off, n int64) error {
	return d.change(ctx, "trim", off, n, func() error {
		first, whole := d.inner(off, n)
		return d.zero(ctx, off, n, first, whole, true, func(p []byte, off, b int64) error {
			_, err := d.overwrite(p, off, b, 1)
			return err
		})
	})
}

// The method inner returns the number of the first whole block in [off, off+n), and how
// many whole blocks the range has.
func (d *Disk) inner(off, n int64) (first, blocks int64) {
	first = (off + d.block - 1) / d.block
	last := (off + n) / d.block // exclusive
	if off+n == d.size {
		last = d.blocks(d.size)
	}
	return first, max(0, last-first)
}

// The method zero makes the range [off, off+n) read as zeros. It sets the state of the
// whole blocks in this range to zeroed. The caller passes the number of the first whole
// block in the parameter first, and the number of whole blocks in the parameter whole,
// both as the method inner returned them. If the parameter free is true, the space of
// the whole blocks is deallocated. Otherwise this space is reserved.
//
// The range may begin and end with a part of a block. For each such part, the method
// calls the function writeZeros with three arguments: a slice of zeros that is as long
// as the part, the offset of the part in the disk, and the number of the block.
func (d *Disk) zero(ctx context.Context, off, n, first, whole int64, free bool, writeZeros func(zeros []byte, pos, b int64) error) error {
	for end := off + n; off < end; {
		if err := d.life.Cause(ctx); err != nil {
			return err
		}
		b := off / d.block
		if b < first || b >= first+whole {
			length := min(end, b*d.block+d.length(b)) - off
			if err := writeZeros(d.zeros[:length], off, b); err != nil {
				return err
			}
			off += length
			continue
		}
		blocks := min(first+whole-b, stripes)
		length := min(blocks*d.block, d.size-off)
		if err := d.zeroBlocks(off, length, b, blocks, free); err != nil {
			return err
		}
		off += length
	}
	return nil
}

// zeroBlocks sets the state of whole blocks to zeroed. If free is true, it frees their
// space in the layer, and otherwise it reserves this space.
func (d *Disk) zeroBlocks(off, length, b, blocks int64, free bool) error {
	d.locks.lock(b, blocks)
	defer d.locks.unlock(b, blocks)
	if !free {
		if err := d.store.reserve(off, length); err != nil {
			return err
		}
	}
	had, err := d.table.set(b, blocks, zeroed)
	if err == nil && free && had {
		d.store.free(off, length)
	}
	return err
}

// Flush implements source.Writable. The content of the blocks becomes durable before
// the table that says which blocks the layer has. A layer in a temporary file is not
// made durable.
func (d *Disk) Flush(ctx context.Context) error {
	return d.change(ctx, "flush", 0, 0, func() error {
		if err := d.flushes.Do(ctx, d.flush); err != nil {
			return err
		}
		return d.table.failed()
	})
}

// flush writes the table and makes the layer durable. For a layer in a temporary file
// it does neither.
func (d *Disk) flush() error {
	if d.store.temporary {
		return d.table.failed()
	}
	return d.table.write(true)
}
