// Package pacing decides how much a client asks of a host at a time. [Pace] controls the
// size of requests and the number of requests in flight, by the memory that the host has
// for them. [Tuner] controls the number of connections, by the rate that they reach.
package pacing

import "sync"

// minRequest is the number of bytes that Pace does not shrink requests below.
const minRequest = 64 << 10

// Pace holds the limits of requests to one host. When the host has no memory for a request,
// the size is halved and the depth lowered by one. Requests that succeed raise both again,
// in small steps. It is safe for concurrent use.
type Pace struct {
	mu        sync.Mutex
	most      Limits // the limits at the beginning, which are never exceeded
	now       Limits
	shrunk    uint64 // how often the limits were lowered
	successes int    // successful requests since now changed
}

// Limits are the limits of requests at one time.
type Limits struct {
	Size  int // bytes of one request
	Depth int // requests in flight on one connection
}

// NewPace returns a Pace with requests of up to size bytes, of which up to depth are in
// flight on one connection.
func NewPace(size, depth int) *Pace {
	most := Limits{size, depth}
	return &Pace{most: most, now: most}
}

// Next returns the limits for a request that is about to be made, and their version, which
// is for Denied.
func (p *Pace) Next() (l Limits, version uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now, p.shrunk
}

// Denied lowers the limits because the host had no memory for a request that was made under
// the given version of the limits. It reports whether a smaller request is worth an attempt.
// A host often refuses several requests at once. Only the first of them lowers the limits,
// since the others have an outdated version.
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

// Served counts a successful request. After 16 of them for each request in flight, it raises
// the limits by one step.
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
