package nfctest

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"

	"github.com/vddkcp/vddkcp/internal/printable"
)

// conn is one connection of a client.
type conn struct {
	h      *Host
	n      int // 1: the first connection of the host
	wire   *wire
	active bool  // counts in Host.active; guarded by the mutex of the host
	memory int64 // of the session; guarded by the mutex of the host

	certificate tls.Certificate // in the first TLS session
	ticket      *issued         // nil: none yet
	token       string          // of THUMBPRINT_SHA2; "": none

	mu  sync.Mutex // held while a message or fragment is written
	out io.Writer  // writes what the client reads as NFC
	in  *reader

	session
}

func newConn(h *Host, n int, socket *net.TCPConn) *conn {
	return &conn{h: h, n: n, wire: newWire(socket, &h.sent)}
}

// errEnded says that the host ends the connection.
var errEnded = errors.New("the host ends the connection")

// violation records that the client did something wrong.
func (c *conn) violation(format string, args ...any) {
	text := fmt.Sprintf("connection %d: ", c.n) + fmt.Sprintf(format, args...)
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	c.h.violations = append(c.h.violations, text)
	if c.h.options.Log != nil {
		fmt.Fprintf(c.h.options.Log, "VIOLATION %s\n", text)
	}
}

// wrong records a violation after which the host ends the connection.
func (c *conn) wrong(format string, args ...any) error {
	c.violation(format, args...)
	return errEnded
}

func (c *conn) logf(format string, args ...any) {
	if c.h.options.Log == nil {
		return
	}
	text := printable.Line(fmt.Sprintf(format, args...))
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	fmt.Fprintf(c.h.options.Log, "connection %d: %s\n", c.n, text)
}

// serve runs the connection until it ends.
func (c *conn) serve() {
	err := errors.New("too many connections")
	if c.h.admit(c) {
		err = c.dialogue()
	}
	c.logf("ends: %v", err)
	c.h.sessionEnded(c)
	c.wire.drop()
	// A socket that is closed while unread bytes are in it sends a RST, which makes the client
	// lose the last answer. Therefore the pump reads until the client has closed its side.
	select {
	case <-c.wire.gone:
	case <-c.h.closed:
	}
	c.wire.Close()
	<-c.wire.gone
	c.h.remove(c)
}

// dialogue runs all steps of the connection. Its result is the reason of the end.
func (c *conn) dialogue() error {
	if err := c.strike(c.fault(StepConnect, Read{}), c.wire, nil); err != nil {
		return err
	}
	if err := c.greet(); err != nil {
		return err
	}
	ssl, err := c.lines()
	if err != nil {
		return err
	}
	if err := c.beginNFC(ssl); err != nil {
		return err
	}
	if err := c.handshake(); err != nil {
		return err
	}
	return c.frames()
}

// strike writes b to w, unless the rule says that it happens otherwise. It does the kinds of faults
// that are possible at every step. The rule may be nil.
func (c *conn) strike(r *Rule, w io.Writer, b []byte) error {
	if err := c.hold(r); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	kind := Nothing
	if r != nil {
		kind = r.Kind
	}
	switch kind {
	case Drop:
		c.wire.drop()
		return errEnded
	case Reset:
		c.wire.reset()
		return errEnded
	case Cut:
		w.Write(b[:len(b)/2])
		c.wire.drop()
		return errEnded
	case Stall:
		w.Write(b[:len(b)/2])
		if err := c.await(r); err != nil {
			return err
		}
		b = b[len(b)/2:]
	}
	if len(b) == 0 {
		return nil
	}
	_, err := w.Write(b)
	return err
}

// beginNFC begins the part of the connection that is NFC: in a second TLS session, or in clear.
func (c *conn) beginNFC(ssl bool) error {
	head, err := c.wire.peek(3)
	if err != nil {
		if len(head) > 0 {
			return c.wrong("% x is no beginning of NFC or TLS", head)
		}
		return err
	}
	if (head[0] == 0x15 || head[0] == 0x17) && head[1] == 3 {
		return c.wrong("a TLS record (close-notify?) of the first session came after PROXY: % x", head)
	}
	if !ssl {
		c.out, c.in = c.h.inPieces(c.wire), newReader(c.wire, false)
		return nil
	}
	if head[0] != 0x16 {
		return c.wrong("PROXY asked for TLS, and %x came in clear", head)
	}
	c.wire.records = c.h.options.Needs.WaitForAck // package tls then leaves the next message in the wire
	t, err := c.beginTLS(StepSecondTLS, c.certificate)
	if err != nil {
		return err
	}
	c.out, c.in = c.h.inPieces(t), newReader(t, true)
	return nil
}

// beginTLS does the handshake of a TLS session whose first byte has come.
func (c *conn) beginTLS(s Step, certificate tls.Certificate) (*tls.Conn, error) {
	r := c.fault(s, Read{})
	if r != nil && r.Kind == OtherCertificate {
		certificate = newCertificate()
	}
	if r != nil && r.Kind == Cut {
		c.wire.limit.Store(100)
	} else if err := c.strike(r, c.wire, nil); err != nil {
		return nil, err
	}
	t := tls.Server(c.wire, c.h.tlsConfig(certificate))
	if err := t.Handshake(); err != nil {
		return nil, fmt.Errorf("%s: %w", s, err)
	}
	if t.ConnectionState().DidResume {
		c.violation("%s: the client resumed an old session and therefore saw no certificate", s)
	}
	return t, nil
}
