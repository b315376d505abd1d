// Package server exports disks over NBD, to any number of clients at once.
//
// A program implements [Exports], or lists open disks in a [Fixed], and calls [New],
// [Listen] and [Server.Serve], which serves clients until its context ends. [URI] returns
// the address for clients.
//
// The server implements the fixed newstyle handshake with all options of the baseline,
// TLS with certificates ([LoadTLS]), structured replies with holes, and the metadata
// contexts base:allocation and qemu:allocation-depth. Disks that are source.Writable can
// be written to ([Options].Writable).
//
// Each connection has one goroutine that reads requests, and one for each request in
// progress. The memory for the data of requests is bounded, for each connection and for
// all connections together ([Options].Memory). The server checks everything that clients
// send. A client that breaks the protocol, or is slow, does not affect other clients.
package server

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/source"
)

const (
	defaultMaxConnections = 4096
	defaultHandshake      = 30 * time.Second
	defaultGrace          = 5 * time.Second
	defaultMemory         = 64 << 20
	// The constant stall is how long a client may hold shared memory without sending or
	// receiving 64 KiB (the constant stallBytes), if other clients are short of memory.
	// After this time its connection is closed.
	stall      = 20 * time.Second
	stallBytes = 64 << 10
	// stallCheck is the minimum time between two searches for stalled clients: those that
	// the constant stall describes. The server searches for them when memory is short.
	stallCheck = time.Second
	// lastWrites is how long a client has, after the grace period, to receive its
	// last replies.
	lastWrites = time.Second
)

// ErrUnknownExport is the error with which the methods of Exports report that no export has
// the given name. They may wrap it. The client may then choose another export.
var ErrUnknownExport = errors.New("no such export")

// ErrShutdown is the cause with which the context of disks ends when requests are still in
// progress at the end of Options.Grace.
var ErrShutdown = errors.New("the server is shutting down")

// Export is the name and the description of an export, as clients see them.
type Export struct {
	Name, Description string // UTF-8 without NUL, at most nbd.MaxString bytes each
}

// Exports provides the exports of a server. The methods are called concurrently.
type Exports interface {
	// List returns the exports that clients may list.
	List(ctx context.Context) ([]Export, error)
	// Find returns the export for the name that a client sent, without opening it.
	// Find may return the same export for several names. Clients for which Find
	// returns an export with the same Name share one open disk. If the name is
	// unknown, the error is ErrUnknownExport.
	Find(ctx context.Context, name string) (Export, error)
	// Open opens the disk of an export. The given name is the Name of this export.
	// The server calls Open for the first client of an export, and closes the disk
	// after the last client has disconnected. The disk may use ctx until it is
	// closed, because ctx ends later than the context of Serve.
	Open(ctx context.Context, name string) (source.Disk, error)
}

// TLSMode says whether clients may or must use TLS.
type TLSMode uint8

const (
	TLSOff     TLSMode = iota // the server does not support TLS
	TLSOn                     // clients may use TLS
	TLSRequire                // clients must use TLS before they can list or choose an export
)

// Options configure a server. The zero value is a read-only server without TLS.
type Options struct {
	// Writable allows clients to write to disks that are source.Writable.
	Writable bool
	// TLS holds the certificates, see LoadTLS. It must be set unless TLSMode is
	// TLSOff.
	TLS     *tls.Config
	TLSMode TLSMode
	// MaxConnections is the maximum number of connections that are served at the
	// same time. Further connections are closed immediately. The value 0 stands for
	// 4096.
	MaxConnections int
	// Handshake is how long a handshake may take, without the time to open the
	// disk. The value 0 stands for 30 seconds.
	Handshake time.Duration
	// Grace is how long requests in progress may continue after the context of
	// Serve has ended. Requests that take longer get no reply. The value 0 stands
	// for 5 seconds.
	Grace time.Duration
	// Kill is called with ErrShutdown at the end of Grace. Its purpose is to end calls to
	// a disk that ignores the context of Exports.Open. Kill may be nil.
	Kill func(cause error)
	// Memory is the maximum size, in bytes, of the data of all requests in progress. The
	// value 0 stands for 64 MiB. Other values below 4 MiB stand for 4 MiB. If this memory is
	// used up, each connection can still get one buffer of 16 KiB in addition.
	Memory int64
	// RateLimit is how many bytes per second all clients together may read, and how many they may
	// write. Clients that want more at the same time get equal shares. Requests without data, such
	// as block status, trim and write zeroes, are not limited. The value 0 stands for no limit.
	RateLimit int64
	// Stats counts the requests. It may be nil.
	Stats *Stats
	// Left is called after a client that had chosen an export has disconnected. The
	// argument is the number of such clients that are still connected. Left may be
	// nil.
	Left func(others int)
	// Log receives the errors of disks and of clients. It also receives two debug messages for each
	// client that has chosen an export, one at the beginning and one at the end. It may be nil.
	Log *slog.Logger
}

