package vddk

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/source"
)

// zeroPiece is a number of bytes. Whenever ZeroAt has written so many bytes, it checks whether its
// context has ended.
const zeroPiece = 16 << 20

// WriteAt writes len(p) bytes at any offset inside the disk. If the disk was not opened with
// Options.Writable, the error wraps syscall.EROFS. If the range is not inside the disk, the
// error wraps syscall.ENOSPC. Sectors that p covers only in part are read first. WriteAt is safe
// for concurrent use; writes to the same sectors run one after the other.
func (d *Disk) WriteAt(p []byte, off int64) (int, error) {
	if err := d.beginWrite("write", off, int64(len(p))); err != nil {
		return 0, err
	}
	defer d.life.End()
	if err := d.write(request{write: true, p: p, off: off, n: int64(len(p))}); err != nil {
		return 0, err
	}
	return len(p), nil
}

// ZeroAt writes n zero bytes at offset off as ordinary data, because the library has no function
// that writes zeros faster. With source.FastOnly it therefore returns errors.ErrUnsupported.
func (d *Disk) ZeroAt(ctx context.Context, off, n int64, flags source.ZeroFlags) error {
	if flags.Has(source.FastOnly) {
		return errors.ErrUnsupported
	}
	if err := d.beginWrite("write zeros", off, n); err != nil {
		return err
	}
	defer d.life.End()
	for end := off + n; off < end; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := min(zeroPiece, end-off)
		if err := d.write(request{write: true, off: off, n: n}); err != nil {
			return err
		}
		off += n
	}
	return nil
}

// Trim does nothing, because the library has no function that deallocates blocks. It only checks
// that the disk is writable and that the range lies in the disk.
func (d *Disk) Trim(_ context.Context, off, n int64) error {
	if err := d.beginWrite("trim", off, n); err != nil {
		return err
	}
	d.life.End()
	return nil
}

// Flush makes all earlier writes durable. If a Flush fails, every later Flush fails with the same
// error until the disk is opened again. Likewise, every later Flush fails if a worker process was
// lost with writes that no Flush had made durable.
func (d *Disk) Flush(ctx context.Context) error {
	if err := d.beginWrite("flush", 0, 0); err != nil {
		return err
	}
	defer d.life.End()
	if err := d.flushes.Do(ctx, d.pool.flusher.flush); err != nil {
		return err
	}
	return d.pool.flusher.failed() // a worker may have been lost after that flush
}

// beginWrite checks that the range [off, off+n) may be written, and starts a call. Close waits
// until the call is ended with life.End.
func (d *Disk) beginWrite(op string, off, n int64) error {
	if !d.o.Writable {
		return fmt.Errorf("%s: %s: the disk was opened read-only: %w", d.params.File, op, syscall.EROFS)
	}
	if !life.InDisk(off, n, d.size) {
		return fmt.Errorf("%s: cannot %s bytes %d to %d, because the disk has %d bytes: %w", d.params.File, op, off, off+n, d.size, syscall.ENOSPC)
	}
	return d.pool.begin()
}

// The method write carries out the request r, which is a write. Before that it waits until no other
// write covers the same sectors.
func (d *Disk) write(r request) error {
	if r.n == 0 {
		return nil
	}
	d.allocation.stop()
	first, end := r.sectors()
	d.ranges.lock(first, end)
	defer d.ranges.unlock(first, end)
	return d.pool.doPieces(r)
}
