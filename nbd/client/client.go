// Package client reads and writes a disk that an NBD server exports.
//
// It speaks the protocol of package nbd: fixed newstyle, and to old servers
// newstyle and oldstyle, with TLS by certificates, structured replies,
// the allocation by base:allocation, and as many connections as the server
// allows. Nothing that a server sends is believed: what breaks the protocol is
// an error that says what was found and what is right.
package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

const (
	defaultConnections = 4
	maxConnections     = 64
	defaultTimeout     = 2 * time.Minute
	// openTimeouts is how many timeouts opening has.
	openTimeouts = 5
	// moreTimeout is how long is waited for a connection that is only for
	// speed: a server that takes no more lets it hang.
	moreTimeout = 2 * time.Second
)

// Options tune the connections to a server. The zero value is the default.
type Options struct {
	// Connections is how many are used at once; 0: 4, or as many as the server
	// takes. A server that does not promise that several see the same
	// (CAN_MULTI_CONN) gets one whatever is asked for.
	Connections int
	// Timeout is how long a request may take until its connection is given up;
	// 0: 2 minutes. Opening may take five times that.
	Timeout time.Duration
	// Warn takes what the user should know and what is no error. It may be nil.
	Warn func(message string)
}

func (o Options) warn(format string, args ...any) {
	if o.Warn != nil {
		o.Warn(fmt.Sprintf(format, args...))
	}
}

// server is all connections to one export. It lives under the context that it
// was opened with.
type server struct {
	negotiated
	ctx   context.Context
	name  string // as messages call it
	conns []*conn
	stop  func() bool // the watch over ctx

	queryWait time.Duration // before the first repetition of a query of the allocation

	changing sync.Mutex // held while a block is changed in part

	mu     sync.Mutex
	closed bool
	calls  sync.WaitGroup // begun, and not ended; added to under mu before closed
}

// dial opens the connections.
func dial(ctx context.Context, uri *nbd.URI, o Options) (*server, error) {
	name := nbd.Text([]byte(uri.String()))
	s, err := dialAll(ctx, uri, name, o)
	if err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return s, nil
}

func dialAll(ctx context.Context, uri *nbd.URI, name string, o Options) (*server, error) {
	if o.Connections < 0 || o.Connections > maxConnections {
		return nil, fmt.Errorf("%d connections: want 1 to %d", o.Connections, maxConnections)
	}
	if o.Timeout == 0 {
		o.Timeout = defaultTimeout
	}
	s := &server{ctx: ctx, name: name, queryWait: queryWait}
	first, n, err := connect(ctx, uri, openTimeouts*o.Timeout, o.Timeout)
	if err != nil {
		return nil, err
	}
	s.negotiated, s.conns = n, []*conn{first}
	if err := s.more(uri, o); err != nil {
		s.disconnect()
		return nil, err
	}
	s.stop = context.AfterFunc(ctx, func() {
		for _, c := range s.conns {
			c.fail(context.Cause(ctx))
		}
	})
	if err := s.checkTail(); err != nil {
		s.disconnect()
		return nil, err
	}
	return s, nil
}

// checkTail reads the end of an export whose size is no multiple of the server's
// own minimum block. The protocol has no request for it; where the server takes
// none, that is to be known before the rest is copied.
func (s *server) checkTail() error {
	tail := s.size % int64(s.sizes.Min)
	if !s.told || tail == 0 {
		return nil
	}
	k := &call{cmd: nbd.CmdRead, off: s.size - tail, n: tail, data: make([]byte, tail)}
	err := s.do(s.ctx, s.pick(), k)
	var refused *serverError
	switch {
	case err == nil:
		return nil
	case !errors.As(err, &refused):
		return fmt.Errorf("%v: %w", k, err)
	case !refused.final():
		return nil // it may pass
	}
	return source.Permanent(&hinted{
		fmt.Errorf("the export has %d bytes, no multiple of the server's minimum block of %d bytes, and its last %d bytes can't be read: %w", s.size, s.sizes.Min, tail, err),
		fmt.Sprintf("let the server round the size up to a multiple of %d (nbdkit: --filter=truncate round-up=%d), or take smaller blocks", s.sizes.Min, s.sizes.Min),
	})
}

