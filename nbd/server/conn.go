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

// maxRequests is the maximum number of requests in progress on one connection. While that
// many requests are in progress, the server reads no further request.
const maxRequests = 64

// A conn is a connection to a client, in the handshake or in the transmission phase.
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
	entered atomic.Bool // the client has chosen an export, see Server.clientEntered

	holder  holder // account of the memory that the connection holds
	in      inbox
	slots   chan struct{} // one element for each request in progress
	running sync.WaitGroup
	ownCall calls // the one call to a disk that this connection can always make
	out     outbox

	visit visit

	ending   atomic.Bool // the server is shutting down, and nothing more is read
	mu       sync.Mutex  // held to set deadlines of base, and to set ending
	deadline time.Time   // of the handshake; zero: there is none
}

// The struct negotiated is the part of the connection's state that the client changes
// with options of the handshake.
type negotiated struct {
	flags          nbd.HandshakeFlags
	export         *export // nil: none is open
	structured     bool    // replies are structured
	contexts       []metaContext
	contextsExport string // Name of the export for which the contexts were chosen
}

func newConn(s *Server, raw net.Conn) *conn {
	c := &conn{s: s, net: raw, base: raw, started: time.Now(), ownCall: make(calls, 1)}
	c.out.c = c
	// When the context of Serve ends, a grace period begins. The context disksCtx
	// ends only at the end of this period. Therefore the context of the connection
	// is derived from disksCtx, and not from the context of Serve.
	c.ctx, c.cancel = context.WithCancelCause(s.disksCtx)
	return c
}

// The method serve performs the handshake and serves the client until it disconnects.
// An error says how the client broke the protocol, or why the connection failed.
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

// The method fail closes the connection because of err. If fail is called several
// times, the method serve returns the error of the first call.
func (c *conn) fail(err error) {
	c.cancel(err)
	c.base.Close()
}

// The method failed reports whether the connection has failed. It returns false during
// the shutdown of the server, because replies are still sent then.
func (c *conn) failed() bool {
	ended := context.Cause(c.ctx)
	return ended != nil && ended != ErrShutdown
}

// stopReading makes the connection read no more requests, because the server is
// shutting down. Replies to requests in progress are still sent.
func (c *conn) stopReading() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ending.Store(true)
	c.base.SetReadDeadline(time.Now())
}

// setHandshakeDeadline sets the deadline of the handshake. The zero time removes it.
func (c *conn) setHandshakeDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ending.Load() {
		return
	}
	c.deadline = t
	c.base.SetDeadline(t)
}

// transmit serves requests until the client disconnects or the server shuts down, and then
// waits for the requests in progress.
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
		nbd.EndTLS(c.base, lastWrites, closing.CloseWrite) // close_notify shows the client that no replies are missing
	}
	if c.ending.Load() {
		c.awaitClose()
	}
	return err
}

// awaitClose waits until the client has closed its side of the connection, but not
// longer than 1 second (the constant lastWrites). The server must not close a socket that still
// holds received data, because the kernel might then discard replies that the client has
// not received yet.
func (c *conn) awaitClose() {
	if closing, ok := c.base.(interface{ CloseWrite() error }); ok {
		closing.CloseWrite()
		c.base.SetReadDeadline(time.Now().Add(lastWrites))
		io.CopyN(io.Discard, c.base, maxDiscard)
	}
}

// readRequests reads and starts requests until the client disconnects or the server shuts
// down.
func (c *conn) readRequests() error {
	for !c.ending.Load() {
		r, err := c.in.next()
		if err == io.EOF || err == nil && r.Type == nbd.CmdDisconnect {
			c.visit.disconnects(err == nil)
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

// setReadDeadline sets the deadline for the data of a write. The zero time removes it.
func (c *conn) setReadDeadline(t time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.ending.Load() {
		c.base.SetReadDeadline(t)
	}
}

// failUnlessEnding closes the connection because of err. While the server is shutting down,
// it does nothing, because replies must still be sent then.
func (c *conn) failUnlessEnding(err error) {
	if !c.ending.Load() {
		c.fail(err)
	}
}

// The method stalled reports whether the client has blocked the connection for the
// given time limit, because it did not send the data of a write or did not receive its
// replies.
func (c *conn) stalled(limit time.Duration) bool {
	return c.in.stalled(limit) || c.out.stalled(limit)
}
