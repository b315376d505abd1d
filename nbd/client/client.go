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
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/life"
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
	extraTimeout = 2 * time.Second
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

// server is the group of all connections to one export.
type server struct {
	negotiated
	life  life.Life // Context is the one that the disk was opened with
	conns []*conn
	stop  func() bool // ends the watch over the context

	queryWait time.Duration // the wait before the first retry of a query for extents

	partial sync.Mutex // held while a part of a block is read, changed and written back
}

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
func (s *server) doAll(ctx context.Context, next func() *call) (failed *call, err error) {
	var window [2 * depth]*call // a ring of those on the way
	from, to := 0, 0
	await := func() {
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
			await()
		}
	}
	for from < to {
		await()
	}
	return failed, err
}

// close waits for the calls in progress and disconnects.
func (s *server) close() error {
	return s.life.Close(func() error {
		s.disconnect()
		return nil
	})
}

// disconnect ends all connections. Calls in progress fail.
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
func (s *server) wrap(k *call, err error) error {
	var refused *serverError
	if k.cmd == nbd.CmdRead && errors.As(err, &refused) && refused.final() {
		err = source.Permanent(err)
	}
	if ended := s.life.Context.Err(); ended != nil && !errors.Is(err, context.Cause(s.life.Context)) {
		err = context.Cause(s.life.Context)
	}
	return fmt.Errorf("%s: %v: %w", s.life.Name, k, err)
}
