package nfc

import (
	"maps"
	"slices"
	"sync"
)

// Hosts remembers how the hosts of one command were reached: with which of several forms of the
// handshake, and how their certificates were checked. It is safe for concurrent use.
type Hosts struct {
	mu    sync.Mutex
	known map[string]hostState // by the address of the host, with the port
}

// hostState is what is known about a host. A host is known when a disk was opened there.
type hostState struct {
	variant string // of the handshake; an element of variants
	sha1    bool   // the certificate was compared with its SHA-1 thumbprint only
}

// NewHosts returns a Hosts that knows no hosts.
func NewHosts() *Hosts { return &Hosts{known: make(map[string]hostState)} }

// variant returns the form of the handshake that works with a host. ok is false if no disk was
// opened there yet.
func (h *Hosts) variant(host string) (variant string, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	s, ok := h.known[host]
	return s.variant, ok
}

// The method record records that a disk was opened on a host. The result says whether this is the
// first disk there, or whether the host was reached in another way before.
func (h *Hosts) record(host string, s hostState) (news bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	old, ok := h.known[host]
	h.known[host] = s
	return !ok || old != s
}

// Notes returns what is worth knowing about how the hosts were reached, for a report: a text for
// each host that needed another form of the handshake, or whose certificate was compared only with
// its SHA-1 thumbprint.
func (h *Hosts) Notes() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	var notes []string
	for _, host := range slices.Sorted(maps.Keys(h.known)) {
		if s := h.known[host]; s.variant != "" {
			notes = append(notes, host+": the handshake works with "+s.variant)
		}
		if h.known[host].sha1 {
			notes = append(notes, host+": the certificate was compared with a SHA-1 thumbprint only")
		}
	}
	return notes
}
