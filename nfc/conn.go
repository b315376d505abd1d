package nfc

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

	"github.com/vddkcp/vddkcp/internal/inflate"
	"github.com/vddkcp/vddkcp/internal/spans"
	"github.com/vddkcp/vddkcp/nfc/wire"
)

const (
	// headBuffer is the size of the buffer for the headers and payloads of frames, in bytes. Most
	// data bypass it and go from the connection directly to their destination.
	headBuffer = 4 << 10
	// maxRefused is the number of refused requests that a connection remembers. With more, it ends.
	maxRefused = 4096
	// closeTimeout is how long the end of a session may take.
	closeTimeout = 5 * time.Second
)

// A request is a frame that was sent, and its answer.
type request struct {
	kind    wire.FrameType
	changes int // of the limits when the size of the request was chosen

	// These fields are for reads. The reader of the connection changes p, have and left until it
	// has sent to done.
	read wire.Read
	p    []byte    // where the data belong; as long as the read
	have spans.Set // parts of p that have been received
	left int       // bytes of p that have not been received
	// If blank is true, the whole answer is one fragment of zeros, and the caller that waits for
	// the answer must clear p. It runs on another processor than the reader, and uses p next.
	blank bool

	// These fields are for other requests.
	frame   wire.Request
	size    int    // bytes of the answer's payload
	payload []byte // of the answer
	text    []byte // text that follows the payload of an answer to DDB_GET

	touched atomic.Int64 // time of the last fragment, as conn.now returns it
	done    chan error   // gets the result; has capacity 1
}

func (r *request) String() string {
	if r.kind == wire.IO {
		return fmt.Sprintf("the read of bytes [%d, %d)", r.read.Off, r.read.Off+int64(r.read.Len))
	}
	return "the request " + r.kind.String()
}

// A conn is a connection on which frames are exchanged. Callers of the method start write requests,
// and one goroutine reads the answers. Requests are so short that writing them does not block for
// long, even if the host does not read them.
type conn struct {
	raw     net.Conn // the socket
	net     net.Conn // the socket, or TLS over it
	buffer  int      // size of the session's buffers in bytes, and so the maximum length of a fragment
	timeout time.Duration
	limits  *limits
	trace   *connTrace
	hide    func(text string) string // replaces secrets in a text of the host
	begun   time.Time
	touched atomic.Int64 // time of the last fragment, in nanoseconds since begun

	slots chan struct{} // one element for each request that may be started
	ended chan struct{} // closed when the reader has ended
	gone  chan struct{} // closed when err is set

	sending sync.Mutex // held while a request gets its number and is written
	op      uint32     // number of the next request
	out     []byte     // buffer for the frame that is written

	mu      sync.Mutex
	err     error // why the connection has ended
	pending map[uint32]*request
	refused map[uint32]wire.FrameType // requests that the host has refused, and whose answers may follow
	tokens  int                       // elements in slots, together with the requests in flight
}

// newConn returns a connection for frames and starts its reader. Its method end must be called.
func newConn(d *dialogue, l *limits, timeout time.Duration) *conn {
	_, depth, _ := l.get()
	c := &conn{
		raw: d.raw, net: d.nfc, buffer: defaultBuffer, timeout: timeout, limits: l, trace: d.trace, hide: d.hide,
		begun: time.Now(), slots: make(chan struct{}, depth), ended: make(chan struct{}), gone: make(chan struct{}),
		pending: make(map[uint32]*request), refused: make(map[uint32]wire.FrameType), tokens: depth,
	}
	for range depth {
		c.slots <- struct{}{}
	}
	go c.run()
	return c
}

// The method run reads answers until the connection ends. Then it fails the requests in flight:
// from then on, nothing writes to their memory.
func (c *conn) run() {
	defer close(c.ended)
	c.fail(c.readFrames())
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.pending {
		r.done <- c.err
	}
	c.pending = nil
}

// The method fail closes the connection and records err as the reason. If fail was called before,
// it does nothing.
func (c *conn) fail(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return
	}
	c.err = err
	close(c.gone)
	c.raw.Close()
}

// The method cause returns why the connection has ended.
func (c *conn) cause() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// The method start sends a request. If as many requests are in flight as the limits allow, it waits
// until one of them has ended. Afterwards the caller calls the method wait.
func (c *conn) start(r *request) error {
	if err := c.acquire(); err != nil {
		return err
	}
	r.done = make(chan error, 1)
	r.touched.Store(c.now())
	c.sending.Lock()
	defer c.sending.Unlock()
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return c.err
	}
	c.pending[c.op] = r
	c.mu.Unlock()
	if r.kind == wire.IO {
		c.out = r.read.Append(c.out[:0], c.op)
	} else {
		c.out = r.frame.Append(c.out[:0], c.op)
	}
	c.traceRequest(r)
	c.op++
	c.raw.SetWriteDeadline(time.Now().Add(c.timeout))
	if _, err := c.net.Write(c.out); err != nil {
		c.fail(&lostError{fmt.Errorf("cannot send %v: %w", r, err)}) // the reader then ends r
	}
	return nil
}

