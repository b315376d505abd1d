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
	// stall is how long a client may hold memory and neither take nor send
	// stallBytes, while others are short of memory.
	stall      = 20 * time.Second
	stallBytes = 64 << 10
	// stallCheck is how often the server looks for such clients.
	stallCheck = time.Second
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
	// ended. Those that take longer get no reply. 0: 5 s.
	Grace time.Duration
	// Kill is called with ErrShutdown when Grace is over, to end what disks do
	// that were not opened by Exports.Open. It may be nil.
	Kill func(cause error)
	// Memory bounds the bytes of data in work that all connections share, 0:
	// 64 MiB. At least 4 MiB are used. Beyond it each connection can have 16 KiB
	// while the memory is short.
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
	exports    Exports
	o          Options
	memory     *memory
	calls      calls
	badRanges  badRanges
	cacheBytes atomic.Int64 // bytes that the extents of all exports take

	// life is the context of the disks. It outlives the one of Serve, so that
	// requests in work can end well.
	disksCtx    context.Context
	cancelDisks context.CancelCauseFunc

	stopping chan struct{} // closed when the server begins to end
	killed   atomic.Bool   // the grace is over

	closeErr atomic.Pointer[error] // see Err

	clients        atomic.Int64 // with an export
	lastStallCheck atomic.Int64 // when dropStalled looked last, in ns

	mu         sync.Mutex
	open       map[string]*export // by name
	conns      map[*conn]struct{}
	peers      map[string]*peer // of conns
	graceTimer *time.Timer      // not nil: the server ends
	// evicted counts connections that have to end because others need the room.
	evicted int
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
	s := &Server{
		exports: exports, o: o, stopping: make(chan struct{}),
		calls: make(calls, maxCalls), open: map[string]*export{}, conns: map[*conn]struct{}{}, peers: map[string]*peer{},
	}
	s.memory = newMemory(o.Memory, s.dropStalled)
	s.disksCtx, s.cancelDisks = context.WithCancelCause(context.Background())
	return s, nil
}

// Serve takes connections from the listeners, which it closes, until ctx ends.
// Then it reads no more requests, lets those in work end for Options.Grace,
// closes the connections and returns nil. A request that was not done by then
// gets no reply, so that the client can send it again to the next server. Serve
// returns an error when a listener fails. The server can't be used after it, but
// for connections of ServeConn, which end by themselves.
func (s *Server) Serve(ctx context.Context, listeners ...net.Listener) error {
	defer s.endDisks()
	all, ctx := errgroup.WithContext(ctx)
	for _, l := range listeners {
		all.Go(func() error { return s.accept(ctx, l) })
	}
	return all.Wait()
}

// endLife ends the context of the disks and the timer of the grace, unless there
// are connections, which still need both: those of ServeConn can outlive Serve.
func (s *Server) endDisks() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.endDisksLocked()
}

// endLifeLocked is endLife for a caller that holds s.mu.
func (s *Server) endDisksLocked() {
	if len(s.conns) > 0 {
		return
	}
	if s.graceTimer != nil {
		s.graceTimer.Stop()
	}
	s.cancelDisks(ErrShutdown)
}

func (s *Server) accept(ctx context.Context, l net.Listener) error {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	defer l.Close()
	var served sync.WaitGroup
	defer served.Wait()
	// If the listener fails, its clients are ended too: they may stay for days, and
	// Serve returns the error only when they have left.
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
		s.o.Log.Warn("no more connections for now", "error", err, "pause", pause)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pause):
		}
	}
}

// Err returns the first error of closing a disk that clients could write to, once
// they have left: what they wrote and did not flush may be lost, and no client
// learns of it.
func (s *Server) Err() error {
	if err := s.closeErr.Load(); err != nil {
		return *err
	}
	return nil
}

