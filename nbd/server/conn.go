package server

import (
	"bufio"
	"context"
	"io"
	"net"
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
