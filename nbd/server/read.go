package server

import (
	"errors"
	"io"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/zero"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// minFile is the length, in bytes, of the shortest read whose data the kernel
	// copies from the file to the socket (sendfile). For shorter reads a copy
	// through memory is faster.
	minFile = 32 << 10
	// minHole is the length, in bytes, of the shortest hole that is sent as a chunk
	// of its own. Shorter holes are read together with the data around them.
	minHole = 64 << 10
	// maxSplit is the maximum number of pieces into which one read is divided according to
	// the cached extents of the disk. The rest of the range is read from the disk without
	// regard to extents.
	maxSplit = 64
	// maxCache is the maximum number of bytes that one CACHE request prefetches.
	maxCache = nbd.MaxPayload
)

// The method read starts to answer a read request, in one of four ways. The way depends
// on the length of the request, on the disk and on the client. If read returns an
// error, the connection ends.
func (o *op) read() error {
	if o.Len == 0 {
		o.queueEnd()
		return nil
	}
	if o.sendFile() {
		return nil
	}
	if done, err := o.readCached(); done || err != nil {
		return err
	}
	if !o.c.structured || o.Flags&nbd.FlagDF != 0 {
		return o.readWhole()
	}
	return o.readPieces()
}

// sendFile queues a reply whose data the kernel copies from a file to the socket
// (sendfile). It does this only if the client requests at least minFile bytes, the data
// are contiguous in one file, the connection is a plain socket, and the reply may begin
// before all data were read (see mayStream). Otherwise it does nothing and returns false.
func (o *op) sendFile() bool {
	c, off, n := o.c, int64(o.Off), int64(o.Len)
	if c.out.raw == nil || c.export.files == nil || n < minFile || !o.mayStream() {
		return false
	}
	f, pos, have, ok := c.export.files.InFile(off)
	if !ok || have < n {
		return false
	}
	o.prefetch(off, n)
	r := &o.first
	o.setData(r, off, int(n), false)
	r.last, r.file, r.pos, r.length, r.stream = true, f, pos, n, o.stream
	c.out.queueReply(r)
	return true
}

// readPieces starts a read that is answered with one chunk for each hole and each piece
// of data. The chunks may be sent in any order. Long holes (see minHole) that are in
// the cache of extents are not read from the disk.
func (o *op) readPieces() error {
	c := o.c
	var few [4]source.Extent
	plan := c.export.plan(few[:0], int64(o.Off), int64(o.Len))
	r := &o.first
	for i, p := range plan {
		final := i == len(plan)-1
		for p.Len > 0 {
			if r == nil {
				r = &reply{op: o}
			}
			n, hole := p.Len, p.Kind == source.Zero
			if !hole {
				b, err := c.allocate(int(p.Len))
				if err != nil {
					o.abandon(err)
					return err
				}
				r.buf, r.body, n = b, b.b, int64(len(b.b))
			}
			if !final || n < p.Len {
				o.addPiece()
			}
			if !hole {
				go o.readPiece(r, p.Off)
			} else if o.queuePiece(r, p.Off, int(n), true) {
				c.out.flushLater()
			}
			r, p.Off, p.Len = nil, p.Off+n, p.Len-n
		}
	}
	return nil
}

// mayStream reports whether the reply may begin before all data were read. A structured
// reply can report an error at its end, so it may always begin early. A simple reply
// cannot report an error at its end. It begins early only if the data are too long for
// one buffer (see maxPiece) and no earlier read of the range has failed.
func (o *op) mayStream() bool {
	return o.c.structured || o.Len > maxPiece && !o.failedBefore()
}

// failedBefore reports whether an earlier read of the export failed in a range that
// overlaps the range of this request.
func (o *op) failedBefore() bool {
	return o.c.s.badRanges.overlap(o.c.export.Name, int64(o.Off), o.end())
}

