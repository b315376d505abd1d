package client

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/internal/spans"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// depth is the maximum number of requests in progress on one connection.
	depth = 16
	// readBuffer is the size of the buffer for the headers of replies, in bytes. Most
	// data bypass it and go from the socket directly to their destination.
	readBuffer = 4 << 10
	// disconnectTimeout is how long the client waits for a server to receive the
	// request to disconnect (DISC).
	disconnectTimeout = time.Second
)

// lostError says that a connection was lost. The server may or may not have executed the
// requests that were in progress.
type lostError struct{ err error }

func (e *lostError) Error() string { return "connection lost: " + e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// serverError is an error with which the server replied to a request.
type serverError struct {
	errno nbd.Errno
	text  string // printable text of the server; may be empty
	at    int64  // offset of the failure in the export; -1: the server reported none
}

func (e *serverError) Error() string {
	message := "the server says: " + e.errno.Error()
	if e.at >= 0 {
		message += fmt.Sprintf(" at %d", e.at)
	}
	if e.text != "" {
		message += ": " + e.text
	}
	return message
}

func (e *serverError) Unwrap() error { return e.errno }

// The method final reports whether a retry of the request would fail with the same
// error. This is the case if the request is not permitted, invalid or not supported, or
// if the server has no space left. EIO, ENOMEM and unknown error numbers may be
// temporary.
func (e *serverError) final() bool {
	switch e.errno {
	case nbd.EPERM, nbd.EINVAL, nbd.ENOSPC, nbd.EOVERFLOW, nbd.ENOTSUP:
		return true
	}
	return false
}

// The function violation returns the error for a server that breaks the protocol. The
// error is marked with source.Permanent, because a retry would fail in the same way.
func violation(format string, args ...any) error {
	return source.Permanent(fmt.Errorf("the server breaks the protocol: "+format, args...))
}

// A call is one request and its reply.
type call struct {
	cmd   nbd.Command
	flags nbd.CommandFlags
	off   int64
	n     int64  // length of the range in bytes, at most 2^32-1
	data  []byte // the n bytes to write, or the buffer for the n bytes to read

	// Only the goroutine that reads replies uses the next four fields, until the
	// result of the call has been sent to the channel done.
	hasChunk bool      // a chunk of a structured reply has been received
	have     spans.Set // ranges of a read that have been received
	status   status    // extents that have been received
	failed   error     // the first error chunk

	conn   *conn
	cookie uint64
	done   chan error // gets the result; has capacity 1

	// The next fields are guarded by conn.mu. The call ends only when the request was
	// sent (the field sent) and the reply was received (the field replied). A server
	// may reply with an error before it has received all data of a write. The call
	// must not end then, because its caller could change the data while they are
	// being sent.
	sent, replied bool
	result        error
}

func (k *call) String() string {
	if k.cmd == nbd.CmdFlush || k.cmd == nbd.CmdDisconnect {
		return k.cmd.String()
	}
	return fmt.Sprintf("%s [%d, %d)", k.cmd, k.off, k.off+k.n)
}

// A conn is a connection in the transmission phase. One goroutine writes requests and
// another one reads replies. With a single goroutine there could be a deadlock, in
// which client and server each wait for the other one to read.
type conn struct {
	raw        net.Conn // the socket
	net        net.Conn // raw, or TLS over it
	structured bool     // replies are structured
	context    uint32   // ID of base:allocation in replies
	contexts   bool     // base:allocation was negotiated
	timeout    time.Duration

	slots  chan struct{} // one element for each request in progress
	queue  chan *call    // calls to be sent
	broken chan struct{} // closed when err is set
	ended  chan struct{} // closed when the connection no longer uses the data of calls
	load   atomic.Int32  // calls that wait for a slot or are in progress

	mu      sync.Mutex
	err     error            // why the connection is broken
	refusal error            // why the connection starts no more calls
	cookie  uint64           // cookie of the last call
	pending map[uint64]*call // calls in progress, by their cookies
}

// newConn returns a connection for the transmission phase, with the properties that
// were negotiated in the handshake. The connection serves calls until it breaks or
// disconnect is called. Then it closes the channel conn.ended.
func newConn(raw, tls net.Conn, n negotiated, timeout time.Duration) *conn {
	c := &conn{
		raw: raw, net: tls, structured: n.structured, context: n.context, contexts: n.contexts, timeout: timeout,
		slots:   make(chan struct{}, depth),
		queue:   make(chan *call, depth+1), // room for all slots and for DISC
		broken:  make(chan struct{}),
		ended:   make(chan struct{}),
		pending: make(map[uint64]*call),
	}
	go c.run()
	return c
}

// The method run runs the two goroutines of the connection. When both have ended, it
// fails the calls in progress.
func (c *conn) run() {
	defer close(c.ended)
	var writer sync.WaitGroup
	writer.Go(func() { c.fail(c.writeRequests()) })
	c.fail(c.readReplies())
	writer.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, k := range c.pending {
		k.done <- c.err
	}
	c.pending = nil
}

// The method fail closes the connection and records err as the reason. If fail was
// called before, it does nothing.
func (c *conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	close(c.broken)
	c.raw.Close()
}

// The method start queues a call for sending. One connection allows 16 calls in progress
// (the constant depth). If there are that many, start waits first until one of them has
// ended. Afterwards the caller calls the method wait of the call.
func (c *conn) start(ctx context.Context, k *call) error {
	c.load.Add(1)
	if err := c.register(ctx, k); err != nil {
		c.load.Add(-1)
		return err
	}
	return nil
}

// The method register does the work of start, except that start also counts the call in
// c.load.
func (c *conn) register(ctx context.Context, k *call) error {
	select {
	case c.slots <- struct{}{}:
	case <-c.broken:
		c.mu.Lock()
		defer c.mu.Unlock()
		return c.err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err := c.err
	if err == nil {
		err = c.refusal
	}
	if err != nil {
		<-c.slots
		return err
	}
	c.cookie++
	k.conn, k.cookie, k.done = c, c.cookie, make(chan error, 1)
	c.pending[k.cookie] = k
	c.queue <- k // does not block, since the queue has room for all slots
	return nil
}

// The method wait waits for the result of a call that was started. If the reply takes
// longer than the timeout, the connection breaks. If the call is not a read or a write,
// wait also returns when ctx ends. If it is a read or a write, wait ignores ctx, because
// the connection still uses the buffer with the data.
func (k *call) wait(ctx context.Context) error {
	late := time.NewTimer(k.conn.timeout)
	defer late.Stop()
	var stop <-chan struct{}
	if k.data == nil {
		stop = ctx.Done()
	}
	for {
		select {
		case err := <-k.done:
			return err
		case <-late.C:
			k.conn.fail(&lostError{fmt.Errorf("no reply to %v within %v", k, k.conn.timeout)})
		case <-stop:
			return context.Cause(ctx)
		}
	}
}

// markSent records that a call was sent completely.
func (c *conn) markSent(k *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k.sent = true
	c.finishLocked(k)
}

// markReplied records the result of a call. If the server replied with ESHUTDOWN, the
// connection counts as lost and starts no more calls.
func (c *conn) markReplied(k *call, result error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	var server *serverError
	if errors.As(result, &server) && server.errno == nbd.ESHUTDOWN {
		result = &lostError{result}
		if c.refusal == nil {
			c.refusal = result
		}
	}
	k.replied, k.result = true, result
	c.finishLocked(k)
}

// finishLocked ends a call if its request was sent and its reply was received. Otherwise
// the call stays in c.pending, where the method run finds it when the connection breaks.
// The caller holds c.mu.
func (c *conn) finishLocked(k *call) {
	if k.sent && k.replied {
		delete(c.pending, k.cookie)
		k.done <- k.result
		c.load.Add(-1)
		<-c.slots
	}
}

// writeRequests sends the queued calls. It returns the error that ends the connection.
func (c *conn) writeRequests() error {
	header := make([]byte, 0, nbd.RequestSize)
	for {
		select {
		case k := <-c.queue:
			header = nbd.Request{Flags: k.flags, Type: k.cmd, Cookie: k.cookie, Off: uint64(k.off), Len: uint32(k.n)}.Append(header[:0])
			out := net.Buffers{header}
			if k.cmd == nbd.CmdWrite {
				out = append(out, k.data)
			}
			if _, err := out.WriteTo(c.net); err != nil {
				return &lostError{fmt.Errorf("cannot send the request %v: %w", k, err)}
			}
			if k.cmd == nbd.CmdDisconnect {
				if c.net != c.raw {
					nbd.EndTLS(c.raw, disconnectTimeout, c.net.Close)
				}
				return net.ErrClosed
			}
			c.markSent(k)
		case <-c.broken:
			return nil
		}
	}
}

// disconnect ends the connection and waits for its goroutines. If the connection is not
// broken, the server gets the request DISC.
func (c *conn) disconnect() {
	c.mu.Lock()
	bye := c.err == nil && c.refusal != net.ErrClosed
	c.refusal = net.ErrClosed
	c.mu.Unlock()
	if bye {
		c.raw.SetWriteDeadline(time.Now().Add(disconnectTimeout))
		c.queue <- &call{cmd: nbd.CmdDisconnect}
	}
	<-c.ended
}

// readReplies reads replies until the connection fails, and returns the error that
// ended the connection.
func (c *conn) readReplies() error {
	r := reader{bufio.NewReaderSize(c.net, readBuffer)}
	for {
		magic, err := r.uint32()
		if err != nil {
			return &lostError{fmt.Errorf("the server closed the connection, %s: %w", c.outstanding(), notEOF(err))}
		}
		switch magic {
		case nbd.SimpleReplyMagic:
			err = c.readSimple(r)
		case nbd.StructuredReplyMagic:
			err = c.readChunk(r)
		default:
			err = violation("found a reply that begins with %#08x, %s: want %#08x (a simple reply) or %#08x (a structured reply)", magic, c.outstanding(), uint32(nbd.SimpleReplyMagic), uint32(nbd.StructuredReplyMagic))
		}
		if err != nil {
			return err
		}
	}
}

// The method outstanding describes the requests without a reply, for an error message.
func (c *conn) outstanding() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	var first *call
	for _, k := range c.pending {
		if !k.replied && (first == nil || k.cookie < first.cookie) {
			first = k
		}
	}
	if first == nil {
		return "while no request waited for a reply"
	}
	if n := len(c.pending) - 1; n > 0 {
		return fmt.Sprintf("while %v and %d more requests waited for replies", first, n)
	}
	return fmt.Sprintf("while %v waited for a reply", first)
}

// find returns the call in progress to which a reply with the given cookie belongs. If
// there is none, the server has broken the protocol, and find returns an error.
func (c *conn) find(cookie uint64) (*call, error) {
	c.mu.Lock()
	k := c.pending[cookie]
	replied := k != nil && k.replied
	c.mu.Unlock()
	if k == nil || replied {
		return nil, violation("found a reply with the unknown cookie %#x, %s: want the cookie of a request that waits for its reply", cookie, c.outstanding())
	}
	return k, nil
}

// readSimple reads the part of a simple reply that follows the magic number.
func (c *conn) readSimple(r reader) error {
	var b [nbd.SimpleReplySize - 4]byte
	if err := r.readFull(b[:]); err != nil {
		return &lostError{fmt.Errorf("cannot read the header of a reply, %s: %w", c.outstanding(), err)}
	}
	reply := nbd.ParseSimpleReply(&b)
	k, err := c.find(reply.Cookie)
	if err != nil {
		return err
	}
	switch {
	case k.hasChunk:
		return violation("reply to %v: found a simple reply after chunks of a structured reply, want another chunk", k)
	case c.structured && k.cmd == nbd.CmdRead:
		return violation("reply to %v: found a simple reply, want a structured reply, because structured replies were negotiated", k)
	case reply.Errno != 0:
		c.markReplied(k, &serverError{errno: reply.Errno, at: -1})
		return nil
	case k.cmd == nbd.CmdBlockStatus:
		return violation("reply to %v: found a simple reply, want a structured reply", k)
	case k.cmd == nbd.CmdRead:
		if err := r.readFull(k.data); err != nil {
			return &lostError{fmt.Errorf("cannot read the data of the reply to %v: %w", k, err)}
		}
	}
	c.markReplied(k, nil)
	return nil
}

// A reader reads replies from a connection.
type reader struct{ *bufio.Reader }

// readFull reads exactly len(p) bytes of a reply into p.
func (r reader) readFull(p []byte) error {
	_, err := io.ReadFull(r, p)
	return notEOF(err)
}

// The method uint32 reads a number of 4 bytes. It returns io.EOF if the server closed
// the connection before the first byte.
func (r reader) uint32() (uint32, error) {
	b, err := r.Peek(4)
	if err != nil {
		return 0, err
	}
	n := binary.BigEndian.Uint32(b)
	r.Discard(4)
	return n, nil
}

// notEOF replaces io.EOF by io.ErrUnexpectedEOF. Otherwise callers of ReadAt would take
// the error for the end of the disk.
func notEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
