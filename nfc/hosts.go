package nfc

import "sync"

// Hosts remembers how the hosts of one command were reached. It is safe for concurrent use.
type Hosts struct {
	mu     sync.Mutex
	quirks map[string]string // by the name of the host: the quirks with which its handshake works
}

// NewHosts returns a Hosts that knows no hosts.
func NewHosts() *Hosts { return &Hosts{quirks: make(map[string]string)} }