// readCached answers a short read from the page cache of the kernel, without starting a
// goroutine. The result done is false if the data are not in the page cache, the read is
// too long, or the disk is not a file.
func (o *op) readCached() (done bool, err error) {
	c := o.c
	if o.Len >= minFile || c.export.files == nil {
		return false, nil
	}
	f, pos, have, ok := c.export.files.InFile(int64(o.Off))
	if !ok || have < int64(o.Len) || c.export.noNowait.Load() {
		return false, nil
	}
	b, err := c.allocate(int(o.Len))
	if err != nil {
		o.abandon(err)
		return true, err
	}
	if len(b.b) < int(o.Len) {
		c.s.memory.release(b)
		return false, nil
	}
	n, err := unix.Preadv2(int(f.Fd()), [][]byte{b.b}, pos, unix.RWF_NOWAIT)
	if n != len(b.b) {
		if err == unix.EOPNOTSUPP || err == unix.ENOSYS {
			c.export.noNowait.Store(true)
		}
		c.s.memory.release(b)
		return false, nil
	}
	r := &o.first
	r.last, r.buf, r.body = true, b, b.b
	o.setData(r, int64(o.Off), len(b.b), true)
	c.out.queueReply(r)
	return true, nil
}

// The method plan divides the n bytes at the given offset into extents and appends these
// to a list. Long holes (see minHole) that are in the cache of extents become extents of
// kind Zero. All other ranges become extents of kind Data, which have at most maxPiece
// bytes and must be read from the disk.
func (f *facts) plan(list []source.Extent, off, n int64) []source.Extent {
	end := off + n
	for off < end {
		p := source.Extent{Off: off, Len: end - off}
		if e, ok := f.extents.cached(off); ok && (e.Kind == source.Zero || e.End() < end) && len(list) < maxSplit {
			p.Kind, p.Len = e.Kind, min(e.Len, end-off)
		}
		if p.Kind != source.Zero || p.Len < min(minHole, n) {
			p.Kind, p.Len = source.Data, min(p.Len, maxPiece)
			if k := len(list) - 1; k >= 0 && list[k].Kind == source.Data && list[k].Len+p.Len <= maxPiece {
				list[k].Len += p.Len
				off += p.Len
				continue
			}
		}
		list = append(list, p)
		off += p.Len
	}
	return list
}

// queuePiece finishes a piece of a read that is answered with a structured reply. The
// piece has n bytes at the given offset of the disk. It is a hole, or its data are in
// r.body. queuePiece queues the piece as a chunk, and the last piece ends the reply.
// After an error no more data are queued. If the result drain is true, the caller must
// call outbox.drain.
func (o *op) queuePiece(r *reply, off int64, n int, hole bool) (drain bool) {
	// The chunk is queued while o.mu is locked, so that the chunk that ends the
	// reply is queued after all others.
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pieces--
	r.last = o.pieces == 0
	switch failed := o.errno != 0 || o.dropped; {
	case failed && r.last:
		o.setEnd(r)
	case failed:
		r.n, r.body = 0, nil
	case hole:
		o.setHole(r, off, n, r.last)
	default:
		o.setData(r, off, n, r.last)
	}
	return o.c.out.enqueue(r)
}

// readAt fills p with the bytes of the disk that begin at the given offset.
func (o *op) readAt(p []byte, off int64) error {
	return o.callDisk(func() error {
		n, err := o.c.export.disk.ReadAt(p, off)
		if n == len(p) && errors.Is(err, io.EOF) {
			return nil
		}
		return err
	})
}

// readPiece reads the piece of the disk that begins at the given offset, and sends it.
// The slice r.body receives the bytes of the piece, and its length is that of the piece.
// If all bytes are zeros, the piece is sent as a hole.
func (o *op) readPiece(r *reply, off int64) {
	n, hole := len(r.body), false
	if err := o.readAt(r.body, off); err != nil {
		o.fail(err)
	} else {
		hole = zero.Is(r.body)
	}
	if hole {
		o.c.s.memory.release(r.buf)
		r.buf, r.body = nil, nil
	}
	if o.queuePiece(r, off, n, hole) {
		o.c.out.drain()
	}
}

