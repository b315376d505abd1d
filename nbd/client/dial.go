package client

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/internal/observer"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

// dial opens the connections to the export with the given URI. Its errors contain the URI.
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

// dialAll opens the connections to the export with the given URI. Its errors do not contain
// the URI, because dial adds it.
func dialAll(ctx context.Context, uri *nbd.URI, name string, o Options) (*server, error) {
	if o.Connections < 0 || o.Connections > maxConnections {
		return nil, fmt.Errorf("invalid number of connections %d: want 1 to %d", o.Connections, maxConnections)
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
	s.counted = len(s.conns)
	observer.Connections(ctx, s.counted)
	return s, nil
}

// checkTail reads the end of an export whose size is not a multiple of the minimum block
// size that the server advertises. The protocol defines no request for such an end. If the
// server refuses to read it, the user gets an error at once, and not after the rest of the
// disk was copied.
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
		return nil // the error may be temporary
	}
	return source.Permanent(hinted.Error(
		fmt.Errorf("cannot read the last %d bytes of the export: its size of %d bytes is not a multiple of the server's minimum block size of %d bytes: %w", tail, s.size, s.sizes.Min, err),
		fmt.Sprintf("configure the server to round the size up to a multiple of %d (nbdkit: --filter=truncate round-up=%d), or to accept smaller blocks", s.sizes.Min, s.sizes.Min),
	))
}

// dialExtra opens the connections after the first one. If Options.Connections is 0,
// connections that cannot be opened are ignored.
func (s *server) dialExtra(uri *nbd.URI, o Options) error {
	want, limit := o.Connections, openTimeouts*o.Timeout
	if want == 0 {
		want, limit = defaultConnections, min(extraTimeout, limit)
	}
	if want > 1 && s.flags&nbd.CanMultiConn == 0 {
		if o.Connections == 0 {
			o.debug(s.life.Name, 1, want, "the server does not promise that all connections see the same data")
		} else {
			o.warn("%s: using 1 connection instead of %d: the server does not promise that all connections see the same data", s.life.Name, want)
		}
		return nil
	}
	var all errgroup.Group
	var refused atomic.Value // why a connection could not be opened that the user did not ask for
	conns := make([]*conn, want-1)
	for i := range conns {
		all.Go(func() error {
			c, n, err := connect(s.life.Context, uri, limit, o.Timeout)
			if err == nil {
				if list := n.differences(&s.negotiated); len(list) > 0 {
					c.disconnect()
					return violation("the server describes the export differently on connection %d than on connection 1: %s", i+2, strings.Join(list, ", "))
				}
			}
			if err != nil && o.Connections == 0 && s.life.Context.Err() == nil {
				refused.Store(err.Error())
				return nil // the copy works with fewer connections
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
	if why, ok := refused.Load().(string); ok && err == nil {
		o.debug(s.life.Name, len(s.conns), want, why)
	}
	return err
}

// The method differences compares what was negotiated on two connections to one export:
// on a further connection (n) and on the first one (first). It returns a text for each
// difference. Each text contains the value of the further connection and then the value
// of the first one. The ID of the metadata context may differ.
func (n *negotiated) differences(first *negotiated) []string {
	var list []string
	compare := func(format string, value, want any) {
		if value != want {
			list = append(list, fmt.Sprintf(format, value, want))
		}
	}
	compare("size of %d bytes instead of %d bytes", n.size, first.size)
	compare("transmission flags %#x instead of %#x", n.flags, first.flags)
	compare("minimum block size of %d bytes instead of %d bytes", n.sizes.Min, first.sizes.Min)
	compare("preferred block size of %d bytes instead of %d bytes", n.sizes.Preferred, first.sizes.Preferred)
	compare("maximum block size of %d bytes instead of %d bytes", n.sizes.Max, first.sizes.Max)
	state := map[bool]string{true: "negotiated", false: "not negotiated"}
	compare("structured replies %s instead of %s", state[n.structured], state[first.structured])
	compare("metadata context "+nbd.BaseAllocation+" %s instead of %s", state[n.contexts], state[first.contexts])
	return list
}

// connect opens one connection. limit is the time limit for the handshake, and timeout the
// time limit for each later request.
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

// withLimit returns a context that ends after the given time limit. The cause of the
// end is then an error that says that the server did not answer in time.
func withLimit(ctx context.Context, limit time.Duration) (context.Context, context.CancelFunc) {
	return context.WithTimeoutCause(ctx, limit, fmt.Errorf("the server did not answer within %v: %w", limit, os.ErrDeadlineExceeded))
}

// dialSocket opens a TCP or Unix socket to the server.
func dialSocket(ctx context.Context, uri *nbd.URI) (net.Conn, error) {
	network, address := "tcp", net.JoinHostPort(uri.Host, uri.Port)
	if uri.Socket != "" {
		network, address = "unix", uri.Socket
		if strings.HasPrefix(address, "@") {
			address = "./" + address // package net takes a name with @ for an abstract socket
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

// negotiate performs the handshake on a socket and returns a connection that serves
// calls. If the handshake fails, negotiate closes the socket.
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
