package server

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"runtime/debug"
	"sync"
	"time"

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

// op is a request in work. It is worked on as one piece or more, at once and in
// any order; the last one that is done sends the end of the reply.
type op struct {
	nbd.Request
	c     *conn
	start time.Time
	first reply // for the first piece; the others have their own

	mu      sync.Mutex
	left    int // pieces that are not done, at least one until all are begun
	errno   nbd.Errno
	text    string
	dropped bool // there is no reply: the connection or the server ends
}

// to is the offset of the first byte after the request.
func (o *op) to() int64 { return int64(o.Off) + int64(o.Len) }

// begin checks a request and starts it. An error ends the connection.
func (c *conn) begin(r nbd.Request) error {
	o, err := c.newOp(r)
	if err != nil {
		return err
	}
	if c.ending.Load() { // it came before the end, and was not begun
		o.drop()
		return ErrShutdown
	}
	errno, why := o.check()
	if r.Type == nbd.CmdWrite {
		return o.write(errno, why)
	}
	if errno != 0 {
		o.refuse(errno, why)
		return nil
	}
	switch r.Type {
	case nbd.CmdRead:
		return o.read()
	case nbd.CmdBlockStatus:
		return o.blockStatus()
	case nbd.CmdFlush:
		if c.e.writable == nil {
			o.post()
			return nil
		}
		return o.run(func() error { return nil }, true)
	case nbd.CmdCache:
		o.prefetch(int64(r.Off), min(int64(r.Len), maxCache))
		o.post()
		return nil
	case nbd.CmdTrim:
		return o.run(func() error {
			return c.e.writable.Trim(c.s.life, int64(r.Off), int64(r.Len))
		}, r.Flags&nbd.FlagFUA != 0)
	case nbd.CmdWriteZeroes:
		return o.run(func() error {
			return c.e.writable.ZeroAt(c.s.life, int64(r.Off), int64(r.Len), zeroFlags(r.Flags))
		}, r.Flags&nbd.FlagFUA != 0)
	}
	panic("server: a command that check let through")
}

// check returns why a request can't be done: by its command, its flags, its
// place, and what the export allows.
func (o *op) check() (nbd.Errno, string) {
	e := o.c.e
	allowed := nbd.FlagFUA // wherever it is offered, it may come with any command
	writes := false
	beyond := nbd.EINVAL
	switch o.Type {
	case nbd.CmdRead:
		if o.c.structured {
			allowed |= nbd.FlagDF
		}
	case nbd.CmdWrite:
		writes, beyond = true, nbd.ENOSPC
	case nbd.CmdFlush, nbd.CmdCache:
	case nbd.CmdTrim:
		writes = true
	case nbd.CmdWriteZeroes:
		writes, beyond = true, nbd.ENOSPC
		allowed |= nbd.FlagNoHole | nbd.FlagFastZero
	case nbd.CmdBlockStatus:
		allowed |= nbd.FlagReqOne
	default:
		return nbd.EINVAL, "unknown command"
	}
	switch size := uint64(e.size); {
	case writes && e.writable == nil:
		return nbd.EPERM, "the export is read-only"
	case o.Flags&^allowed != 0:
		return nbd.EINVAL, "flags that the command does not take"
	case o.Type == nbd.CmdFlush && (o.Off != 0 || o.Len != 0):
		return nbd.EINVAL, "flush of a range"
	case o.Off > size || uint64(o.Len) > size-o.Off:
		return beyond, "past the end of the export"
	case (o.Type == nbd.CmdRead || o.Type == nbd.CmdWrite) && o.Len > nbd.MaxPayload:
		return nbd.EINVAL, "longer than the maximum of 32 MiB"
	case o.Type == nbd.CmdBlockStatus && len(o.c.contexts) == 0:
		return nbd.EINVAL, "no metadata context was negotiated"
	case o.Type == nbd.CmdBlockStatus && o.Len == 0:
		return nbd.EINVAL, "block status of nothing"
	}
	return 0, ""
}

// refuse answers with an error that is the client's. It is for the goroutine
// that reads requests.
func (o *op) refuse(e nbd.Errno, why string) {
	o.errno, o.text = e, why
	o.post()
}

// drop ends a request without a reply. It is for the goroutine that reads
// requests.
func (o *op) drop() {
	o.dropped = true
	o.post()
}

