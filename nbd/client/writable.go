package client

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"github.com/vddkcp/vddkcp/internal/flush"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

// ErrReadOnly is wrapped by the errors of OpenWritable, Create and Check if the server does
// not allow writing to the export.
var ErrReadOnly = errors.New("the export is read-only")

// WritableDisk is a Disk that is also source.Writable. Offsets and lengths may have any
// alignment. If the server refuses a write, the error is marked with source.Permanent,
// so that the write is not retried. After a failed Flush, every later Flush returns the
// same error.
type WritableDisk struct {
	*Disk
	target *target

	// The field partial is a read-write lock. Its write lock is held while a part of a
	// block is changed, which means that the block is read, changed and written back.
	// Writes of whole blocks hold its read lock.
	partial sync.RWMutex

	flushes flush.Group
}

// OpenWritable opens the export with the given URI for reading and writing. When ctx ends,
// all calls of the disk fail.
func OpenWritable(ctx context.Context, uri *nbd.URI, o Options) (*WritableDisk, error) {
	s, err := dial(ctx, uri, o)
	if err != nil {
		return nil, err
	}
	if err := s.checkWritable(s.life.Name, s.size); err != nil {
		s.close()
		return nil, err
	}
	if s.flags&nbd.SendFlush == 0 {
		o.warn(noFlush, s.life.Name)
	}
	return &WritableDisk{
		Disk:   &Disk{server: s, size: s.size, uri: uri.String()},
		target: newTarget(s, s.size, SinkOptions{}),
	}, nil
}

// changeRange changes the n bytes at the given offset, with the help of two functions
// of the caller. It calls the function whole for the blocks that the range covers
// completely. At the beginning and at the end of the range, it calls the function part
// for blocks that are covered only in part.
func (d *WritableDisk) changeRange(ctx context.Context, off, n int64, whole, part func(off, n int64) error) error {
	s := d.server
	if err := s.life.Begin(ctx); err != nil {
		return fmt.Errorf("%s: write [%d, %d): %w", s.life.Name, off, off+n, err)
	}
	defer s.life.End()
	if !life.InDisk(off, n, d.size) {
		return source.Permanent(fmt.Errorf("%s: cannot write bytes [%d, %d): the export has %d bytes", s.life.Name, off, off+n, d.size))
	}
	defer d.forget()
	head, inner := s.splitBlocks(off, n)
	tail := n - head - inner
	if head+tail == 0 {
		d.partial.RLock()
		defer d.partial.RUnlock()
	} else {
		d.partial.Lock()
		defer d.partial.Unlock()
	}
	var err error
	if inner > 0 {
		err = whole(off+head, inner)
	}
	if err == nil && head > 0 {
		err = part(off, head)
	}
	if err == nil && tail > 0 {
		err = part(off+n-tail, tail)
	}
	if server := (*serverError)(nil); errors.As(err, &server) && server.errno != nbd.ESHUTDOWN {
		err = source.Permanent(err)
	}
	return err
}

// The method forget empties the cache of extents. The results of queries that are in
// progress are not cached either.
func (d *WritableDisk) forget() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.known = allocation{}
	d.changes++
}

// WriteAt implements source.Writable.
func (d *WritableDisk) WriteAt(p []byte, off int64) (int, error) {
	of := func(at, n int64) []byte { return p[at-off:][:n] }
	err := d.changeRange(d.server.life.Context, off, int64(len(p)),
		func(at, n int64) error { return d.server.write(of(at, n), at) },
		func(at, n int64) error { return d.server.writePart(of(at, n), at) })
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

// ZeroAt implements source.Writable.
func (d *WritableDisk) ZeroAt(ctx context.Context, off, n int64, flags source.ZeroFlags) error {
	return d.changeRange(ctx, off, n, func(at, n int64) error {
		if flags.Has(source.FastOnly) {
			return d.zeroFast(ctx, at, n, flags.Has(source.MayTrim))
		}
		return d.target.zero(ctx, at, n, !flags.Has(source.MayTrim))
	}, func(at, n int64) error {
		return d.server.writePart(zeros[:n], at)
	})
}

// doPieces divides the n bytes at the given offset into pieces of at most zeroPiece
// bytes. It sends a request for each piece, in order. The requests have the same
// command and the same flags as the given call, which is only a model and is not sent
// itself. If the server does not support the command, doPieces returns
// errors.ErrUnsupported.
func (d *WritableDisk) doPieces(ctx context.Context, off, n int64, model *call) error {
	s := d.server
	for n > 0 {
		k := &call{cmd: model.cmd, flags: model.flags, off: off, n: min(n, zeroPiece)}
		err := s.do(ctx, s.pick(), k)
		var server *serverError
		if errors.As(err, &server) && server.errno == nbd.ENOTSUP {
			return errors.ErrUnsupported
		}
		if err != nil {
			return s.wrap(k, err)
		}
		off, n = off+k.n, n-k.n
	}
	return nil
}

// Trim implements source.Writable. It trims only whole blocks, and does nothing if the
// server does not support TRIM.
func (d *WritableDisk) Trim(ctx context.Context, off, n int64) error {
	return d.changeRange(ctx, off, n, func(at, n int64) error {
		if d.server.flags&nbd.SendTrim == 0 {
			return nil
		}
		if err := d.doPieces(ctx, at, n, &call{cmd: nbd.CmdTrim}); err != errors.ErrUnsupported {
			return err
		}
		return nil
	}, func(int64, int64) error { return nil })
}

// Flush implements source.Writable. It sends FLUSH on every connection.
func (d *WritableDisk) Flush(ctx context.Context) error {
	s := d.server
	if err := s.life.Begin(ctx); err != nil {
		return fmt.Errorf("%s: flush: %w", s.life.Name, err)
	}
	defer s.life.End()
	return d.flushes.Do(ctx, func() error { return d.target.flush(ctx) })
}

var (
	_ source.Disk     = (*WritableDisk)(nil)
	_ source.Writable = (*WritableDisk)(nil)
)
