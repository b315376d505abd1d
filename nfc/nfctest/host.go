package nfctest

import (
	"crypto/rand"
	"crypto/tls"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"io/fs"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/selfsigned"
)

// Host is a stand-in for the NFC service of an ESXi host. It listens on the loopback interface.
// Its methods are safe for concurrent use.
type Host struct {
	options  Options
	traits   traits
	listener *net.TCPListener
	closed   chan struct{}
	running  sync.WaitGroup // the goroutines of the host
	rules    atomic.Int32   // number of rules, to skip the search for one
	sent     atomic.Int64
	requests atomic.Int64

	state // guarded by its mutex
}

// state is the part of a Host that changes while the host runs.
type state struct {
	mu          sync.Mutex
	ended       sync.Cond // a session or connection has ended, or the host
	certificate tls.Certificate
	disks       map[string]Disk
	tickets     map[string]*issued // unused ones by session
	conns       map[*conn]bool
	active      int // connections whose sessions were not closed
	faults      []*Rule
	violations  []string
	stats       Stats // except Sent, Requests and UnusedTickets
	shut        bool
}

// issued is a ticket that the host has given out.
type issued struct {
	allowed func(file string) bool // nil: all files
}

// New starts a host for a test and ends it with the test. It fails the test if clients did
// something wrong or left connections open, unless o.AllowViolations is set.
func New(t testing.TB, o Options) *Host {
	t.Helper()
	h, err := Start(o)
	if err != nil {
		t.Fatalf("starting the NFC host: %v", err)
	}
	t.Cleanup(func() {
		if !o.AllowViolations && !t.Failed() && !h.AwaitClosed(5*time.Second) {
			t.Errorf("NFC host: the client left %d connections open", h.Stats().Open)
		}
		h.Close()
		if o.AllowViolations {
			return
		}
		for _, v := range h.Violations() {
			t.Errorf("NFC host: %s", v)
		}
	})
	return h
}

// Start starts a host.
func Start(o Options) (*Host, error) {
	if _, ok := profiles[o.Profile]; !ok {
		return nil, fmt.Errorf("unknown profile %d", o.Profile)
	}
	if o.Service == "" {
		o.Service = "nfc"
	}
	if o.MaxTLS == 0 {
		o.MaxTLS = tls.VersionTLS13
	}
	listener, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return nil, err
	}
	h := &Host{options: o, traits: profiles[o.Profile], listener: listener, closed: make(chan struct{})}
	h.ended.L = &h.mu
	h.certificate = newCertificate()
	h.disks = map[string]Disk{}
	h.tickets = map[string]*issued{}
	h.conns = map[*conn]bool{}
	h.running.Go(h.accept)
	return h, nil
}

// accept accepts connections until the host is closed.
func (h *Host) accept() {
	for {
		socket, err := h.listener.AcceptTCP()
		if err != nil {
			return
		}
		h.mu.Lock()
		if h.shut {
			h.mu.Unlock()
			socket.Close()
			return
		}
		h.stats.Connections++
		c := newConn(h, h.stats.Connections, socket)
		h.conns[c] = true
		h.stats.Open++
		h.stats.MostOpen = max(h.stats.MostOpen, h.stats.Open)
		h.mu.Unlock()
		c.logf("connected from %v", socket.RemoteAddr())
		h.running.Go(c.wire.pump)
		h.running.Go(c.serve)
	}
}

// Port returns the port of the host, which listens on 127.0.0.1.
func (h *Host) Port() int { return h.listener.Addr().(*net.TCPAddr).Port }

// AddDisk adds or replaces the disk in a file such as "[ds1] web01/web01.vmdk".
func (h *Host) AddDisk(file string, d Disk) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.disks[file] = d
}

// RemoveDisk removes a disk that AddDisk has added.
func (h *Host) RemoveDisk(file string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.disks, file)
}

// open opens the disk in a file.
func (h *Host) open(file string) (*Disk, error) {
	h.mu.Lock()
	d, ok := h.disks[file]
	h.mu.Unlock()
	switch {
	case ok:
		return &d, nil
	case h.options.Open != nil:
		return h.options.Open(file)
	}
	return nil, fmt.Errorf("%s: %w", file, fs.ErrNotExist)
}

// Ticket returns a new ticket. It is good for one connection, which may open all files.
func (h *Host) Ticket() Ticket { return h.TicketFor(nil) }