// fault notes an error that is the disk's. The client gets the number and what
// failed, the log gets all. A request that failed because the server ends gets
// no reply: to a guest any error is one of its disk, and a connection that is
// closed is one to open again.
func (o *op) fault(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.errno != 0 || o.dropped {
		return
	}
	// What a disk returns after it was told to end says little, except of a
	// flush: if data were lost, the next server would not know.
	if o.c.s.endedWith(err) || o.c.s.killed.Load() && o.Type != nbd.CmdFlush && o.Flags&nbd.FlagFUA == 0 {
		o.dropped = true
		return
	}
	o.errno = errnoOf(err)
	if o.c.ctx.Err() == nil {
		o.c.s.o.Log.Error("request failed", "export", o.c.e.Name, "request", o.Type, "offset", o.Off, "length", o.Len, "error", err)
	}
	o.text = fmt.Sprintf("%v of %d bytes at %d: %v", o.Type, o.Len, o.Off, o.errno)
}

// finish sends a reply without data: an error, or that all is done.
func (o *op) finish(r *reply) { o.c.out.send(o.end(r)) }

// post is finish for the goroutine that reads requests.
func (o *op) post() { o.c.owe(o.end(&o.first)) }

// end makes r the end of the reply, without data.
func (o *op) end(r *reply) *reply {
	r.last, r.body = true, nil
	h := r.head[:0]
	switch {
	case o.dropped:
	case !o.c.structured:
		h = nbd.SimpleReply{Errno: o.errno, Cookie: o.Cookie}.Append(h)
	case o.errno == 0:
		h = nbd.Chunk{Flags: nbd.ChunkDone, Type: nbd.ChunkNone, Cookie: o.Cookie}.Append(h)
	default:
		h = nbd.Chunk{Flags: nbd.ChunkDone, Type: nbd.ChunkError, Cookie: o.Cookie, Len: uint32(6 + len(o.text))}.Append(h)
		r.body = appendError(nil, o.errno, o.text)
	}
	r.n = len(h)
	return r
}

// add counts a piece that is to follow the one that is begun.
func (o *op) add() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.left++
}

// done counts a piece as done, and reports whether it was the last one.
func (o *op) done() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.left--
	return o.left == 0
}

