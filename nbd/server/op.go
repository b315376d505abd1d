package server

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
)

// The type op stands for a request in progress. Its data are processed in one or more
// pieces, which run concurrently and finish in any order. The piece that finishes last
// sends the end of the reply.
type op struct {
	nbd.Request
	c     *conn
	start time.Time
	first reply // message for the first piece; each further piece has a message of its own

	mu      sync.Mutex
	pieces  int       // pieces that are not finished, plus the next piece to be started
	errno   nbd.Errno // error number for the reply; 0: the request succeeds
	text    string    // describes errno to the client
	dropped bool      // no reply is sent, because the connection or the server ends
}

// The method end returns the offset of the first byte after the range of the
// request.
func (o *op) end() int64 { return int64(o.Off) + int64(o.Len) }

// startRequest checks a request and starts it. Work that may wait for the disk runs in
// other goroutines. Only the goroutine that reads requests calls startRequest. If
// startRequest returns an error, the connection ends.
func (c *conn) startRequest(r nbd.Request) error {
	o, err := c.newOp(r)
	if err != nil {
		return err
	}
	if c.ending.Load() { // the request arrived before the shutdown and must not start now
		o.drop()
		return ErrShutdown
	}
	errno, why := o.check()
	if errno != 0 {
		if r.Type == nbd.CmdWrite {
			return o.skipWrite(errno, why)
		}
		o.refuse(errno, why)
		return nil
	}
	switch err := c.awaitRate(r); {
	case err == errGone && r.Type == nbd.CmdRead:
		o.drop() // requests that follow, such as writes, are still carried out
		return nil
	case err != nil && err != errGone: // an incomplete write fails when its data are received
		o.drop()
		return err
	}
	switch r.Type {
	case nbd.CmdRead:
		return o.read()
	case nbd.CmdWrite:
		return o.write()
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
	panic("server: check accepted an unknown command")
}

// The method refuse answers an invalid request with an error. Only the goroutine
// that reads requests calls it.
func (o *op) refuse(e nbd.Errno, why string) {
	o.errno, o.text = e, why
	o.queueEnd()
}

// The method drop ends a request without a reply. Only the goroutine that reads
// requests calls it.
func (o *op) drop() {
	o.dropped = true
	o.queueEnd()
}

// The method fail records an error of the disk. The client gets an error number and, in a
// structured reply, a text with the range of the request. The log gets the whole error.
//
// A request that failed because the server is shutting down gets no reply. If the NBD
// client of a guest got an error, the guest would see a fault of its disk. Without a
// reply the connection is closed, and the NBD client connects again.
func (o *op) fail(err error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.errno != 0 || o.dropped {
		return
	}
	// An error that the shutdown caused is not reported to the client. After the grace
	// period, disks whose context has ended may fail in any way. Therefore only the errors
	// of requests that flush the disk are reported then. The client must learn from them
	// that data were lost. A server that is started later cannot report the lost data,
	// because it does not know of the failed flush.
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

// sendEnd sends the last message that answers the request. The message reports success or
// an error: see setEnd. It is stored in the parameter r, whose previous content is lost.
// sendEnd may wait until the client receives the message.
func (o *op) sendEnd(r *reply) {
	o.setEnd(r)
	o.c.out.send(r)
}

// queueEnd queues the last message that answers the request. The message reports success
// or an error (see setEnd), and is stored in o.first. queueEnd does not wait for the
// client. Only the goroutine that reads requests calls queueEnd.
func (o *op) queueEnd() {
	o.setEnd(&o.first)
	o.c.out.queueReply(&o.first)
}

// addPiece counts one more piece of the request, before the piece is started.
func (o *op) addPiece() {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pieces++
}

// pieceDone counts a piece as finished. It reports whether all pieces of the request are
// finished.
func (o *op) pieceDone() bool {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pieces--
	return o.pieces == 0
}

// recoverPanic processes a piece of a request. It turns a panic into an error of the
// request, so that one broken image does not end the server.
func (o *op) recoverPanic(piece func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			o.c.s.o.Log.Error("panic", "export", o.c.export.Name, "panic", p, "stack", string(debug.Stack()))
			err = fmt.Errorf("panic: %v", p)
		}
	}()
	return piece()
}

// callDisk processes a piece of a request by calling the function piece, which calls the
// disk. If too many calls to disks are in progress, callDisk waits first: see
// acquireCall.
func (o *op) callDisk(piece func() error) error {
	release, err := o.c.acquireCall(o.c.s.disksCtx)
	if err != nil {
		return err
	}
	defer release()
	return o.recoverPanic(piece)
}

// The method abandon ends a request because its next piece cannot be started. The
// parameter err is the error of the connection that prevents this. Pieces that are
// already running are finished, but no reply is sent.
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

// newOp returns the op of a request as soon as fewer than maxRequests requests of the
// connection are in progress. It returns ErrShutdown if the server shuts down first.
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

// replySent releases the resources of a reply. It is called after the reply was sent, or
// when the connection has failed. After the last reply that answers a request, another
// request may start.
func (c *conn) replySent(r *reply) {
	if r.buf != nil {
		c.s.memory.release(r.buf)
		r.buf, r.body = nil, nil
	}
	if r.last {
		o := r.op
		c.visit.add(o.Request, o.errno != 0 || o.dropped)
		c.s.o.Stats.add(o.Type, o.Len, time.Since(o.start), o.errno != 0 || o.dropped)
		<-c.slots
		c.running.Done()
	}
}