// The method acquire waits for a slot. The requests that hold the slots may belong to callers that
// wait for slots themselves, so acquire also notices when the host sends nothing more.
func (c *conn) acquire() error {
	select {
	case <-c.slots:
		return nil
	default:
	}
	if _, _, changes := c.limits.get(); changes > 0 && c.limits.waits != nil {
		defer c.limits.waits()()
	}
	late := time.NewTimer(c.timeout)
	defer late.Stop()
	since := c.now()
	for {
		select {
		case <-c.slots:
			return nil
		case <-c.gone:
			return c.cause()
		case <-late.C:
			idle := time.Duration(c.now() - max(since, c.touched.Load()))
			if idle < c.timeout {
				late.Reset(c.timeout - idle)
				continue
			}
			c.fail(&lostError{fmt.Errorf("no answer to any request within %v: %w", c.timeout, os.ErrDeadlineExceeded)})
		}
	}
}

// The method now returns the time since the connection began, in nanoseconds.
func (c *conn) now() int64 { return int64(time.Since(c.begun)) }

func (c *conn) traceRequest(r *request) {
	if c.trace == nil {
		return
	}
	payload := r.frame.Payload
	if r.kind == wire.IO {
		payload = c.out[wire.HeaderSize:]
	}
	c.trace.frame(sent, stepOf(r.kind), wire.Header{Type: r.kind, Size: uint32(len(payload)), OpID: c.op}, payload, r.frame.Data)
}

// The method wait waits for the end of a request that was started. If no part of the answer arrives
// for longer than the timeout, the connection ends. The method does not return before the
// connection has stopped using the memory of the request.
func (c *conn) wait(r *request) error {
	late := time.NewTimer(c.timeout)
	defer late.Stop()
	for {
		select {
		case err := <-r.done:
			return err
		case <-late.C:
			idle := time.Duration(c.now() - r.touched.Load())
			if idle < c.timeout {
				late.Reset(c.timeout - idle)
				continue
			}
			c.fail(&lostError{fmt.Errorf("no answer to %v within %v: %w", r, c.timeout, os.ErrDeadlineExceeded)})
		}
	}
}

// The method call sends a request that is not a read, and waits for its answer. The answer's
// payload has the given size.
func (c *conn) call(frame wire.Request, size int) (payload, text []byte, err error) {
	r := &request{kind: frame.Type, frame: frame, size: size}
	_, _, r.changes = c.limits.get()
	if err := c.start(r); err != nil {
		return nil, nil, err
	}
	if err := c.wait(r); err != nil {
		return nil, nil, err
	}
	return r.payload, r.text, nil
}

// The method finish ends a request that is no longer pending.
func (c *conn) finish(r *request, result error) {
	c.release()
	r.done <- result
}

// The method release returns the slot of a request that has ended. If the limits have become
// smaller, it gives up the slot, and also idle ones.
func (c *conn) release() {
	_, depth, _ := c.limits.get()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.tokens <= depth {
		c.slots <- struct{}{} // does not block: at most tokens elements
		return
	}
	c.tokens--
	for c.tokens > depth {
		select {
		case <-c.slots:
			c.tokens--
		default:
			return
		}
	}
}

// The method complete ends the request with the given number, whose answer was received.
func (c *conn) complete(op uint32, r *request) {
	c.mu.Lock()
	delete(c.pending, op)
	c.mu.Unlock()
	c.finish(r, nil)
}

// The method refuse ends the request with the given number, which the host has refused. Its answer
// may still follow, and must not be taken for data. If too many requests were refused, refuse
// returns an error.
func (c *conn) refuse(op uint32, r *request, reason error) error {
	if isMemory(reason) {
		c.limits.halve(r.changes)
	}
	c.mu.Lock()
	delete(c.pending, op)
	c.refused[op] = r.kind
	n := len(c.refused)
	c.mu.Unlock()
	c.finish(r, reason)
	if n > maxRefused {
		return fmt.Errorf("the host has refused %d requests on one connection; the last time: %w", n, reason)
	}
	return nil
}

