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

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// depth is how many requests a connection has on the way at most.
	depth = 16
	// readBuffer holds the headers of replies, and little of the data: these
	// go from the socket to where they belong.
	readBuffer = 4 << 10
	// goodbye is how long a server is waited for that does not take DISC.
	disconnectTimeout = time.Second
)

// lostError says that a connection is gone. What was on the way may be done or
// not.
type lostError struct{ err error }

func (e *lostError) Error() string { return "connection lost: " + e.err.Error() }
func (e *lostError) Unwrap() error { return e.err }

// serverError is an error that the server replied with.
type serverError struct {
	errno nbd.Errno
	text  string // the server's, printable; may be empty
	at    int64  // where in the disk it failed; -1: not told
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

// final reports whether the server would say the same to the same read again:
// that it is not permitted, that it is wrong, or that the server can't do it.
// EIO, ENOMEM and what the protocol does not know may pass.
func (e *serverError) final() bool {
	switch e.errno {
	case nbd.EPERM, nbd.EINVAL, nbd.ENOSPC, nbd.EOVERFLOW, nbd.ENOTSUP:
		return true
	}
	return false
}

// violation returns the error of a server that breaks the protocol. It comes
// again, so that no retry helps.
func violation(format string, args ...any) error {
	return source.Permanent(fmt.Errorf("the server breaks the protocol: "+format, args...))
}

// call is one request and its reply.
type call struct {
	cmd   nbd.Command
	flags nbd.CommandFlags
	off   int64
	n     int64  // at most 2^32-1
	data  []byte // of n bytes: what a write sends, where a read's content goes

	// The reader's, until done has its value.
	have   spans
	status status
	failed error // by a chunk

	conn   *conn
	cookie uint64
	done   chan error // of capacity 1

	// Guarded by conn.mu. The call is done when both are: a server may reply
	// with an error before it has all the data, which must not change then.
	sent, replied bool
	result        error
}

func (k *call) String() string {
	if k.cmd == nbd.CmdFlush || k.cmd == nbd.CmdDisconnect {
		return k.cmd.String()
	}
	return fmt.Sprintf("%s [%d, %d)", k.cmd, k.off, k.off+k.n)
}

// conn is a connection in transmission. One goroutine writes requests and one
// reads replies, so that neither side waits for the other to read.
type conn struct {
	raw        net.Conn // the socket
	net        net.Conn // the same, or TLS over it
	structured bool
	context    uint32 // id of base:allocation
	contexts   bool   // it was agreed on
	timeout    time.Duration

	slots  chan struct{} // one for each request on the way
	queue  chan *call    // registered and not sent
	broken chan struct{} // closed when err is set
	ended  chan struct{} // closed when nothing touches the data of calls any more
	load   atomic.Int32  // calls in start or on the way

	mu      sync.Mutex
	err     error // why the connection is broken
	refusal error // why it takes no more calls
	next    uint64
	pending map[uint64]*call
}

// newConn serves a connection whose handshake is over, until it breaks or
// disconnect is called: then ended is closed.
func newConn(raw, tls net.Conn, n negotiated, timeout time.Duration) *conn {
	c := &conn{
		raw: raw, net: tls, structured: n.structured, context: n.context, contexts: n.contexts, timeout: timeout,
		slots:   make(chan struct{}, depth),
		queue:   make(chan *call, depth+1), // the one more is DISC
		broken:  make(chan struct{}),
		ended:   make(chan struct{}),
		pending: make(map[uint64]*call),
	}
	go c.run()
	return c
}

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

// fail breaks the connection; the first error counts.
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

// start sends a call off, when there is a slot.
func (c *conn) start(ctx context.Context, k *call) error {
	c.load.Add(1)
	if err := c.register(ctx, k); err != nil {
		c.load.Add(-1)
		return err
	}
	return nil
}

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
	c.next++
	k.conn, k.cookie, k.done = c, c.next, make(chan error, 1)
	c.pending[k.cookie] = k
	c.queue <- k // there is room for every slot
	return nil
}

// wait waits for a call that was started. Where the end of ctx makes it return
// early, the call must have no data, for it is still on the way.
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

