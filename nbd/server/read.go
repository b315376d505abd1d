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
	// minFile is the shortest read for which the kernel sends from the file:
	// below, a copy through memory costs less.
	minFile = 32 << 10
	// minHole is the shortest hole that a read is split for.
	minHole = 64 << 10
	// maxSplit bounds the pieces of a read.
	maxSplit = 64
	// maxCache bounds what CACHE reads ahead.
	maxCache = nbd.MaxPayload
)

// read starts a read in the way that fits its length, its place and the client. An
// error is the connection's.
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

// sendFile queues a reply whose data the kernel copies from a file to the socket.
// It reports false, and does nothing, where the data are not in one file, where
// the connection is not a socket, and where a copy through memory is better.
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

// readPieces sends a chunk for each hole and each piece of data, in any order.
// Known holes are not read.
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

// mayFailMidway reports whether the reply may begin before all of the data were
// read. A structured reply can tell of an error at its end. A simple one can't, so
// that it begins early only where the data need not fit in memory, and nothing in
// the range has failed before.
func (o *op) mayStream() bool {
	return o.c.structured || o.Len > maxPiece && !o.failedBefore()
}

// suspected reports whether a read in the range failed before.
func (o *op) failedBefore() bool {
	return o.c.s.badRanges.overlap(o.c.export.Name, int64(o.Off), o.end())
}

// readNow answers a short read that needs no waiting for the disk, without a
// goroutine of its own. It is done unless the bytes are not in the page cache.
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

// plan cuts a range into what is known to be zero and what is to be read, in
// pieces of at most maxPiece.
func (f *facts) plan(plan []source.Extent, off, n int64) []source.Extent {
	end := off + n
	for off < end {
		p := source.Extent{Off: off, Len: end - off}
		if e, ok := f.extents.cached(off); ok && (e.Kind == source.Zero || e.End() < end) && len(plan) < maxSplit {
			p.Kind, p.Len = e.Kind, min(e.Len, end-off)
		}
		if p.Kind != source.Zero || p.Len < min(minHole, n) {
			p.Kind, p.Len = source.Data, min(p.Len, maxPiece)
			if k := len(plan) - 1; k >= 0 && plan[k].Kind == source.Data && plan[k].Len+p.Len <= maxPiece {
				plan[k].Len += p.Len
				off += p.Len
				continue
			}
		}
		plan = append(plan, p)
		off += p.Len
	}
	return plan
}

// piece queues a part of a structured reply: n bytes at off, which r.body holds
// unless they are a hole. The last part ends the reply; after an error no more
// data are sent. It reports whether the caller has to drain the outbox.
func (o *op) queuePiece(r *reply, off int64, n int, hole bool) (drain bool) {
	// The reply is queued under the lock, so that the last one is queued last.
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

func (o *op) readAt(p []byte, off int64) error {
	return o.callDisk(func() error {
		n, err := o.c.export.disk.ReadAt(p, off)
		if n == len(p) && errors.Is(err, io.EOF) {
			return nil
		}
		return err
	})
}

// readPiece reads a piece into r.body and sends it, as a hole if it is all zeros.
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

// readWhole reads for a reply whose data have to be in one piece. What does not
// fit in the memory that there is, is read while the reply is sent.
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

// readThrough reads all that was asked for, piece by piece into b.
func (o *op) readAll(b []byte) error {
	for off, end := int64(o.Off), o.end(); off < end; off += int64(len(b)) {
		b = b[:min(int64(len(b)), end-off)]
		if err := o.readAt(b, off); err != nil {
			return err
		}
	}
	return nil
}

// stream writes the data of a read without the first sent bytes, and returns the
// message that ends the reply: see reply.stream. Data that cannot be read are
// replaced by zeros in a structured reply, which reports the error at its end.
// A simple reply cannot report the error any more, so that stream returns it and
// the connection ends; the range is noted, so that the next read of it is
// checked before its reply begins.
func (o *op) stream(w io.Writer, sent int64) (tail []byte, err error) {
	off, end := int64(o.Off)+sent, o.end()
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
	return o.appendEnd(o.first.head[:0]), nil // the head was sent, and its array is free
}

// pad writes n zeros, in the place of data that could not be read.
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

// prefetch asks the kernel to read ahead where it has the file; elsewhere there
// is nothing to keep it in.
func (o *op) prefetch(off, n int64) {
	files := o.c.export.files
	if files == nil || n == 0 {
		return
	}
	if f, pos, have, ok := files.InFile(off); ok {
		// Only a hint.
		_ = unix.Fadvise(int(f.Fd()), pos, min(n, have), unix.FADV_WILLNEED)
	}
}
