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

// ErrReadOnly is what OpenWritable returns, wrapped, where the server lets
// nobody write to the export.
var ErrReadOnly = errors.New("the export is read-only")

// WritableDisk is an export that is read and written. Beside what a Disk is it
// is source.Writable: at any alignment, whatever the server's. An error that the
// server gave for a write is source.Permanent: it is for who wrote. One of Flush
// stays.
type WritableDisk struct {
	*Disk
	target *target

	// parts is locked while a part of a block is read, changed and written
	// back, and read-locked by other writes.
	partial sync.RWMutex

	flushes flush.Group
}

// OpenWritable is Open for reading and writing.
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
		o.warn("%s can't be told to make durable what was written (it has no FLUSH)", s.life.Name)
	}
	return &WritableDisk{
		Disk:   &Disk{server: s, size: s.size, uri: uri.String()},
		target: newTarget(s, s.size, SinkOptions{}),
	}, nil
}

// change makes a call that changes a range: whole gets what of it are whole
// blocks, and part the rest.
func (d *WritableDisk) changeRange(ctx context.Context, off, n int64, whole, part func(off, n int64) error) error {
	s := d.server
	if err := s.life.Begin(ctx); err != nil {
		return fmt.Errorf("%s: write [%d, %d): %w", s.life.Name, off, off+n, err)
	}
	defer s.life.End()
	if !life.InDisk(off, n, d.size) {
		return source.Permanent(fmt.Errorf("%s: [%d, %d) is not in its %d bytes", s.life.Name, off, off+n, d.size))
	}
	defer d.forget()
	block := int64(s.sizes.Min)
	head := min((block-off%block)%block, n)
	tail := int64(0)
	if end := off + n; end != s.size {
		tail = min(end%block, n-head)
	}
	if head+tail == 0 {
		d.partial.RLock()
		defer d.partial.RUnlock()
	} else {
		d.partial.Lock()
		defer d.partial.Unlock()
	}
	var err error
	if inner := n - head - tail; inner > 0 {
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

// forget gives up what is known of the allocation, and what is being asked.
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

// pieces makes calls like one for a range that may be long.
func (d *WritableDisk) doPieces(ctx context.Context, off, n int64, like *call) error {
	s := d.server
	for n > 0 {
		k := &call{cmd: like.cmd, flags: like.flags, off: off, n: min(n, zeroPiece)}
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

// Trim implements source.Writable. Parts of blocks stay as they are, and all of
// it where the server has no TRIM.
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

// Flush implements source.Writable, on every connection.
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
