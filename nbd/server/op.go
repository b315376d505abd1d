package server

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
)

// op is a request in work. It is worked on as one piece or more, at once and in
// any order; the last one that is done sends the end of the reply.
type op struct {
	nbd.Request
	c     *conn
	start time.Time
	first reply // for the first piece; the others have their own

	mu      sync.Mutex
	pieces  int // pieces that are not done, at least one until all are begun
	errno   nbd.Errno
	text    string
	dropped bool // there is no reply: the connection or the server ends
}

// end is the offset of the first byte after the request.
func (o *op) end() int64 { return int64(o.Off) + int64(o.Len) }

// startRequest checks a request and starts it. An error ends the connection.
func (c *conn) startRequest(r nbd.Request) error {
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
		if c.export.writable == nil {
			o.queueEnd()
			return nil
		}
		return o.runCommand(func() error { return nil }, true)
	case nbd.CmdCache:
		o.prefetch(int64(r.Off), min(int64(r.Len), maxCache))
		o.queueEnd()
		return nil
	case nbd.CmdTrim:
		return o.runCommand(func() error {
			return c.export.writable.Trim(c.s.disksCtx, int64(r.Off), int64(r.Len))
		}, r.Flags&nbd.FlagFUA != 0)
	case nbd.CmdWriteZeroes:
		return o.runCommand(func() error {
			return c.export.writable.ZeroAt(c.s.disksCtx, int64(r.Off), int64(r.Len), zeroFlags(r.Flags))
		}, r.Flags&nbd.FlagFUA != 0)
	}
	panic("server: a command that check let through")
}

// refuse answers with an error that is the client's. It is for the goroutine
// that reads requests.
func (o *op) refuse(e nbd.Errno, why string) {
	o.errno, o.text = e, why
	o.queueEnd()
}

// drop ends a request without a reply. It is for the goroutine that reads
// requests.
func (o *op) drop() {
	o.dropped = true
	o.queueEnd()
}

// fault notes an error that is the disk's. The client gets the number and what
// failed, the log gets all. A request that failed because the server ends gets
// no reply: to a guest any error is one of its disk, and a connection that is
// closed is one to open again.
func (o *op) fail(err error) {
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
		o.c.s.o.Log.Error("request failed", "export", o.c.export.Name, "request", o.Type, "offset", o.Off, "length", o.Len, "error", err)
	}
	o.text = fmt.Sprintf("%v of %d bytes at %d: %v", o.Type, o.Len, o.Off, o.errno)
}

// finish sends a reply without data: an error, or that all is done.
func (o *op) sendEnd(r *reply) {
	o.setEnd(r)
	o.c.out.send(r)
}

// post is finish for the goroutine that reads requests.
func (o *op) queueEnd() {
	o.setEnd(&o.first)
	o.c.out.queueReply(&o.first)
}

// add counts a piece that is to follow the one that is begun.
func (o *op) addPiece() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pieces++
}

// done counts a piece as done, and reports whether it was the last one.
func (o *op) pieceDone() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pieces--
	return o.pieces == 0
}

// guard runs a piece. A panic in a disk is an error of the request: one broken
// image may not end the service of all others.
func (o *op) recoverPanic(piece func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			o.c.s.o.Log.Error("panic", "export", o.c.export.Name, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return piece()
}

// call is guard for a piece that calls the disk, when it is its turn.
func (o *op) callDisk(piece func() error) error {
	leave, err := o.c.acquireCall(o.c.s.disksCtx)
	if err != nil {
		return err
	}
	defer leave()
	return o.recoverPanic(piece)
}

// abandon ends a request of which not all pieces can be begun because of err,
// which is the connection's.
func (o *op) abandon(err error) {
	o.c.failUnlessEnding(err)
	o.mu.Lock()
	o.pieces--
	last := o.pieces == 0
	o.dropped = true
	o.mu.Unlock()
	if last {
		o.sendEnd(&reply{op: o})
	}
}

// newOp begins a request when there is room for it. It returns ErrShutdown when
// the server ends meanwhile.
func (c *conn) newOp(r nbd.Request) (*op, error) {
	select {
	case c.slots <- struct{}{}:
	default:
		c.out.flushReplies()
		select {
		case c.slots <- struct{}{}:
		case <-c.ctx.Done():
			return nil, context.Cause(c.ctx)
		case <-c.s.stopping:
			return nil, ErrShutdown
		}
	}
	c.running.Add(1)
	o := &op{Request: r, c: c, start: time.Now(), pieces: 1}
	o.first.op = o
	return o, nil
}

// sent gives up what a reply held, after it was sent or the connection failed.
func (c *conn) replySent(r *reply) {
	if r.buf != nil {
		c.s.memory.release(r.buf)
		r.buf, r.body = nil, nil
	}
	if r.last {
		o := r.op
		c.s.o.Stats.add(o.Type, o.Len, time.Since(o.start), o.errno != 0 || o.dropped)
		<-c.slots
		c.running.Done()
	}
}