// Server serves exports. All methods are safe for concurrent use.
type Server struct {
	exports    Exports
	o          Options
	memory     *memory
	calls      calls
	badRanges  badRanges
	rates      rateLimits
	cacheBytes atomic.Int64 // size of the cached extents of all exports

	// disksCtx is the context of disks. It ends later than the context of Serve, so
	// that requests in progress can be completed.
	disksCtx    context.Context
	cancelDisks context.CancelCauseFunc

	stopping chan struct{} // closed when the shutdown begins
	killed   atomic.Bool   // the grace period is over

	closeErr atomic.Pointer[error] // see Err

	clients        atomic.Int64 // connections that have chosen an export
	lastStallCheck atomic.Int64 // time of the last search for stalled clients, in Unix nanoseconds

	mu         sync.Mutex
	open       map[string]*export // by Export.Name
	conns      map[*conn]struct{}
	peers      map[string]*peer // the peers of conns, by peerName
	graceTimer *time.Timer      // calls endGrace; nil: the shutdown has not begun
	evicted    int              // connections in conns that evictOldest has closed
}

// New returns a server that serves no connections yet. It fails if TLS is on and there are
// no certificates.
func New(exports Exports, o Options) (*Server, error) {
	if o.TLSMode != TLSOff && o.TLS == nil {
		return nil, errors.New("TLS is on, but there is no certificate (Options.TLS)")
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
	s := &Server{
		exports: exports, o: o, stopping: make(chan struct{}),
		calls: make(calls, maxCalls), open: map[string]*export{}, conns: map[*conn]struct{}{}, peers: map[string]*peer{},
	}
	s.memory = newMemory(o.Memory, s.dropStalled)
	s.rates = rateLimits{newRateLimit(o.RateLimit), newRateLimit(o.RateLimit)}
	s.disksCtx, s.cancelDisks = context.WithCancelCause(context.Background())
	return s, nil
}

// Serve accepts connections from the listeners until ctx ends, and then shuts down: it
// reads no more requests, waits at most Options.Grace for the requests in progress, closes
// the connections and the listeners, and returns nil. A request that was not completed by
// then gets no reply, so that its client can connect to a server that is started later and
// repeat the request there. If a listener fails, Serve shuts down and returns its error.
// Serve can be called once; connections of ServeConn may continue after it has returned.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	defer s.endDisks()
	all, ctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		all.Go(func() error { return s.accept(ctx, l) })
	}
	return all.Wait()
}

// Clients returns the number of connections that have chosen an export.
func (s *Server) Clients() int { return int(s.clients.Load()) }

// endDisks ends the context of disks and stops the timer of the grace period. It does
// nothing while there are connections, because they still need the context and the timer.
// Connections of ServeConn can continue after Serve has returned.
func (s *Server) endDisks() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endDisksLocked()
}

// endDisksLocked is endDisks for a caller that holds s.mu.
func (s *Server) endDisksLocked() {
	if len(s.conns) > 0 {
		return
	}
	if s.graceTimer != nil {
		s.graceTimer.Stop()
	}
	s.cancelDisks(ErrShutdown)
}

