package server

import (
	"errors"
	"fmt"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

// skipWrite discards the data of a write request that is refused, and sends an error as
// the reply. If skipWrite returns an error, the connection ends.
func (o *op) skipWrite(errno nbd.Errno, why string) error {
	c := o.c
	c.out.flushReplies()
	if err := c.in.discard(o.Len); err != nil {
		c.failUnlessEnding(err)
		o.drop()
		return err
	}
	o.refuse(errno, why)
	return nil
}

// The method write receives the data of a write request in one or more buffers. For
// each buffer it starts a goroutine that writes this piece of the data to the disk. If
// write returns an error, the connection ends.
func (o *op) write() error {
	c := o.c
	if o.Len == 0 {
		o.queueEnd()
		return nil
	}
	for off, end := int64(o.Off), o.end(); off < end; {
		b, err := c.in.receive(off, end-off)
		if err != nil {
			err = fmt.Errorf("cannot read the data of a write request: %w", err)
			o.abandon(err)
			return err
		}
		at := off
		if off += int64(len(b.b)); off < end {
			o.addPiece()
		}
		go o.writePiece(b, at)
	}
	return nil
}

// writePiece writes one piece of a write request to the disk and releases the buffer
// of the piece. The call for the piece that is finished last also flushes the disk if
// the request has the flag FUA, and then sends the reply.
func (o *op) writePiece(b *buffer, off int64) {
	e := o.c.export
	err := o.callDisk(func() error {
		_, err := e.writable.WriteAt(b.b, off)
		return err
	})
	e.extents.invalidate(off, int64(len(b.b)))
	o.c.s.memory.release(b)
	if err != nil {
		o.fail(err)
	}
	if !o.pieceDone() {
		return
	}
	if o.errno == 0 && !o.dropped && o.Flags&nbd.FlagFUA != 0 {
		if err := o.callDisk(func() error { return e.writable.Flush(o.c.s.disksCtx) }); err != nil {
			o.fail(err)
		}
	}
	o.sendEnd(&o.first)
}

// runCommand carries out a request without data in a new goroutine. The goroutine calls
// the parameter work, unless the range of the request is empty. After work has succeeded,
// the goroutine flushes the disk if the parameter flush is true. At the end it sends the
// reply. runCommand always returns nil.
func (o *op) runCommand(work func() error, flush bool) error {
	e := o.c.export
	go func() {
		err := o.callDisk(func() error {
			if o.Len > 0 {
				if err := work(); err != nil {
					return err
				}
			}
			if flush {
				return e.writable.Flush(o.c.s.disksCtx)
			}
			return nil
		})
		if o.Type != nbd.CmdFlush {
			e.extents.invalidate(int64(o.Off), int64(o.Len))
		}
		switch {
		case err != nil && o.Flags&nbd.FlagFastZero != 0 && errors.Is(err, errors.ErrUnsupported):
			o.errno, o.text = nbd.ENOTSUP, "zeroing this range is not faster than writing"
		case err != nil:
			o.fail(err)
		}
		o.sendEnd(&o.first)
	}()
	return nil
}

// zeroFlags converts the flags of a request WRITE_ZEROES to those of
// source.Writable.ZeroAt.
func zeroFlags(flags nbd.CommandFlags) source.ZeroFlags {
	var f source.ZeroFlags
	if flags&nbd.FlagNoHole == 0 {
		f |= source.MayTrim
	}
	if flags&nbd.FlagFastZero != 0 {
		f |= source.FastOnly
	}
	return f
}
