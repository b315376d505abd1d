package server

import (
	"context"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/nbd"
)

// maxRequests is how many requests of a connection are in progress at once. No
// further request is read meanwhile.
const maxRequests = 64

// conn is a connection: first in the handshake, then in the transmission phase.
type conn struct {
	s        *Server
	net      net.Conn // base, or TLS over it
	base     net.Conn // the socket
	peerName string   // see peerName
	started  time.Time
	evicted  bool // guarded by Server.mu
	ctx      context.Context
	cancel   context.CancelCauseFunc

	negotiated
	entered atomic.Bool // Server.enter was called

	holder  holder // accounts for the memory that the connection holds
	in      inbox
	slots   chan struct{} // one element for each request in progress
	running sync.WaitGroup
	ownCall calls // the one call to a disk that this connection can always make
	out     outbox

	ending   atomic.Bool // the server is shutting down: no more is read
	mu       sync.Mutex
	deadline time.Time // of the handshake; zero: none
}

// negotiated is the state that a handshake leads to.
type negotiated struct {
	flags          nbd.HandshakeFlags
	export         *export // nil: none is open
	structured     bool    // replies are structured
	contexts       []metaContext
	contextsExport string // the Name of the export for which contexts were chosen
}

func newConn(s *Server, raw net.Conn) *conn {
	c := &conn{s: s, net: raw, base: raw, started: time.Now(), ownCall: make(calls, 1)}
	c.out.c = c
	// The connection outlives the context of Serve by the grace.
	c.ctx, c.cancel = context.WithCancelCause(s.disksCtx)
	return c
}

// serve serves the client until it leaves. An error says what it did wrong, or
// why it could not be served.
func (c *conn) serve() error {
	defer func() {
		if c.export != nil {
			c.s.release(c.export)
		}
		if c.entered.Load() {
			c.s.clientLeft()
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
	c.cancel(err)
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
func (c *conn) setHandshakeDeadline(t time.Time) {
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
	c.in.init(c, c.net)
	c.slots = make(chan struct{}, maxRequests)
	c.out.raw = socket(c.net)
	err := c.readRequests()
	if c.ending.Load() {
		err = nil
	}
	c.out.flushReplies()
	c.running.Wait()
	if c.failed() {
		return context.Cause(c.ctx)
	}
	if closing, ok := c.net.(interface{ CloseWrite() error }); ok && c.net != c.base {
		nbd.EndTLS(c.base, lastWrites, closing.CloseWrite) // what was sent is all
	}
	if c.ending.Load() {
		c.awaitClose()
	}
	return err
}

// linger waits until the client has taken its replies: closing a socket while
// there is something to read from it can take them back.
func (c *conn) awaitClose() {
	if closing, ok := c.base.(interface{ CloseWrite() error }); ok {
		closing.CloseWrite()
		c.base.SetReadDeadline(time.Now().Add(lastWrites))
		io.CopyN(io.Discard, c.base, maxDiscard)
	}
}

// requests starts requests as they come, until the client disconnects or the
// server ends.
func (c *conn) readRequests() error {
	for !c.ending.Load() {
		r, err := c.in.next()
		if err == io.EOF || err == nil && r.Type == nbd.CmdDisconnect {
			return nil
		}
		if err != nil {
			return err
		}
		if err := c.startRequest(r); err != nil {
			return err
		}
		if !c.in.hasRequest() {
			c.out.flushReplies()
		}
	}
	return nil
}

// readBy sets or lifts the deadline for the data of a write.
func (c *conn) setReadDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ending.Load() {
		c.base.SetReadDeadline(t)
	}
}

// lost ends the connection because of err, unless the server is shutting down:
// then there are replies to send.
func (c *conn) failUnlessEnding(err error) {
	if !c.ending.Load() {
		c.fail(err)
	}
}

// stalled reports whether the server has waited for the client longer than after,
// while the client sent or took fewer than stallBytes.
func (c *conn) stalled(after time.Duration) bool {
	return c.in.stalled(after) || c.out.stalled(after)
}