// TicketFor returns a new ticket for one connection, which may open the files for which allowed
// returns true. Other files are refused with ERROR 11.
func (h *Host) TicketFor(allowed func(file string) bool) Ticket {
	var secret [26]byte
	rand.Read(secret[:])
	t := Ticket{Host: "127.0.0.1", Port: h.Port(), Service: h.options.Service, Session: hex.EncodeToString(secret[:])}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.tickets[t.Session] = &issued{allowed}
	h.stats.Tickets++
	if der := h.certificate.Certificate[0]; h.options.PEM {
		t.Certificate = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	} else {
		t.SHA1 = selfsigned.SHA1(der)
	}
	return t
}

// useTicket returns the ticket of a session and makes it invalid. It returns nil if the ticket
// does not exist or was used.
func (h *Host) useTicket(session string) *issued {
	h.mu.Lock()
	defer h.mu.Unlock()
	t := h.tickets[session]
	delete(h.tickets, session)
	return t
}

// ExpireTickets makes all tickets invalid that no connection has used.
func (h *Host) ExpireTickets() {
	h.mu.Lock()
	defer h.mu.Unlock()
	clear(h.tickets)
}

// RenewCertificate gives the host a new certificate for the connections and tickets from now on.
func (h *Host) RenewCertificate() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.certificate = newCertificate()
}

func (h *Host) currentCertificate() tls.Certificate {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.certificate
}

// Stats returns numbers about the host.
func (h *Host) Stats() Stats {
	h.mu.Lock()
	defer h.mu.Unlock()
	s := h.stats
	s.Sent, s.Requests, s.UnusedTickets = h.sent.Load(), h.requests.Load(), len(h.tickets)
	s.Reads = slices.Clone(s.Reads)
	return s
}

// Violations returns what clients did wrong.
func (h *Host) Violations() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Clone(h.violations)
}

// AwaitClosed waits until no connection is open. It returns false after the given time.
func (h *Host) AwaitClosed(timeout time.Duration) bool { return h.AwaitOpen(0, timeout) }

// AwaitOpen waits until at most n connections are open. It returns false after the given time.
func (h *Host) AwaitOpen(n int, timeout time.Duration) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.await(timeout, func() bool { return h.stats.Open <= n })
}

// await waits until a condition is true that depends on sessions and connections. It returns
// false after the given time, and when the host is closed. The caller holds h.mu.
func (h *Host) await(timeout time.Duration, condition func() bool) bool {
	if condition() {
		return true
	}
	late := false
	timer := time.AfterFunc(timeout, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		late = true
		h.ended.Broadcast()
	})
	defer timer.Stop()
	for !condition() {
		if late || h.shut {
			return false
		}
		h.ended.Wait()
	}
	return true
}

// Cut resets all open connections.
func (h *Host) Cut() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.conns {
		c.wire.reset()
	}
}

// Close ends the host, its connections and its goroutines.
func (h *Host) Close() {
	h.mu.Lock()
	if !h.shut {
		h.shut = true
		close(h.closed)
		h.listener.Close()
		for c := range h.conns {
			c.wire.Close()
		}
		h.ended.Broadcast()
	}
	h.mu.Unlock()
	h.running.Wait()
}

// grace is how long the host waits for room before it refuses a connection or a session. A client
// that has just closed a connection may open the next one before the host notices the end of the
// first one, and must not be refused then.
const grace = 100 * time.Millisecond

// admit counts a connection. It returns false if there are too many of them.
func (h *Host) admit(c *conn) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.await(grace, func() bool { return h.options.Connections == 0 || h.active < h.options.Connections }) {
		return false
	}
	h.active++
	c.active = true
	return true
}

// acquire takes n bytes of the memory for sessions for c. It returns false if there is not enough.
func (h *Host) acquire(c *conn, n int64) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if !h.await(grace, func() bool { return h.options.Memory == 0 || h.stats.Memory+n <= h.options.Memory }) {
		return false
	}
	c.memory += n
	h.stats.Memory += n
	h.stats.MostMemory = max(h.stats.MostMemory, h.stats.Memory)
	return true
}

// sessionEnded counts a session of c that was closed, or whose connection has ended. It returns
// the memory of the session.
func (h *Host) sessionEnded(c *conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.stats.Memory -= c.memory
	c.memory = 0
	if c.active {
		c.active = false
		h.active--
	}
	h.ended.Broadcast()
}

// remove forgets a connection that has ended.
func (h *Host) remove(c *conn) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.conns, c)
	h.stats.Open--
	h.ended.Broadcast()
}
