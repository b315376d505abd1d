package server

import (
	"encoding/binary"
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

// read plans a read and starts its pieces.
func (o *op) read() error {
	c, e := o.c, o.c.e
	if o.Len == 0 {
		o.post()
		return nil
	}
	off, n := int64(o.Off), int64(o.Len)
	if c.out.raw != nil && e.files != nil && n >= minFile && o.mayFailMidway() {
		if f, pos, have, ok := e.files.InFile(off); ok && have >= n {
			o.prefetch(off, n)
			r := &o.first
			o.wholeHead(r, false)
			r.last, r.file, r.pos, r.length = true, f, pos, n
			c.owe(r)
			return nil
		}
	}
	if n < minFile && e.files != nil {
		if done, err := o.readNow(); done || err != nil {
			return err
		}
	}
	if !c.structured || o.Flags&nbd.FlagDF != 0 {
		return o.readWhole()
	}
	var few [4]source.Extent
	plan := e.plan(few[:0], off, n)
	r := &o.first
	for i, p := range plan {
		final := i == len(plan)-1
		for p.Len > 0 {
			if r == nil {
				r = &reply{op: o}
			}
			n, hole := p.Len, p.Kind == source.Zero
			if !hole {
				b, err := c.memory(int(p.Len))
				if err != nil {
					o.abandon(err)
					return err
				}
				r.buf, r.body, n = b, b.b, int64(len(b.b))
			}
			if !final || n < p.Len {
				o.add()
			}
			if !hole {
				go o.readPiece(r, p.Off)
			} else if o.piece(r, nbd.ChunkHole, p.Off, int(n)) {
				c.owes = true
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
func (o *op) mayFailMidway() bool {
	return o.c.structured || o.Len > maxPiece && !o.suspected()
}

// suspected reports whether a read in the range failed before.
func (o *op) suspected() bool {
	return o.c.s.suspects.touch(o.c.e.Name, int64(o.Off), o.to())
}

// readNow answers a short read that needs no waiting for the disk, without a
// goroutine of its own. It is done unless the bytes are not in the page cache.
func (o *op) readNow() (done bool, err error) {
	c := o.c
	f, pos, have, ok := c.e.files.InFile(int64(o.Off))
	if !ok || have < int64(o.Len) || c.e.slow.Load() {
		return false, nil
	}
	b, err := c.memory(int(o.Len))
	if err != nil {
		o.abandon(err)
		return true, err
	}
	if len(b.b) < int(o.Len) {
		c.s.memory.put(b)
		return false, nil
	}
	n, err := unix.Preadv2(int(f.Fd()), [][]byte{b.b}, pos, unix.RWF_NOWAIT)
	if n != len(b.b) {
		if err == unix.EOPNOTSUPP || err == unix.ENOSYS {
			c.e.slow.Store(true)
		}
		c.s.memory.put(b)
		return false, nil
	}
	r := &o.first
	r.last, r.buf, r.body = true, b, b.b
	o.wholeHead(r, true)
	c.owe(r)
	return true, nil
}

// plan cuts a range into what is known to be zero and what is to be read, in
// pieces of at most maxPiece.
func (f *facts) plan(plan []source.Extent, off, n int64) []source.Extent {
	end := off + n
	for off < end {
		p := source.Extent{Off: off, Len: end - off}
		if e, ok := f.extents.known(off); ok && (e.Kind == source.Zero || e.End() < end) && len(plan) < maxSplit {
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

// piece queues a part of a structured reply: n bytes at off, which r.body has or
// which are a hole. The last part ends the reply; an error takes the place of
// its data. It reports whether the caller has to drain the outbox.
func (o *op) piece(r *reply, t nbd.ChunkType, off int64, n int) (drain bool) {
	// Under the lock, so that the last one is queued last.
	o.mu.Lock()
	defer o.mu.Unlock()
	o.left--
	r.last = o.left == 0
	if o.errno != 0 || o.dropped {
		if r.last {
			o.end(r)
		} else {
			r.n, r.body = 0, nil
		}
	} else {
		chunk := nbd.Chunk{Type: t, Cookie: o.Cookie, Len: uint32(8 + n)}
		if t == nbd.ChunkHole {
			chunk.Len = 8 + 4
		}
		if r.last {
			chunk.Flags = nbd.ChunkDone
		}
		h := binary.BigEndian.AppendUint64(chunk.Append(r.head[:0]), uint64(off))
		if t == nbd.ChunkHole {
			h = binary.BigEndian.AppendUint32(h, uint32(n))
		}
		r.n = len(h)
	}
	return o.c.out.queue(r)
}

func (o *op) readAt(p []byte, off int64) error {
	return o.call(func() error {
		n, err := o.c.e.disk.ReadAt(p, off)
		if n == len(p) && errors.Is(err, io.EOF) {
			return nil
		}
		return err
	})
}

func (o *op) readPiece(r *reply, off int64) {
	t := nbd.ChunkData
	if err := o.readAt(r.body, off); err != nil {
		o.fault(err)
	} else if zero.Is(r.body) {
		t = nbd.ChunkHole
	}
	n := len(r.body)
	if t == nbd.ChunkHole {
		o.c.s.memory.put(r.buf)
		r.buf, r.body = nil, nil
	}
	if o.piece(r, t, off, n) {
		o.c.out.drain()
	}
}

// readWhole reads for a reply whose data have to be in one piece. What does not
// fit in the memory that there is, is read while the reply is sent.
func (o *op) readWhole() error {
	c := o.c
	b, err := c.memory(int(min(o.Len, maxPiece)))
	if err != nil {
		o.abandon(err)
		return err
	}
	r := &o.first
	r.last, r.buf = true, b
	go func() {
		fits := int(o.Len) == len(b.b)
		if fits || !c.structured && o.suspected() {
			if err := o.readThrough(b.b); err != nil {
				o.fault(err)
				o.finish(r)
				return
			}
		}
		if fits {
			r.body = b.b
			o.wholeHead(r, true)
		} else {
			o.wholeHead(r, false)
			r.stream = o.stream
		}
		c.out.send(r)
	}()
	return nil
}

// readThrough reads all that was asked for, piece by piece into b.
func (o *op) readThrough(b []byte) error {
	for off, end := int64(o.Off), o.to(); off < end; off += int64(len(b)) {
		b = b[:min(int64(len(b)), end-off)]
		if err := o.readAt(b, off); err != nil {
			return err
		}
	}
	return nil
}

// stream writes the data of a read, and what ends its reply.
func (o *op) stream(w io.Writer) error { return o.streamFrom(w, o.first.buf.b, int64(o.Off)) }

func (o *op) streamFrom(w io.Writer, b []byte, off int64) error {
	end := o.to()
	for off < end {
		p := b[:min(int64(len(b)), end-off)]
		if err := o.c.out.pause(func() error { return o.readAt(p, off) }); err != nil {
			return o.endOf(w, err, end-off)
		}
		if _, err := w.Write(p); err != nil {
			return err
		}
		off += int64(len(p))
	}
	return o.endOf(w, nil, 0)
}

// endOf ends a reply whose data were sent but for missing bytes, which could
// not be read.
func (o *op) endOf(w io.Writer, fault error, missing int64) error {
	if fault != nil {
		o.fault(fault)
		if o.dropped {
			return fault
		}
		if !o.c.structured { // the head said that there was none
			o.c.s.suspects.add(o.c.e.Name, o.to()-missing, o.to())
			return fault
		}
		if err := pad(w, missing); err != nil {
			return err
		}
	}
	if !o.c.structured {
		return nil
	}
	var end []byte
	if o.errno == 0 {
		end = nbd.Chunk{Flags: nbd.ChunkDone, Type: nbd.ChunkNone, Cookie: o.Cookie}.Append(end)
	} else {
		end = nbd.Chunk{Flags: nbd.ChunkDone, Type: nbd.ChunkError, Cookie: o.Cookie, Len: uint32(6 + len(o.text))}.Append(end)
		end = appendError(end, o.errno, o.text)
	}
	_, err := w.Write(end)
	return err
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
	files := o.c.e.files
	if files == nil || n == 0 {
		return
	}
	if f, pos, have, ok := files.InFile(off); ok {
		// Only a hint.
		_ = unix.Fadvise(int(f.Fd()), pos, min(n, have), unix.FADV_WILLNEED)
	}
}