// markSent notes that all of a call was sent.
func (c *conn) markSent(k *call) {
	c.mu.Lock()
	defer c.mu.Unlock()
	k.sent = true
	c.finishLocked(k)
}

// markReplied notes the reply to a call. After an error ESHUTDOWN the connection
// counts as lost and starts no more calls.
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

// finishLocked ends a call that was both sent and replied to. Until then the call
// stays in c.pending, where run finds it when the connection breaks. The caller
// holds c.mu.
func (c *conn) finishLocked(k *call) {
	if k.sent && k.replied {
		delete(c.pending, k.cookie)
		k.done <- k.result
		c.load.Add(-1)
		<-c.slots
	}
}

// write sends what is queued. It returns why it can't go on.
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
				return &lostError{fmt.Errorf("send %v: %w", k, err)}
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

// disconnect ends the connection, in order where it is in order, and waits for
// its goroutines.
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

// read takes replies. It returns why it can't go on.
func (c *conn) readReplies() error {
	r := reader{bufio.NewReaderSize(c.net, readBuffer)}
	for {
		magic, err := r.uint32()
		if err != nil {
			return &lostError{fmt.Errorf("the server closed the connection with %s: %w", c.outstanding(), notEOF(err))}
		}
		switch magic {
		case nbd.SimpleReplyMagic:
			err = c.readSimple(r)
		case nbd.StructuredReplyMagic:
			err = c.readChunk(r)
		default:
			err = violation("reply magic: found %#08x, want %#08x or %#08x, with %s", magic, uint32(nbd.SimpleReplyMagic), uint32(nbd.StructuredReplyMagic), c.outstanding())
		}
		if err != nil {
			return err
		}
	}
}

// outstanding names what is to be replied to.
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
		return "nothing to be replied to"
	}
	if n := len(c.pending) - 1; n > 0 {
		return fmt.Sprintf("%v and %d more to be replied to", first, n)
	}
	return fmt.Sprintf("%v to be replied to", first)
}

// find returns the call that a reply is to.
func (c *conn) find(cookie uint64) (*call, error) {
	c.mu.Lock()
	k := c.pending[cookie]
	replied := k != nil && k.replied
	c.mu.Unlock()
	if k == nil || replied {
		return nil, violation("reply with cookie %#x, want one of a request, with %s", cookie, c.outstanding())
	}
	return k, nil
}

func (c *conn) readSimple(r reader) error {
	var b [nbd.SimpleReplySize - 4]byte
	if err := r.readFull(b[:]); err != nil {
		return &lostError{fmt.Errorf("in the header of a reply, with %s: %w", c.outstanding(), err)}
	}
	reply := nbd.ParseSimpleReply(&b)
	k, err := c.find(reply.Cookie)
	if err != nil {
		return err
	}
	switch {
	case k.have.started():
		return violation("reply to %v: a simple one after chunks", k)
	case c.structured && k.cmd == nbd.CmdRead:
		return violation("reply to %v: a simple one, want a structured one", k)
	case reply.Errno != 0:
		c.markReplied(k, &serverError{errno: reply.Errno, at: -1})
		return nil
	case k.cmd == nbd.CmdBlockStatus:
		return violation("reply to %v: a simple one, want a structured one", k)
	case k.cmd == nbd.CmdRead:
		if err := r.readFull(k.data); err != nil {
			return &lostError{fmt.Errorf("in the data of the reply to %v: %w", k, err)}
		}
	}
	c.markReplied(k, nil)
	return nil
}

// reader reads the pieces of replies.
type reader struct{ *bufio.Reader }

func (r reader) readFull(p []byte) error {
	_, err := io.ReadFull(r, p)
	return notEOF(err)
}

func (r reader) uint32() (uint32, error) {
	b, err := r.Peek(4)
	if err != nil {
		return 0, err
	}
	n := binary.BigEndian.Uint32(b)
	r.Discard(4)
	return n, nil
}

// notEOF makes an end that nobody expects an error of its own: io.EOF is what
// ReadAt returns at the end of a disk.
func notEOF(err error) error {
	if err == io.EOF {
		return io.ErrUnexpectedEOF
	}
	return err
}