// The method accept accepts connections from the listener l and serves them, until ctx
// ends or the listener fails. It closes the listener, and returns after the last of these
// connections has ended.
func (s *Server) accept(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	var served sync.WaitGroup
	defer served.Wait()
	// If the listener fails, the server also ends the connections that the listener
	// has accepted. Otherwise a client that stays connected for days would delay the
	// error of the listener for days, because Serve returns the error only after all
	// connections have ended.
	serving, end := context.WithCancel(ctx)
	defer end()
	for pause := time.Duration(0); ; {
		c, err := l.Accept()
		switch {
		case err == nil:
			pause = 0
			served.Go(func() { s.serve(serving, c) })
			continue
		case ctx.Err() != nil:
			return nil
		case !isTemporary(err):
			return fmt.Errorf("listen on %v: %w", l.Addr(), err)
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		s.o.Log.Warn("cannot accept connections now", "error", err, "pause", pause)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// Err returns the first error of closing a writable disk. The server closes a disk
// after its last client has disconnected, so no client learns of this error. Data that
// were written and not flushed may be lost.
func (s *Server) Err() error {
	if err := s.closeErr.Load(); err != nil {
		return *err
	}
	return nil
}

// isTemporary reports whether a listener whose Accept failed with err may accept
// connections later.
func isTemporary(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED, unix.EAGAIN, unix.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// ServeConn serves a client over an existing connection. It closes the connection and
// returns when the client has disconnected or ctx ends. When ctx ends, the whole server
// shuts down: see Serve.
func (s *Server) ServeConn(ctx context.Context, c net.Conn) { s.serve(ctx, c) }

// The method serve serves one connection, and logs its error.
func (s *Server) serve(ctx context.Context, raw net.Conn) {
	defer raw.Close()
	c := newConn(s, raw)
	defer c.cancel(net.ErrClosed)
	switch ok, full := s.register(c); {
	case full:
		s.o.Log.Warn("refused a connection: too many connections", "client", clientName(raw), "limit", s.o.MaxConnections)
		return
	case !ok:
		return
	}
	defer s.unregister(c)
	defer context.AfterFunc(ctx, s.shutdown)()
	err := c.serve()
	c.logEnd(err)
	if err != nil && !errors.Is(err, ErrShutdown) {
		s.o.Log.Info("connection ended with an error", "client", clientName(raw), "error", err)
	}
}

// The method register adds a connection. The result ok is false if the connection must
// not be served: either there are too many connections (then full is true) or the server
// is shutting down. This method does not log, because writing a log may block while the
// method holds s.mu, which all connections need.
func (s *Server) register(c *conn) (ok, full bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.graceTimer != nil:
		return false, false
	case len(s.conns)-s.evicted >= s.o.MaxConnections && !s.evictOldest(peerName(c.base)):
		return false, true
	}
	s.conns[c] = struct{}{}
	c.peerName = peerName(c.base)
	p := s.peers[c.peerName]
	if p == nil {
		p = new(peer)
		if c.peerName != "" {
			s.peers[c.peerName] = p
		}
	}
	p.connections++
	c.holder.peer = p
	return true, false
}

// The method unregister removes a connection that has ended.
func (s *Server) unregister(c *conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.conns, c)
	if c.evicted {
		s.evicted--
	}
	if p := c.holder.peer; p.connections == 1 {
		delete(s.peers, c.peerName)
	} else {
		p.connections--
	}
	if s.graceTimer != nil {
		s.endDisksLocked()
	}
}

// evictOldest closes a connection to make room for a new one. It considers the
// connections that are still in the handshake and whose peer has more connections
// than the peer of the new one, and closes the oldest of them. Therefore one machine
// that opens many idle connections cannot block all others. evictOldest reports
// whether it closed a connection. The caller holds s.mu.
func (s *Server) evictOldest(newcomer string) bool {
	own := 1
	if p := s.peers[newcomer]; p != nil {
		own += p.connections
	}
	var oldest *conn
	for c := range s.conns {
		if c.evicted || c.entered.Load() || c.holder.peer.connections <= own {
			continue
		}
		if oldest == nil || c.started.Before(oldest.started) {
			oldest = c
		}
	}
	if oldest == nil {
		return false
	}
	oldest.evicted = true
	s.evicted++
	oldest.fail(errors.New("the server has too many connections and closed this one, because its client had not chosen an export yet"))
	return true
}

// peerName returns a name that all connections of one peer share: the IP address of the
// client, or the ID of its process for a Unix socket. It is empty if neither is known.
func peerName(c net.Conn) string {
	switch c := c.(type) {
	case *net.TCPConn:
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
			return a.IP.String()
		}
	case *net.UnixConn:
		if peer := credentials(c); peer != nil {
			return fmt.Sprintf("process %d", peer.Pid)
		}
	}
	return ""
}

// credentials returns the process that has opened the other end of a Unix socket, or nil if the
// kernel does not tell it.
func credentials(c *net.UnixConn) *unix.Ucred {
	raw, err := c.SyscallConn()
	if err != nil {
		return nil
	}
	var peer *unix.Ucred
	failed := raw.Control(func(fd uintptr) {
		peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	})
	if failed != nil || err != nil {
		return nil
	}
	return peer
}

// clientName returns the name of a client for the log: its address, or its process and user for a
// Unix socket.
func clientName(c net.Conn) string {
	if a := c.RemoteAddr(); a != nil && a.String() != "" && a.String() != "@" {
		return a.String()
	}
	if c, ok := c.(*net.UnixConn); ok {
		if peer := credentials(c); peer != nil {
			return fmt.Sprintf("process %d of user %d", peer.Pid, peer.Uid)
		}
	}
	return "local"
}

// The method shutdown begins the shutdown of the server: no connection reads another
// request, and at the end of the grace period the context of disks ends. Later calls do
// nothing.
func (s *Server) shutdown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.graceTimer != nil {
		return
	}
	close(s.stopping)
	// A single timer ends the context of disks and limits the time of the last
	// writes to all connections, so that the connection of a client that does not
	// receive its replies ends as well.
	s.graceTimer = time.AfterFunc(s.o.Grace, s.endGrace)
	for c := range s.conns {
		c.stopReading()
	}
}