// more opens the connections after the first.
func (s *server) more(uri *nbd.URI, o Options) error {
	want, limit := o.Connections, openTimeouts*o.Timeout
	if want == 0 {
		want, limit = defaultConnections, min(moreTimeout, limit)
	}
	if want > 1 && s.flags&nbd.CanMultiConn == 0 {
		if o.Connections > 1 {
			o.warn("%s: 1 connection instead of %d: the server does not promise that several see the same", s.name, want)
		}
		return nil
	}
	var all errgroup.Group
	conns := make([]*conn, want-1)
	for i := range conns {
		all.Go(func() error {
			c, n, err := connect(s.ctx, uri, limit, o.Timeout)
			if err == nil && (n.size != s.size || n.flags != s.flags || n.sizes != s.sizes || n.structured != s.structured || n.contexts != s.contexts) {
				c.disconnect()
				return violation("connection %d: an export of %d bytes, flags %#x; the first had %d bytes, flags %#x", i+2, n.size, n.flags, s.size, s.flags)
			}
			if err != nil && o.Connections == 0 && s.ctx.Err() == nil {
				return nil // it works without
			}
			conns[i] = c
			return err
		})
	}
	err := all.Wait()
	for _, c := range conns {
		if c != nil {
			s.conns = append(s.conns, c)
		}
	}
	return err
}

// connect opens one connection within limit.
func connect(ctx context.Context, uri *nbd.URI, limit, timeout time.Duration) (*conn, negotiated, error) {
	var config, err = tlsConfig(uri)
	if err != nil {
		return nil, negotiated{}, err
	}
	ctx, cancel := within(ctx, limit)
	defer cancel()
	raw, err := reach(ctx, uri)
	if err != nil {
		return nil, negotiated{}, err
	}
	return converse(ctx, raw, uri, config, timeout)
}

func within(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %v: %w", limit, os.ErrDeadlineExceeded))
}

// reach opens a socket to the server.
func reach(ctx context.Context, uri *nbd.URI) (net.Conn, error) {
	network, address := "tcp", net.JoinHostPort(uri.Host, uri.Port)
	if uri.Socket != "" {
		network, address = "unix", uri.Socket
		if strings.HasPrefix(address, "@") {
			address = "./" + address // net takes it for an abstract one
		}
	}
	raw, err := new(net.Dialer).DialContext(ctx, network, address)
	switch {
	case err != nil && ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case err != nil:
		return nil, unreachable(uri, err)
	}
	return raw, nil
}

// converse makes a connection of a socket, which it owns.
func converse(ctx context.Context, raw net.Conn, uri *nbd.URI, config *tls.Config, timeout time.Duration) (*conn, negotiated, error) {
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	over, n, err := shake(ctx, raw, uri, config)
	if !stop() && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		raw.Close()
		return nil, n, err
	}
	return newConn(raw, over, n, timeout), n, nil
}

// begin starts a call, which end ends, unless there is an error.
func (s *server) begin(ctx context.Context) error {
	if s.ctx.Err() != nil {
		return context.Cause(s.ctx)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return os.ErrClosed
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	s.calls.Add(1)
	return nil
}

func (s *server) end() { s.calls.Done() }

// pick returns the connection with the least to do.
func (s *server) pick() *conn {
	best := s.conns[0]
	for _, c := range s.conns[1:] {
		if c.load.Load() < best.load.Load() {
			best = c
		}
	}
	return best
}

// do makes one call.
func (s *server) do(ctx context.Context, c *conn, k *call) error {
	if err := c.start(ctx, k); err != nil {
		return err
	}
	return k.wait(ctx)
}

// each makes the calls that next returns until it returns nil, as many at once
// as there is room for, and waits for them. It returns the first error.
func (s *server) each(ctx context.Context, next func() *call) (failed *call, err error) {
	var window [2 * depth]*call // a ring of those on the way
	from, to := 0, 0
	take := func() {
		k := window[from%len(window)]
		from++
		if e := k.wait(ctx); e != nil && err == nil {
			failed, err = k, e
		}
	}
	for err == nil {
		k := next()
		if k == nil {
			break
		}
		if e := s.pick().start(ctx, k); e != nil {
			failed, err = k, e
			break
		}
		window[to%len(window)] = k
		if to++; to-from == len(window) {
			take()
		}
	}
	for from < to {
		take()
	}
	return failed, err
}

// close waits for calls in progress.
func (s *server) close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return fmt.Errorf("close %s: %w", s.name, os.ErrClosed)
	}
	s.closed = true
	s.mu.Unlock()
	s.calls.Wait()
	s.disconnect()
	return nil
}

func (s *server) disconnect() {
	if s.stop != nil {
		s.stop()
	}
	var all sync.WaitGroup
	for _, c := range s.conns {
		all.Go(c.disconnect)
	}
	all.Wait()
}

// explain says which server a call failed on, and where. A read that the server
// refuses for good is source.Permanent.
func (s *server) explain(k *call, err error) error {
	var refused *serverError
	if k.cmd == nbd.CmdRead && errors.As(err, &refused) && refused.final() {
		err = source.Permanent(err)
	}
	if ended := s.ctx.Err(); ended != nil && !errors.Is(err, context.Cause(s.ctx)) {
		err = context.Cause(s.ctx)
	}
	return fmt.Errorf("%s: %v: %w", s.name, k, err)
}
