package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

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
	s := &server{life: life.Life{Context: ctx, Name: name}, queryWait: queryWait}
	first, n, err := connect(ctx, uri, openTimeouts*o.Timeout, o.Timeout)
	if err != nil {
		return nil, err
	}
	s.negotiated, s.conns = n, []*conn{first}
	if err := s.dialExtra(uri, o); err != nil {
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
	if !s.sizesGiven || tail == 0 {
		return nil
	}
	k := &call{cmd: nbd.CmdRead, off: s.size - tail, n: tail, data: make([]byte, tail)}
	err := s.do(s.life.Context, s.pick(), k)
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
func (s *server) dialExtra(uri *nbd.URI, o Options) error {
	want, limit := o.Connections, openTimeouts*o.Timeout
	if want == 0 {
		want, limit = defaultConnections, min(extraTimeout, limit)
	}
	if want > 1 && s.flags&nbd.CanMultiConn == 0 {
		if o.Connections > 1 {
			o.warn("%s: 1 connection instead of %d: the server does not promise that several see the same", s.life.Name, want)
		}
		return nil
	}
	var all errgroup.Group
	conns := make([]*conn, want-1)
	for i := range conns {
		all.Go(func() error {
			c, n, err := connect(s.life.Context, uri, limit, o.Timeout)
			if err == nil && (n.size != s.size || n.flags != s.flags || n.sizes != s.sizes || n.structured != s.structured || n.contexts != s.contexts) {
				c.disconnect()
				return violation("connection %d: an export of %d bytes, flags %#x; the first had %d bytes, flags %#x", i+2, n.size, n.flags, s.size, s.flags)
			}
			if err != nil && o.Connections == 0 && s.life.Context.Err() == nil {
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
	ctx, cancel := withLimit(ctx, limit)
	defer cancel()
	raw, err := dialSocket(ctx, uri)
	if err != nil {
		return nil, negotiated{}, err
	}
	return negotiate(ctx, raw, uri, config, timeout)
}

func withLimit(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("no answer within %v: %w", limit, os.ErrDeadlineExceeded))
}

// reach opens a socket to the server.
func dialSocket(ctx context.Context, uri *nbd.URI) (net.Conn, error) {
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
		return nil, explainDial(uri, err)
	}
	return raw, nil
}

// converse makes a connection of a socket, which it owns.
func negotiate(ctx context.Context, raw net.Conn, uri *nbd.URI, config *tls.Config, timeout time.Duration) (*conn, negotiated, error) {
	stop := context.AfterFunc(ctx, func() { raw.Close() })
	over, n, err := handshake(ctx, raw, uri, config)
	if !stop() && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		raw.Close()
		return nil, n, err
	}
	return newConn(raw, over, n, timeout), n, nil
}
