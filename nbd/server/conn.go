package server

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
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
	// fast is how quickly a slow client has to send a piece of reserve bytes to
	// count as slow no longer.
	fast = 100 * time.Millisecond
)

// conn is a connection: first in the handshake, then in the transmission.
type conn struct {
	s        *Server
	net      net.Conn // or TLS over it
	base     net.Conn // the socket
	peerName string
	started  time.Time
	evicted  bool // under Server.mu
	ctx      context.Context
	end      context.CancelCauseFunc

	flags      nbd.HandshakeFlags
	e          *export // nil: not open
	structured bool
	contexts   []metaContext
	contextsOf string      // the export that they were chosen for
	entered    atomic.Bool // Server.enter was called

	holder  holder // of memory
	owes    bool   // the goroutine that reads requests has to drain out
	r       *bufio.Reader
	carry   []byte        // data of a write that were read and are in no piece yet
	slow    bool          // the client's data come slowly: it gets small pieces of memory
	slots   chan struct{} // full: as many requests as may be are in work
	running sync.WaitGroup
	call    calls // full: the call to the disk that it always has is in progress
	out     outbox

	receiving atomic.Int64 // when the piece of a write began to be received, in ns; 0: none is
	ending    atomic.Bool  // the server ends: no more is read
	mu        sync.Mutex
	deadline  time.Time // of the handshake; zero: none
}

func newConn(s *Server, raw net.Conn) *conn {
	c := &conn{s: s, net: raw, base: raw, started: time.Now(), call: make(calls, 1)}
	c.out.c = c
	// The connection outlives the context of Serve by the grace.
	c.ctx, c.end = context.WithCancelCause(s.life)
	return c
}

// serve serves the client until it leaves. An error says what it did wrong, or
// why it could not be served.
func (c *conn) serve() error {
	defer func() {
		if c.e != nil {
			c.s.release(c.e)
		}
		if c.entered.Load() {
			c.s.leave()
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

// stopReading makes the connection read no more, because the server ends.
// Replies to requests in work are still sent.
func (c *conn) stopReading() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ending.Store(true)
	c.base.SetReadDeadline(time.Now())
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

// readBy sets or lifts the deadline for the data of a write.
func (c *conn) readBy(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ending.Load() {
		c.base.SetReadDeadline(t)
	}
}

// transmit takes requests until the client leaves, and waits for those in work.
func (c *conn) transmit() error {
	c.r = bufio.NewReaderSize(c.net, readBuffer)
	c.slots = make(chan struct{}, maxRequests)
	c.out.raw = socket(c.net)
	err := c.requests()
	if c.ending.Load() {
		err = nil
	}
	c.pay()
	c.running.Wait()
	if c.failed() {
		return context.Cause(c.ctx)
	}
	if closing, ok := c.net.(interface{ CloseWrite() error }); ok && c.net != c.base {
		nbd.EndTLS(c.base, lastWrites, closing.CloseWrite) // what was sent is all
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
	for !c.ending.Load() {
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
	return nil
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

// memory returns n bytes for a request, or fewer where memory is short.
func (c *conn) memory(n int) (*buffer, error) {
	if b := c.s.memory.try(&c.holder, n); b != nil {
		return b, nil
	}
	c.pay()
	return c.s.memory.get(c.ctx, &c.holder, n)
}

// receive returns the next data of a write, of which n bytes at off are left,
// or the first of them. It takes memory when the first of them have come. Where
// they come slowly, it keeps no more of it than the reserve.
func (c *conn) receive(off, n int64) (*buffer, error) {
	c.pay()
	if len(c.carry) == 0 {
		if _, err := c.r.Peek(1); err != nil {
			return nil, err
		}
	}
	most := int64(maxPiece)
	if c.slow {
		most = reserve
	}
	b, err := c.memory(int(min(n, most)))
	if err != nil {
		return nil, err
	}
	have := copy(b.b, c.carry)
	c.carry = nil
	start := time.Now()
	c.receiving.Store(start.UnixNano())
	defer c.receiving.Store(0)
	limited := len(b.b) > reserve && len(b.b)-have > c.r.Buffered()
	if limited {
		c.readBy(start.Add(patience))
	}
	more, err := io.ReadFull(c.r, b.b[have:])
	have += more
	if limited {
		c.readBy(time.Time{})
	}
	switch {
	case err == nil:
		c.slow = c.slow && time.Since(start) > fast
		return b, nil
	case !limited || !errors.Is(err, os.ErrDeadlineExceeded) || c.ending.Load():
		c.s.memory.put(b)
		return nil, err
	}
	c.slow = true
	whole := max(have-int((off+int64(have))%minPiece), 0)
	c.carry = bytes.Clone(b.b[whole:have])
	if b.b = b.b[:whole]; whole > 0 {
		return b, nil
	}
	c.s.memory.put(b)
	return c.receive(off, n)
}

// lost ends the connection because of err, unless the server ends: then there
// are replies to send.
func (c *conn) lost(err error) {
	if !c.ending.Load() {
		c.fail(err)
	}
}

// stalled reports whether the client has moved next to nothing for so long,
// although the server waits for it.
func (c *conn) stalled(after time.Duration) bool {
	since := c.receiving.Load()
	return since != 0 && time.Now().UnixNano()-since >= int64(after) || c.out.stalled(after)
}

// newOp begins a request when there is room for it. It returns ErrShutdown when
// the server ends meanwhile.
func (c *conn) newOp(r nbd.Request) (*op, error) {
	select {
	case c.slots <- struct{}{}:
	default:
		c.pay()
		select {
		case c.slots <- struct{}{}:
		case <-c.ctx.Done():
			return nil, context.Cause(c.ctx)
		case <-c.s.stopping:
			return nil, ErrShutdown
		}
	}
	c.running.Add(1)
	o := &op{Request: r, c: c, start: time.Now(), left: 1}
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
		c.s.o.Stats.add(o.Type, o.Len, time.Since(o.start), o.errno != 0 || o.dropped)
		<-c.slots
		c.running.Done()
	}
}
