package vddk

import (
	"context"
	"errors"
	"fmt"
	"syscall"
	"time"

	"github.com/vddkcp/vddkcp/source"
)

// zeroPiece is how much ZeroAt writes before it looks at its context.
const zeroPiece = 16 << 20

// WriteAt writes len(p) bytes at any offset inside the disk, which must have
// been opened with Options.Writable. Sectors that are written in part are read
// first; writes that share a sector go one after the other.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.beginWrite("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	defer d.calls.Done()
	if err := d.writeRange(off, int64(len(p)), func(from, to int64) []byte { return p[from-off : to-off] }); err != nil {
		return 0, err
	}
	return len(p), nil
}

// ZeroAt writes zeros: the library knows no other way.
func (d *Disk) ZeroAt(ctx context.Context, off, n int64, flags source.ZeroFlags) error {
	if flags.Has(source.FastOnly) {
		return errors.ErrUnsupported
	}
	if err := d.beginWrite("write zeros", off, n); err != nil {
		return err
	}
	defer d.calls.Done()
	for end := off + n; off < end; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := min(zeroPiece, end-off)
		if err := d.writeRange(off, n, func(int64, int64) []byte { return nil }); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// Trim does nothing: the library can't deallocate.
func (d *Disk) Trim(_ context.Context, off, n int64) error {
	if err := d.beginWrite("trim", off, n); err != nil {
		return err
	}
	d.calls.Done()
	return nil
}

// beginWrite checks a range, and makes Close wait until the calls' Done.
func (d *Disk) beginWrite(op string, off, n int64) error {
	if !d.o.Writable {
		return fmt.Errorf("%s: %s: it was opened read-only: %w", d.params.File, op, syscall.EROFS)
	}
	if !d.inDisk(off, n) {
		return fmt.Errorf("%s: %s [%d, %d) of a disk of %d bytes: %w", d.params.File, op, off, off+n, d.size, syscall.ENOSPC)
	}
	return d.begin()
}

// writeRange writes what content returns for each part of the range; nil is
// zeros.
func (d *Disk) writeRange(off, n int64, content func(from, to int64) []byte) error {
	if n == 0 {
		return nil
	}
	first, end := off&^(sectorSize-1), (off+n+sectorSize-1)&^(sectorSize-1)
	if !d.wrote.Load() {
		d.querying.Lock()
		d.wrote.Store(true)
		d.querying.Unlock()
	}
	d.ranges.lock(first, end)
	defer d.ranges.unlock(first, end)
	return d.eachRequest(off, n, func(from, to int64) error { return d.writePiece(content(from, to), from, to) })
}

// writePiece writes what fits a request. Only what may pass is repeated: a
// worker that was lost, a host without memory. What else fails, the caller is
// to know.
func (d *Disk) writePiece(p []byte, off, end int64) error {
	first, after := off&^(sectorSize-1), (off+(end-off)+sectorSize-1)&^(sectorSize-1)
	var head, tail [sectorSize]byte
	if off > first {
		if err := d.read(head[:], first); err != nil {
			return err
		}
	}
	if after > end && (after-sectorSize != first || off == first) {
		if err := d.read(tail[:], after-sectorSize); err != nil {
			return err
		}
	} else if after > end {
		tail = head
	}
	a := attempts{d: d, since: time.Now()}
	for {
		t, err := d.take(nil)
		if err != nil {
			return err
		}
		t.write = true
		b := t.memory()[:after-first]
		copy(b, head[:off-first])
		copy(b[len(b)-int(after-end):], tail[sectorSize-int(after-end):])
		if p == nil {
			clear(b[off-first : end-first])
		} else {
			copy(b[off-first:], p)
		}
		mark := d.log.mark()
		err = t.s.write(d.ctx, d.timeout(d.o.Timeout, a.since), t.slot, uint64(first/sectorSize), len(b)/sectorSize)
		if err != nil {
			err = d.requestFailed(t, "write", first, int64(len(b)), mark, a.since, err)
			d.give(t, 0, false)
		} else if d.give(t, int64(len(b)), true) {
			return nil
		} else {
			err = t.s.gone(d.rangeOf("write", first, int64(len(b))))
		}
		if e := asError(err); e != nil && !e.noMemory() {
			return fmt.Errorf("%w: %w", errIO, err)
		}
		if err := a.again(t, err); err != nil {
			return err
		}
		if l, _ := d.pace.Next(); !fits(off, end-off, l.Size) {
			return d.eachRequest(off, end-off, func(from, to int64) error {
				if p == nil {
					return d.writePiece(nil, from, to)
				}
				return d.writePiece(p[from-off:to-off], from, to)
			})
		}
	}
}

// Flush makes what was written durable. Once it has failed, or a worker was
// lost with writes that had not been flushed, it fails until the disk is opened
// again.
func (d *Disk) Flush(ctx context.Context) error {
	if err := d.beginWrite("flush", 0, 0); err != nil {
		return err
	}
	defer d.calls.Done()
	if err := d.flushes.Do(ctx, d.flush); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flushErr // a worker may have been lost since that flush
}