// The method end ends the session, if the connection is not broken, and waits for the reader. The
// parameter closing has the requests that end what was opened. The error says why the host did not
// learn of the end. If ctx ends, the connection ends at once.
func (c *conn) end(ctx context.Context, closing []wire.Request) (err error) {
	defer c.watch(ctx)()
	if c.cause() == nil {
		late := time.AfterFunc(closeTimeout, func() { c.fail(errCloseTimeout) })
		err = c.endSession(closing)
		late.Stop()
	}
	c.fail(net.ErrClosed)
	<-c.ended
	return err
}

var errCloseTimeout = errors.New("the host did not answer the end of the session in time")

func (c *conn) endSession(closing []wire.Request) error {
	if len(closing) == 0 {
		return nil // the host has opened no session that could end
	}
	for _, r := range closing {
		if _, _, err := c.call(r, len(r.Payload)); err != nil {
			return err
		}
	}
	bye := wire.NewSessionComplete()
	c.trace.message(sent, StepClose, bye, nil)
	if _, err := c.net.Write(bye[:]); err != nil {
		return err
	}
	if c.net != c.raw {
		return c.net.Close() // sends the message that ends the TLS session
	}
	return nil
}

// A frameReader reads the frames of a connection. Only one goroutine uses it.
type frameReader struct {
	*conn
	in      *bufio.Reader
	packed  []byte // buffer for compressed fragments
	inflate inflate.Decoder
	payload [wire.OpenFileSize]byte
}

// readFrames reads frames until the connection ends, and returns the reason.
func (c *conn) readFrames() error {
	f := &frameReader{conn: c, in: bufio.NewReaderSize(c.net, headBuffer)}
	for {
		var head [wire.HeaderSize]byte
		if n, err := io.ReadFull(f.in, head[:]); err != nil {
			if n == 0 && err == io.EOF {
				return &lostError{errors.New("the host closed the connection")}
			}
			return lost(err)
		}
		h, err := wire.ParseHeader(&head)
		if err == nil {
			err = f.readFrame(h)
		}
		if err != nil {
			return err
		}
	}
}

// readFrame reads the rest of a frame.
func (f *frameReader) readFrame(h wire.Header) error {
	f.mu.Lock()
	r := f.pending[h.OpID]
	kind, refused := f.refused[h.OpID]
	f.mu.Unlock()
	switch {
	case r == nil && !refused:
		return &wire.ProtocolError{Want: "an answer to a request that waits for one", Got: "an answer to another request, " + h.String()}
	case r == nil && kind != h.Type:
		return &wire.ProtocolError{Want: "an answer of the type " + kind.String(), Got: h.String()}
	case r == nil:
		return f.dropAnswer(h)
	case h.Type == wire.Error:
		return f.readError(h, r)
	case h.Type != r.kind:
		return &wire.ProtocolError{Want: fmt.Sprintf("an answer to %v", r), Got: h.String()}
	case h.Type == wire.IO:
		return f.readFragment(h, r)
	}
	return f.readAnswer(h, r)
}

// The method full reads len(p) bytes of a frame into p.
func (f *frameReader) full(p []byte) error {
	if _, err := io.ReadFull(f.in, p); err != nil {
		return lost(err)
	}
	return nil
}

// readAnswer reads the answer to a request that is not a read.
func (f *frameReader) readAnswer(h wire.Header, r *request) error {
	if err := h.CheckSize(r.size); err != nil {
		return err
	}
	r.payload = make([]byte, r.size)
	if err := f.full(r.payload); err != nil {
		return err
	}
	if h.Type == wire.DDBGet {
		n, err := wire.ParseDDBGet(r.payload)
		if err != nil {
			return err
		}
		r.text = make([]byte, n)
		if err := f.full(r.text); err != nil {
			return err
		}
		r.text = []byte(f.hide(string(r.text)))
	}
	f.trace.frame(received, stepOf(h.Type), h, r.payload, r.text)
	f.complete(h.OpID, r)
	return nil
}

