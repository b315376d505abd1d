package nfc

import "sync"

// Hosts remembers with which of several forms of the handshake the hosts of one command were reached.
// It is safe for concurrent use.
type Hosts struct {
	mu    sync.Mutex
	known map[string]string // by the address of a host, with the port, where a disk was opened: an element of variants
}

// NewHosts returns a Hosts that knows no hosts.
func NewHosts() *Hosts { return &Hosts{known: make(map[string]string)} }

// The method variant returns the form of the handshake that works with a host. ok is false if no
// disk was opened there yet.
func (h *Hosts) variant(host string) (variant string, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	variant, ok = h.known[host]
	return variant, ok
}

// The method record records that a disk was opened on a host. The result says whether this is the first
// disk there, or whether the host was reached in another way before.
func (h *Hosts) record(host, variant string) (news bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, ok := h.known[host]
	h.known[host] = variant
	return !ok || old != variant
}