// guard runs a piece. A panic in a disk is an error of the request: one broken
// image may not end the service of all others.
func (o *op) guard(piece func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			o.c.s.o.Log.Error("panic", "export", o.c.e.Name, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return piece()
}

// call is guard for a piece that calls the disk, when it is its turn.
func (o *op) call(piece func() error) error {
	leave, err := o.c.enterCall(o.c.s.life)
	if err != nil {
		return err
	}
	defer leave()
	return o.guard(piece)
}

// run does what takes no memory, and flushes after it where it has to be
// durable.
func (o *op) run(work func() error, flush bool) error {
	e := o.c.e
	go func() {
		err := o.call(func() error {
			if o.Len > 0 {
				if err := work(); err != nil {
					return err
				}
			}
			if flush {
				return e.writable.Flush(o.c.s.life)
			}
			return nil
		})
		if o.Type != nbd.CmdFlush {
			e.extents.changed(int64(o.Off), int64(o.Len))
		}
		switch {
		case err != nil && o.Flags&nbd.FlagFastZero != 0 && errors.Is(err, errors.ErrUnsupported):
			o.errno, o.text = nbd.ENOTSUP, "not faster than writing"
		case err != nil:
			o.fault(err)
		}
		o.finish(&o.first)
	}()
	return nil
}

// write takes the data of a write off the wire, and writes them piece by piece
// unless the write is refused.
func (o *op) write(errno nbd.Errno, why string) error {
	c := o.c
	if errno != 0 {
		c.pay()
		err := error(nil)
		if o.Len > maxDiscard {
			err = fmt.Errorf("write of %d bytes: want at most %d", o.Len, nbd.MaxPayload)
		} else if _, err = io.CopyN(io.Discard, c.r, int64(o.Len)); err != nil {
			err = fmt.Errorf("data of a write: %w", err)
		}
		if err != nil {
			c.lost(err)
			o.drop()
			return err
		}
		o.refuse(errno, why)
		return nil
	}
	if o.Len == 0 {
		o.post()
		return nil
	}
	for off, end := int64(o.Off), o.to(); off < end; {
		b, err := c.receive(off, end-off)
		if err != nil {
			err = fmt.Errorf("data of a write: %w", err)
			o.abandon(err)
			return err
		}
		at := off
		if off += int64(len(b.b)); off < end {
			o.add()
		}
		go o.writePiece(b, at)
	}
	return nil
}

// abandon ends a request of which not all pieces can be begun because of err,
// which is the connection's.
func (o *op) abandon(err error) {
	o.c.lost(err)
	o.mu.Lock()
	o.left--
	last := o.left == 0
	o.dropped = true
	o.mu.Unlock()
	if last {
		o.finish(&reply{op: o})
	}
}

func (o *op) writePiece(b *buffer, off int64) {
	e := o.c.e
	err := o.call(func() error {
		_, err := e.writable.WriteAt(b.b, off)
		return err
	})
	e.extents.changed(off, int64(len(b.b)))
	o.c.s.memory.put(b)
	if err != nil {
		o.fault(err)
	}
	if !o.done() {
		return
	}
	if o.errno == 0 && !o.dropped && o.Flags&nbd.FlagFUA != 0 {
		if err := o.call(func() error { return e.writable.Flush(o.c.s.life) }); err != nil {
			o.fault(err)
		}
	}
	o.finish(&o.first)
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

// wholeHead makes the head of a reply whose data are in one piece; done says
// that nothing can go wrong after it.
func (o *op) wholeHead(r *reply, done bool) {
	h := r.head[:0]
	if !o.c.structured {
		h = nbd.SimpleReply{Cookie: o.Cookie}.Append(h)
	} else {
		chunk := nbd.Chunk{Type: nbd.ChunkData, Cookie: o.Cookie, Len: 8 + o.Len}
		if done {
			chunk.Flags = nbd.ChunkDone
		}
		h = binary.BigEndian.AppendUint64(chunk.Append(h), o.Off)
	}
	r.n = len(h)
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

// blockStatus answers with the allocation, of at most maxStatus extents.
func (o *op) blockStatus() error {
	c := o.c
	limit := maxStatus
	if o.Flags&nbd.FlagReqOne != 0 {
		limit = 1
	}
	b, err := c.memory(limit * 8 * len(c.contexts))
	if err != nil {
		o.abandon(err)
		return err
	}
	limit = min(limit, len(b.b)/8/len(c.contexts))
	perContext := limit * 8
	o.first.buf = b
	go func() {
		var lists [contexts][]byte
		err := o.guard(func() (err error) {
			for i, m := range c.contexts {
				room := b.b[i*perContext : i*perContext : (i+1)*perContext]
				if lists[i], err = m.status(c.ctx, c.e.extents, room, int64(o.Off), o.to(), limit); err != nil {
					return err
				}
			}
			return nil
		})
		if err != nil {
			o.fault(err)
			o.finish(&o.first)
			return
		}
		for i, m := range c.contexts {
			r := &o.first
			if i < len(c.contexts)-1 {
				r = &reply{op: o}
			} else {
				r.last = true
			}
			r.body = lists[i]
			chunk := nbd.Chunk{Type: nbd.ChunkBlockStatus, Cookie: o.Cookie, Len: uint32(4 + len(r.body))}
			if r.last {
				chunk.Flags = nbd.ChunkDone
			}
			h := binary.BigEndian.AppendUint32(chunk.Append(r.head[:0]), m.id)
			r.n = len(h)
			c.out.send(r)
		}
	}()
	return nil
}

const (
	// maxStatus is how many extents one answer has at most.
	maxStatus = 4096
	// contexts is how many metadata contexts there are.
	contexts = 2
)

// metaContext is a metadata context that a client has chosen.
type metaContext struct {
	name string
	id   uint32
	flag func(source.Extent) uint32
}

// status appends the extents of [off, end) and their flags to b, merged, at most
// limit of them.
func (m *metaContext) status(ctx context.Context, x *extents, b []byte, off, end int64, limit int) ([]byte, error) {
	length, flags := uint32(0), uint32(0)
	n := 0
	for off < end {
		e, err := x.at(ctx, off)
		if err != nil {
			return nil, err
		}
		e.Len = min(e.Len, end-off)
		if f := m.flag(e); length == 0 || f != flags {
			if length > 0 {
				b = binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, length), flags)
				if n++; n == limit {
					return b, nil
				}
			}
			length, flags = 0, f
		}
		length += uint32(e.Len)
		off = e.End()
	}
	return binary.BigEndian.AppendUint32(binary.BigEndian.AppendUint32(b, length), flags), nil
}

// zeroFlags returns what the flags of a request to write zeros mean to a disk.
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
