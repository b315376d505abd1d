// Package pacing decides how many and how large requests a client sends to a host. [Pace]
// controls the size of requests and the number of requests in flight: it lowers both when the
// host lacks memory. [Tuner] controls the number of connections: it measures whether more
// connections are faster.
package pacing

import "sync"

// minRequest is a number of bytes. Pace does not make requests smaller than that.
const minRequest = 64 << 10

// Pace holds two limits for one host: the largest size of a request, and the number of requests in
// flight on each connection. When the host has no memory for a request, the size is halved, and the
// number is lowered by one. Successful requests raise both limits again in small steps. A Pace is
// safe for concurrent use.
type Pace struct {
	mu        sync.Mutex
	most      Limits // the limits at the beginning, which are never exceeded
	now       Limits
	shrunk    uint64 // how often the limits were lowered
	successes int    // successful requests since the field now was changed
}

// Limits are the limits that a Pace sets for the next request.
type Limits struct {
	Size  int // bytes of one request
	Depth int // requests in flight on one connection
}

// NewPace returns a Pace. It allows requests of up to the given size in bytes, and up to
// the given number of requests in flight (the depth) on each connection.
func NewPace(size, depth int) *Pace {
	most := Limits{size, depth}
	return &Pace{most: most, now: most}
}

// Next returns the limits for the next request. It also returns the version of the limits: if
// the host refuses that request, the caller passes the version to Denied.
func (p *Pace) Next() (l Limits, version uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now, p.shrunk
}

// Denied lowers the limits, because the host had no memory for a request. The caller passes the
// version that Next returned for that request. The result smaller says whether the caller should
// try again with a smaller request.
//
// A host often refuses several requests at once. Only the first refusal lowers the limits, and this
// changes their version. The other refusals come with the old version and therefore change nothing.
func (p *Pace) Denied(version uint64) (smaller bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if version != p.shrunk {
		return true
	}
	least := Limits{min(minRequest, p.most.Size), 1}
	if p.now == least {
		return false
	}
	p.now = Limits{max(p.now.Size/2&^511, least.Size), max(p.now.Depth-1, least.Depth)}
	p.shrunk++
	p.successes = 0
	return true
}

// Served counts a successful request. It raises both limits by one step after 16*Depth successes,
// where Depth is the present limit of the requests in flight.
func (p *Pace) Served() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now == p.most {
		return
	}
	if p.successes++; p.successes < 16*p.now.Depth {
		return
	}
	p.successes = 0
	p.now = Limits{min(p.now.Size+minRequest, p.most.Size), min(p.now.Depth+1, p.most.Depth)}
}