// endGrace ends the context of disks, and limits the time in which clients can receive
// their last replies.
func (s *Server) endGrace() {
	s.killed.Store(true)
	s.cancelDisks(ErrShutdown)
	if s.o.Kill != nil {
		s.o.Kill(ErrShutdown)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		c.base.SetWriteDeadline(time.Now().Add(lastWrites))
	}
}

// endedWith reports whether an error of a disk occurred because the server is shutting
// down.
func (s *Server) endedWith(err error) bool {
	select {
	case <-s.stopping:
		return errors.Is(err, ErrShutdown) || errors.Is(err, context.Canceled)
	default:
		return false
	}
}

// clientEntered counts a client that has chosen an export. It is called before the
// client gets the reply that ends the handshake.
func (s *Server) clientEntered(c *conn) {
	c.entered.Store(true)
	s.clients.Add(1)
	c.logBegin()
}

// clientLeft is called when a client that has chosen an export disconnects (see
// clientEntered).
func (s *Server) clientLeft() {
	others := s.clients.Add(-1)
	if s.o.Left != nil {
		s.o.Left(int(others))
	}
}

// dropStalled closes the connections that hold shared memory and whose clients have stalled.
// It is called when memory is short. It does nothing if it searched for such clients less
// than a second ago (the constant stallCheck).
func (s *Server) dropStalled() {
	now, last := time.Now().UnixNano(), s.lastStallCheck.Load()
	if now-last < int64(stallCheck) || !s.lastStallCheck.CompareAndSwap(last, now) {
		return
	}
	for _, c := range s.connections() {
		if !c.failed() && c.stalled(stall) && s.memory.holdsShared(&c.holder) {
			go c.fail(fmt.Errorf("closed the connection, because other clients need the memory that it uses: the client sent or received fewer than %d bytes in %v", stallBytes, stall))
		}
	}
}

// The method connections returns the current connections. Callers close them without
// holding s.mu, since closing waits for system calls that use the connection.
func (s *Server) connections() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.conns))
}