// readFragment reads a part of the answer to a read.
func (f *frameReader) readFragment(h wire.Header, r *request) error {
	if err := h.CheckSize(wire.ReadSize); err != nil {
		return err
	}
	payload := (*[wire.ReadSize]byte)(f.payload[:wire.ReadSize])
	if err := f.full(payload[:]); err != nil {
		return err
	}
	part := wire.ParseFragment(payload)
	if part.Status != 0 && part.Packed == 0 {
		f.trace.fragment(h, payload[:], part, nil)
		return f.refuse(h.OpID, r, &hostError{code: part.Status})
	}
	if part.Status != 0 {
		return &wire.ProtocolError{Want: "no data after a failed read", Got: part.Fields()}
	}
	if err := part.Check(r.read, f.buffer); err != nil {
		return err
	}
	place, n := int64(part.Place), int64(part.Len)
	if err := r.have.Add(place, place+n); err != nil {
		return &wire.ProtocolError{Want: "each byte of the answer once", Got: err.Error()}
	}
	to := r.p[place : place+n]
	data := to
	if part.Compression != wire.Plain {
		data = f.packedBuffer(int(part.Packed))
	}
	if err := f.full(data); err != nil {
		return err
	}
	f.trace.fragment(h, payload[:], part, data)
	r.blank = part.Compression == wire.SkipZ && len(to) == len(r.p) && wire.EmptySkipZ(data, len(to))
	if r.blank {
		// The caller clears p.
	} else if err := f.decode(part.Compression, to, data); err != nil {
		return fmt.Errorf("the answer to %v, bytes [%d, %d) of it: %w", r, place, place+n, err)
	}
	now := f.now()
	r.touched.Store(now)
	f.touched.Store(now)
	if r.left -= int(n); r.left == 0 {
		f.complete(h.OpID, r)
	}
	return nil
}

// packedBuffer returns a buffer of n bytes. The caller has checked that n is not larger than a
// buffer of the session plus wire.PackedSlack.
func (f *frameReader) packedBuffer(n int) []byte {
	if cap(f.packed) < n {
		f.packed = make([]byte, max(n, min(f.buffer+wire.PackedSlack, 2*n)))
	}
	return f.packed[:n]
}

// The method decode decodes the data of a fragment into to, which the decoded data must fill.
func (f *frameReader) decode(c wire.Compression, to, data []byte) error {
	switch c {
	case wire.SkipZ:
		return wire.DecodeSkipZ(to, data)
	case wire.Zlib:
		n, consumed, err := f.inflate.Zlib(to, data)
		if err == nil && (n != len(to) || consumed != len(data)) {
			return &wire.ProtocolError{Want: fmt.Sprintf("a zlib stream of %d bytes with %d bytes of data", len(data), len(to)),
				Got: fmt.Sprintf("%d bytes with %d bytes of data", consumed, n)}
		}
		return err
	}
	return nil
}

// readError reads a frame that refuses a request.
func (f *frameReader) readError(h wire.Header, r *request) error {
	if err := h.CheckSize(wire.FailureSize); err != nil {
		return err
	}
	payload := (*[wire.FailureSize]byte)(f.payload[:wire.FailureSize])
	if err := f.full(payload[:]); err != nil {
		return err
	}
	failure, err := wire.ParseFailure(payload)
	if err != nil {
		return err
	}
	text := make([]byte, failure.TextSize)
	if err := f.full(text); err != nil {
		return err
	}
	f.trace.frame(received, stepOf(r.kind), h, payload[:], []byte(f.hide(string(text))))
	return f.refuse(h.OpID, r, &hostError{code: failure.Code, text: printableText(f.hide(string(text)))})
}

// dropAnswer reads the answer to a request that was refused. It must have no data, and it is the
// last one.
func (f *frameReader) dropAnswer(h wire.Header) error {
	if h.Size > wire.OpenFileSize {
		return &wire.ProtocolError{Want: "an empty answer to a refused request", Got: h.String()}
	}
	payload := f.payload[:h.Size]
	if err := f.full(payload); err != nil {
		return err
	}
	f.trace.frame(received, stepOf(h.Type), h, payload, nil)
	data := 0
	var err error
	switch {
	case h.Type == wire.IO && len(payload) == wire.ReadSize:
		data = int(wire.ParseFragment((*[wire.ReadSize]byte)(payload)).Packed)
	case h.Type == wire.DDBGet:
		data, err = wire.ParseDDBGet(payload)
	}
	if err != nil {
		return err
	}
	if data != 0 {
		return &wire.ProtocolError{Want: "an empty answer to a refused request", Got: fmt.Sprintf("an answer with %d bytes of data", data)}
	}
	f.mu.Lock()
	delete(f.refused, h.OpID)
	f.mu.Unlock()
	return nil
}

// stepOf returns the step to which a request belongs.
func stepOf(t wire.FrameType) Step {
	switch t {
	case wire.OpenSession:
		return StepOpenSession
	case wire.SetSockOpts:
		return StepSockOpts
	case wire.SetResPool:
		return StepResourcePool
	case wire.OpenFile:
		return StepOpenFile
	case wire.DDBGet:
		return StepDDB
	case wire.CloseFile, wire.CloseSession:
		return StepClose
	}
	return StepRead
}

// The method watch makes the connection fail when ctx ends. The caller calls the result to stop
// that.
func (c *conn) watch(ctx context.Context) (stop func() bool) {
	return context.AfterFunc(ctx, func() { c.fail(context.Cause(ctx)) })
}
