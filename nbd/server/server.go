// Package server exports disks over NBD, to any number of clients at once.
//
// It speaks the protocol of package nbd: fixed newstyle with all options of the
// baseline, TLS by certificates, structured replies with data and holes, the
// allocation by base:allocation and qemu:allocation-depth. Each connection has
// one goroutine, and one more for each request in work; what they take of
// memory is bounded for each connection and for all together, see memory.
// Nothing that a client sends is believed, and what it does harms no other.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"vddkcp/source"
)

const (
	defaultMaxConnections = 4096
	defaultHandshake      = 30 * time.Second
	defaultGrace          = 5 * time.Second
	defaultMemory         = 64 << 20
	// lastRequests is how long requests are read, and refused, when the server
	// ends.
	lastRequests = 200 * time.Millisecond
	// lastWrites is how long a client has to take its last replies after the
	// grace.
	lastWrites = time.Second
)

// ErrUnknownExport is what Exports returns, wrapped or not, where it has no
// export of the name: the client is told so, and may ask for another.
var ErrUnknownExport = errors.New("no such export")

// ErrShutdown is the cause of the end of a disk's context when the server ends
// and a request takes longer than Options.Grace.
var ErrShutdown = errors.New("the server is shutting down")

// Export is what clients are told about an export beside what its disk tells.
type Export struct {
	Name, Description string // UTF-8 without NUL, at most nbd.MaxString bytes
}

// Exports are what a server has. The methods are called concurrently.
type Exports interface {
	// List returns the exports that clients may know of.
	List(ctx context.Context) ([]Export, error)
	// Find returns the export that a client means by name, without opening it.
	// Several names may mean one export: the server shares what is open, and
	// what is known of it, by the Name that Find returns.
	Find(ctx context.Context, name string) (Export, error)
	// Open opens the disk of the export whose Name is name. It is called for
	// the first client of an export, and the disk is closed after the last has
	// gone. The context is the disk's: it ends after the server's own.
	Open(ctx context.Context, name string) (source.Disk, error)
}

// TLSMode says whether connections are encrypted.
type TLSMode uint8

const (
	TLSOff     TLSMode = iota // STARTTLS is unknown
	TLSOn                     // a client may, and needs not
	TLSRequire                // without it there are no exports
)

// Options tune a server. The zero value is the default.
type Options struct {
	// Writable lets clients write to disks that are source.Writable.
	Writable bool
	// TLS has the certificates, see LoadTLS. It is needed where TLSMode is not
	// TLSOff.
	TLS     *tls.Config
	TLSMode TLSMode
	// MaxConnections is how many are served at once, 0: 4096. One more is
	// closed at once.
	MaxConnections int
	// Handshake is how long a client may take until it begins to read and
	// write, the opening of the disk not counted. 0: 30 s.
	Handshake time.Duration
	// Grace is how long requests in work go on after the server's context has
	// ended; then they fail. 0: 5 s.
	Grace time.Duration
	// Memory bounds the bytes of data in work of all connections, 0: 64 MiB. At
	// least 4 MiB are used.
	Memory int64
	// Stats counts requests; it may be nil.
	Stats *Stats
	// Left is called after each connection that got as far as an export, with
	// the number of those that still are. It may be nil.
	Left func(others int)
	// Log takes what clients do wrong and what disks fail with. It may be nil.
	Log *slog.Logger
}

// Server serves exports. All methods are safe for concurrent use.
type Server struct {
	exports Exports
	o       Options
	memory  *memory
	mapped  atomic.Int64 // bytes that the extents of all exports take

	// life is the context of the disks. It outlives the one of Serve, so that
	// requests in work can end well.
	life context.Context
	kill context.CancelCauseFunc

	connections atomic.Int64 // all
	clients     atomic.Int64 // with an export

	mu   sync.Mutex
	open map[string]*export // by name
	live map[*conn]struct{}
}

// New returns a server, which does nothing yet.
func New(exports Exports, o Options) (*Server, error) {
	if o.TLSMode != TLSOff && o.TLS == nil {
		return nil, errors.New("TLS without certificates")
	}
	if o.TLS != nil {
		o.TLS = serveTLS(o.TLS)
	}
	if o.MaxConnections == 0 {
		o.MaxConnections = defaultMaxConnections
	}
	if o.Handshake == 0 {
		o.Handshake = defaultHandshake
	}
	if o.Grace == 0 {
		o.Grace = defaultGrace
	}
	if o.Memory == 0 {
		o.Memory = defaultMemory
	}
	if o.Stats == nil {
		o.Stats = new(Stats)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{exports: exports, o: o, open: map[string]*export{}, live: map[*conn]struct{}{}}
	s.memory = newMemory(o.Memory, s.dropStalled)
	s.life, s.kill = context.WithCancelCause(context.Background())
	return s, nil
}

// Serve takes connections from the listeners, which it closes, until ctx ends.
// Then it takes no more requests, lets those in work end, fails what takes
// longer than Options.Grace with ESHUTDOWN, closes the connections and returns
// nil. It returns an error when a listener fails. The server can't be used
// after it.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	defer s.kill(ErrShutdown)
	all, ctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		all.Go(func() error { return s.accept(ctx, l) })
	}
	return all.Wait()
}

func (s *Server) accept(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	var served sync.WaitGroup
	defer served.Wait()
	for pause := time.Duration(0); ; {
		c, err := l.Accept()
		switch {
		case err == nil:
			pause = 0
			served.Go(func() { s.serve(ctx, c) })
			continue
		case ctx.Err() != nil:
			return nil
		case !passing(err):
			return fmt.Errorf("listen on %v: %w", l.Addr(), err)
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		s.o.Log.Warn("no more connections for now", "error", err, "pause", pause)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// passing reports whether accepting may succeed later.
func passing(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED, unix.EAGAIN, unix.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// ServeConn serves a client that is connected already, until it leaves or ctx
// ends, and closes the connection.
func (s *Server) ServeConn(ctx context.Context, c net.Conn) { s.serve(ctx, c) }

func (s *Server) serve(ctx context.Context, raw net.Conn) {
	defer raw.Close()
	defer s.connections.Add(-1)
	if s.connections.Add(1) > int64(s.o.MaxConnections) {
		s.o.Log.Warn("refused a client: too many connections", "client", clientName(raw), "limit", s.o.MaxConnections)
		return
	}
	c := newConn(ctx, s, raw)
	if err := c.serve(); err != nil {
		s.o.Log.Info("client", "client", clientName(raw), "error", err)
	}
}

func clientName(c net.Conn) string {
	if a := c.RemoteAddr(); a != nil && a.String() != "" && a.String() != "@" {
		return a.String()
	}
	return "local"
}

// enter and leave keep the connections that are in the transmission, or will be
// when the client has been told so.
func (s *Server) enter(c *conn) {
	c.entered = true
	s.clients.Add(1)
	s.mu.Lock()
	defer s.mu.Unlock()
	s.live[c] = struct{}{}
}

func (s *Server) leave(c *conn) {
	s.mu.Lock()
	delete(s.live, c)
	s.mu.Unlock()
	others := s.clients.Add(-1)
	if s.o.Left != nil {
		s.o.Left(int(others))
	}
}

// dropStalled ends the connections whose client has taken nothing for so long
// although there is something for it: others wait for its memory.
func (s *Server) dropStalled(after time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.live {
		if c.out.stalled(after) {
			c.fail(fmt.Errorf("the client did not take its replies for %v, and others wait for the memory", after))
		}
	}
}
