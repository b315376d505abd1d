// Package client reads and writes disks that NBD servers export.
//
// [Open] returns a disk for reading, [OpenWritable] a disk for reading and writing, and
// [Create] a target for a copy. All three take a URI from nbd.ParseURI. [Check] finds
// out whether an export can be a target.
//
// The client implements the fixed newstyle handshake and, for old servers, the
// handshakes newstyle and oldstyle. It also implements TLS with certificates,
// structured replies, and the metadata context base:allocation. It opens several
// connections if the server supports that. It checks everything that a server sends. A
// server that breaks the protocol causes an error that says what was found and what was
// expected.
package client

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/internal/observer"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

const (
	defaultConnections = 4
	maxConnections     = 64
	defaultTimeout     = 2 * time.Minute
	// openTimeouts is the time limit for opening a connection, as a multiple of
	// Options.Timeout.
	openTimeouts = 5
	// If Options.Connections is 0, the client tries to open further connections,
	// which the user did not request. extraTimeout is how long it tries to open
	// such a connection. Without this limit, a server that accepts no more
	// connections would make the client wait for openTimeouts times
	// Options.Timeout.
	extraTimeout = 2 * time.Second
)

// Options configure the connections to a server. The zero value stands for the default
// of each option.
type Options struct {
	// Connections is the number of connections, from 1 to 64. If it is 0, up to 4
	// connections are used, as many as the server accepts. Only 1 connection is used
	// if the server does not advertise CAN_MULTI_CONN, which promises that all
	// connections see the same data.
	Connections int
	// Timeout is how long a request may take before its connection counts as lost.
	// Opening a connection may take 5 times as long. The value 0 stands for 2
	// minutes.
	Timeout time.Duration
	// Warn is called with warnings for the user. It may be nil.
	Warn func(message string)
	// Log gets messages at the debug level. If it is nil, nothing is logged.
	Log *slog.Logger
}

// debug logs that fewer connections are used than there could be, and why.
func (o Options) debug(name string, n, want int, why string) {
	if o.Log != nil {
		o.Log.Debug(fmt.Sprintf("nbd: using %d instead of %d connections: %s", n, want, why), "server", name)
	}
}

// warn passes a message to Options.Warn.
func (o Options) warn(format string, args ...any) {
	if o.Warn != nil {
		o.Warn(fmt.Sprintf(format, args...))
	}
}

// A server is the group of all connections to one export.
type server struct {
	negotiated
	life  life.Life // Context is the one that the disk was opened with
	conns []*conn

	counted int         // connections that the Observer of the context knows
	stop    func() bool // stops the function that breaks the connections when the context ends

	queryWait time.Duration // delay before the first retry of a query for extents

	partial sync.Mutex // held while writePart changes a part of a block
}

// pick returns the connection with the fewest calls in progress.
func (s *server) pick() *conn {
	best := s.conns[0]
	for _, c := range s.conns[1:] {
		if c.load.Load() < best.load.Load() {
			best = c
		}
	}
	return best
}

// do sends the request of a call on the given connection and waits for the reply.
func (s *server) do(ctx context.Context, c *conn, k *call) error {
	if err := c.start(ctx, k); err != nil {
		return err
	}
	return k.wait(ctx)
}

// doAll sends the requests of many calls and waits for the replies. It gets the calls
// from the function next, one after another, until next returns nil or a call fails.
// Then it waits for the calls in progress, and returns the first call that failed and
// its error. One connection allows 16 calls in progress (the constant depth). doAll
// keeps up to twice as many in progress, so that several connections are busy.
func (s *server) doAll(ctx context.Context, next func() *call) (failed *call, err error) {
	var window [2 * depth]*call // ring buffer of the calls in progress
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
	observer.Connections(s.life.Context, -s.counted)
	s.counted = 0
}

// wrap adds the name of the server and the range of a call to the error of this call.
// If the server refused a read for a reason that does not go away, wrap marks the
// error with source.Permanent, so that the read is not retried. If the context of the
// disk has ended, wrap uses the cause of this context in place of err.
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