// passing reports whether accepting may succeed later.
func isTemporary(err error) bool {
	for _, e := range []error{unix.EMFILE, unix.ENFILE, unix.ENOBUFS, unix.ENOMEM, unix.ECONNABORTED, unix.EAGAIN, unix.EINTR} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// ServeConn serves a client that is connected already, until it leaves or ctx
// ends, and closes the connection. The end of ctx is the end of the server, as
// in Serve.
func (s *Server) ServeConn(ctx context.Context, c net.Conn) { s.serve(ctx, c) }

func (s *Server) serve(ctx context.Context, raw net.Conn) {
	defer raw.Close()
	c := newConn(s, raw)
	defer c.cancel(net.ErrClosed)
	switch ok, full := s.register(c); {
	case full:
		s.o.Log.Warn("refused a client: too many connections", "client", clientName(raw), "limit", s.o.MaxConnections)
		return
	case !ok:
		return
	}
	defer s.unregister(c)
	defer context.AfterFunc(ctx, s.shutdown)()
	if err := c.serve(); err != nil {
		s.o.Log.Info("client", "client", clientName(raw), "error", err)
	}
}

// register adds a connection, unless there are too many or the server ends. It
// does not log: writing a log may block, and all connections need s.mu.
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

// makeRoom ends the oldest connection that is still in the handshake, of a peer
// with more connections than the one of that name has. So one host that connects
// and says nothing can't keep all others out. It reports whether there was one.
// The caller holds s.mu.
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
	oldest.fail(errors.New("too many connections, and this one chose no export yet"))
	return true
}

// peerName returns the name by which the connections of one client are known:
// the address of its host, or the id of its process. It is empty where neither
// is known.
func peerName(c net.Conn) string {
	switch c := c.(type) {
	case *net.TCPConn:
		if a, ok := c.RemoteAddr().(*net.TCPAddr); ok {
			return a.IP.String()
		}
	case *net.UnixConn:
		raw, err := c.SyscallConn()
		if err != nil {
			return ""
		}
		var peer *unix.Ucred
		if raw.Control(func(fd uintptr) { peer, err = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) }) == nil && err == nil {
			return fmt.Sprintf("process %d", peer.Pid)
		}
	}
	return ""
}

func clientName(c net.Conn) string {
	if a := c.RemoteAddr(); a != nil && a.String() != "" && a.String() != "@" {
		return a.String()
	}
	return "local"
}

// shutdown begins the end of the server: no connection reads another request,
// and when the grace is over the disks are told to fail.
func (s *Server) shutdown() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.graceTimer != nil {
		return
	}
	close(s.stopping)
	// One timer for all: the end of the disks must not be what stops the timer
	// of a connection whose client takes nothing.
	s.graceTimer = time.AfterFunc(s.o.Grace, s.endGrace)
	for c := range s.conns {
		c.stopReading()
	}
}

// endGrace ends what has not ended by itself.
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

// endedWith reports whether err, which a disk returned, comes from the end of
// the server.
func (s *Server) endedWith(err error) bool {
	select {
	case <-s.stopping:
		return errors.Is(err, ErrShutdown) || errors.Is(err, context.Canceled)
	default:
		return false
	}
}

// enter and leave count the connections that are in the transmission, or will
// be when the client has been told so.
func (s *Server) clientEntered(c *conn) {
	c.entered.Store(true)
	s.clients.Add(1)
}

func (s *Server) clientLeft() {
	others := s.clients.Add(-1)
	if s.o.Left != nil {
		s.o.Left(int(others))
	}
}

// dropStalled ends the connections that hold shared memory and whose client
// neither takes its replies nor sends the data of its writes. It is called when
// memory is short, and looks every stallCheck.
func (s *Server) dropStalled() {
	now, last := time.Now().UnixNano(), s.lastStallCheck.Load()
	if now-last < int64(stallCheck) || !s.lastStallCheck.CompareAndSwap(last, now) {
		return
	}
	for _, c := range s.connections() {
		if !c.failed() && c.stalled(stall) && s.memory.holdsShared(&c.holder) {
			go c.fail(fmt.Errorf("the client moved fewer than %d bytes in %v, and others need the memory that it holds", stallBytes, stall))
		}
	}
}

// connections returns the connections that there are. Closing one waits for the
// system call that uses it, so nobody closes one of these under s.mu.
func (s *Server) connections() []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Collect(maps.Keys(s.conns))
}