// readWhole starts a read whose data must be sent in one message. The message is a simple
// reply, or it is a single chunk because the request has the flag DF. If the read is long
// or memory is short, the data do not fit in one buffer. They are then read while the
// reply is being sent.
func (o *op) readWhole() error {
	c := o.c
	b, err := c.allocate(int(min(o.Len, maxPiece)))
	if err != nil {
		o.abandon(err)
		return err
	}
	r := &o.first
	r.last, r.buf = true, b
	go func() {
		fits := int(o.Len) == len(b.b)
		if fits || !c.structured && o.failedBefore() {
			if err := o.readAll(b.b); err != nil {
				o.fail(err)
				o.sendEnd(r)
				return
			}
		}
		if fits {
			r.body = b.b
			o.setData(r, int64(o.Off), len(b.b), true)
		} else {
			o.setData(r, int64(o.Off), int(o.Len), false)
			r.stream = o.stream
		}
		c.out.send(r)
	}()
	return nil
}

// readAll reads the range of the request, to find out whether all of it can be read. If
// the buffer b is shorter than the range, readAll reads one piece after another into
// the same buffer, so that only the last piece remains there.
func (o *op) readAll(b []byte) error {
	for off, end := int64(o.Off), o.end(); off < end; off += int64(len(b)) {
		b = b[:min(int64(len(b)), end-off)]
		if err := o.readAt(b, off); err != nil {
			return err
		}
	}
	return nil
}

// The method stream writes the data of a read to w, and returns the bytes with which the
// reply ends (see reply.stream). The kernel may already have copied the beginning of the
// data from a file. The parameter copied is the length of this beginning, which is not
// written again.
//
// If the disk fails during a structured reply, stream writes zeros in place of the
// missing data, and the reply reports the error at its end. A simple reply can no longer
// report an error. In this case stream records in badRanges the range that could not be
// read, and returns the error, which ends the connection. The next read of this range
// then reads all its data before its reply begins.
func (o *op) stream(w io.Writer, copied int64) (tail []byte, err error) {
	off, end := int64(o.Off)+copied, o.end()
	var b []byte
	if o.first.buf != nil {
		b = o.first.buf.b
	} else if off < end {
		b = make([]byte, min(end-off, 64<<10))
	}
	for off < end {
		p := b[:min(int64(len(b)), end-off)]
		if err := o.c.out.pause(func() error { return o.readAt(p, off) }); err != nil {
			o.fail(err)
			if o.dropped {
				return nil, err
			}
			if !o.c.structured {
				o.c.s.badRanges.add(o.c.export.Name, off, end)
				return nil, err
			}
			if err := pad(w, end-off); err != nil {
				return nil, err
			}
			break
		}
		if _, err := w.Write(p); err != nil {
			return nil, err
		}
		off += int64(len(p))
	}
	if !o.c.structured {
		return nil, nil
	}
	return o.appendEnd(o.first.head[:0]), nil // the head was sent before, so its array is free
}

// The function pad writes n zeros in place of data that could not be read.
func pad(w io.Writer, n int64) error {
	zeros := make([]byte, min(n, 64<<10))
	for n > 0 {
		k := min(n, int64(len(zeros)))
		if _, err := w.Write(zeros[:k]); err != nil {
			return err
		}
		n -= k
	}
	return nil
}

// The method prefetch asks the kernel to load the n bytes at the given offset into
// its page cache. It does nothing for disks that are not files, since the server has
// no cache of its own.
func (o *op) prefetch(off, n int64) {
	files := o.c.export.files
	if files == nil || n == 0 {
		return
	}
	if f, pos, have, ok := files.InFile(off); ok {
		// fadvise is only a hint, so its error does not matter.
		_ = unix.Fadvise(int(f.Fd()), pos, min(n, have), unix.FADV_WILLNEED)
	}
}
