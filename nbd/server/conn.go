package server

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"vddkcp/nbd"
)

const (
	// maxRequests is how many requests of a connection are in work at once; no
	// more are read meanwhile.
	maxRequests = 64
	// maxDiscard is the longest write whose data are skipped, to refuse it in
	// order. A longer one can't be meant.
	maxDiscard = 2 * nbd.MaxPayload
	// readBuffer is what a connection has for the requests that come. Longer
	// data go past it.
	readBuffer = 4 << 10
)

// conn is a connection: first in the handshake, then in the transmission.
type conn struct {
	s    *Server
	net  net.Conn // or TLS over it
	base net.Conn // the socket
	ctx  context.Context
	end  context.CancelCauseFunc

	flags      nbd.HandshakeFlags
	e          *export // nil: not open
	structured bool
	contexts   []metaContext
	contextsOf string // the export that they were chosen for
	entered    bool   // Server.enter was called

	holder  holder // of memory
	owes    bool   // the goroutine that reads requests has to drain out
	r       *bufio.Reader
	slots   chan struct{} // full: as many requests as may be are in work
	running sync.WaitGroup
	out     outbox

	ending   atomic.Bool // the server ends
	mu       sync.Mutex
	deadline time.Time // of the handshake; zero: none
}

func newConn(ctx context.Context, s *Server, raw net.Conn) *conn {
	c := &conn{s: s, net: raw, base: raw}
	c.out.c = c
	// The connection outlives ctx by the grace.
	c.ctx, c.end = context.WithCancelCause(s.life)
	stop := context.AfterFunc(ctx, c.shutdown)
	context.AfterFunc(c.ctx, func() { stop() })
	return c
}

// serve serves the client until it leaves. An error says what it did wrong, or
// why it could not be served.
func (c *conn) serve() error {
	defer c.end(net.ErrClosed)
	defer func() {
		if c.e != nil {
			c.s.release(c.e)
		}
		if c.entered {
			c.s.leave(c)
		}
	}()
	ready, err := c.handshake()
	if err != nil || !ready {
		if c.ending.Load() {
			return nil
		}
		return err
	}
	return c.transmit()
}

// fail ends the connection; the first reason counts.
func (c *conn) fail(err error) {
	c.end(err)
	c.base.Close()
}

// failed reports whether fail was called. The end of the server is no failure:
// there are replies to send.
func (c *conn) failed() bool {
	ended := context.Cause(c.ctx)
	return ended != nil && ended != ErrShutdown
}

// shutdown makes the connection refuse requests, and soon read no more. What is
// in work may end until the grace is over; then the disks fail.
func (c *conn) shutdown() {
	c.mu.Lock()
	c.ending.Store(true)
	c.base.SetReadDeadline(time.Now().Add(lastRequests))
	c.mu.Unlock()
	over := time.AfterFunc(c.s.o.Grace, func() {
		c.s.kill(ErrShutdown)
		c.base.SetWriteDeadline(time.Now().Add(lastWrites))
	})
	context.AfterFunc(c.ctx, func() { over.Stop() })
}

// limit sets or lifts the deadline of the handshake.
func (c *conn) limit(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending.Load() {
		return
	}
	c.deadline = t
	c.base.SetDeadline(t)
}

// transmit takes requests until the client leaves, and waits for those in work.
func (c *conn) transmit() error {
	c.r = bufio.NewReaderSize(c.net, readBuffer)
	c.slots = make(chan struct{}, maxRequests)
	c.out.raw = socket(c.net)
	err := c.requests()
	if c.ended(err) {
		err = nil
	}
	c.pay()
	c.running.Wait()
	if c.failed() {
		return context.Cause(c.ctx)
	}
	if closing, ok := c.net.(interface{ CloseWrite() error }); ok && c.net != c.base {
		c.net.SetWriteDeadline(time.Now().Add(lastWrites))
		closing.CloseWrite() // TLS: what was sent is all
	}
	if c.ending.Load() {
		c.linger()
	}
	return err
}

// linger waits until the client has taken its replies: closing a socket while
// there is something to read from it can take them back.
func (c *conn) linger() {
	if closing, ok := c.base.(interface{ CloseWrite() error }); ok {
		closing.CloseWrite()
		c.base.SetReadDeadline(time.Now().Add(lastWrites))
		io.CopyN(io.Discard, c.base, maxDiscard)
	}
}

func (c *conn) requests() error {
	var b [nbd.RequestSize]byte
	for {
		if _, err := io.ReadFull(c.r, b[:]); err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("next request: %w", err)
		}
		r, err := nbd.ParseRequest(&b)
		if err != nil {
			return err
		}
		if r.Type == nbd.CmdDisconnect {
			return nil
		}
		if err := c.begin(r); err != nil {
			return err
		}
		if c.r.Buffered() < nbd.RequestSize {
			c.pay()
		}
	}
}

// owe queues a reply that is sent at the next pay at the latest. It is for the
// goroutine that reads requests: those that came together get their replies
// together.
func (c *conn) owe(r *reply) {
	if c.out.queue(r) {
		c.owes = true
	}
}

// pay has what is queued sent, by another goroutine: a client may send a while
// before it takes the first reply. It is called before waiting for anything.
func (c *conn) pay() {
	if c.owes {
		c.owes = false
		go c.out.drain()
	}
}

// memory returns n bytes for a request.
func (c *conn) memory(n int) (*buffer, error) {
	if b := c.s.memory.try(&c.holder, n); b != nil {
		return b, nil
	}
	c.pay()
	return c.s.memory.get(c.ctx, &c.holder, n)
}

// lost ends the connection because of err, unless that is only that the server
// ends and there are replies to send. It returns what to answer then.
func (c *conn) lost(err error) nbd.Errno {
	if c.ended(err) {
		return nbd.ESHUTDOWN
	}
	c.fail(err)
	return nbd.EIO
}

// ended reports whether err comes from the end of the server.
func (c *conn) ended(err error) bool {
	return c.ending.Load() && (errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, ErrShutdown))
}

// newOp begins a request when there is room for it.
func (c *conn) newOp(r nbd.Request) (*op, error) {
	select {
	case c.slots <- struct{}{}:
	default:
		c.pay()
		select {
		case c.slots <- struct{}{}:
		case <-c.ctx.Done():
			return nil, context.Cause(c.ctx)
		}
	}
	c.running.Add(1)
	o := &op{Request: r, c: c, start: time.Now()}
	o.first.op = o
	return o, nil
}

// sent gives up what a reply held, after it was sent or the connection failed.
func (c *conn) sent(r *reply) {
	if r.buf != nil {
		c.s.memory.put(r.buf)
		r.buf, r.body = nil, nil
	}
	if r.last {
		o := r.op
		c.s.o.Stats.add(o.Type, o.Len, time.Since(o.start), o.errno != 0)
		<-c.slots
		c.running.Done()
	}
}
