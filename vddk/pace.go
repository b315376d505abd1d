package vddk

import "sync"

// minRequest is how small a request gets on a host that can't allocate more.
const minRequest = 64 << 10

// pace is how much is asked of a host at a time: the bytes of one request and
// the requests in flight on each handle. A host that is out of memory makes
// both shrink (by half, by one), requests that succeed make them grow again, a
// little each. It is safe for concurrent use.
type pace struct {
	mu        sync.Mutex
	most      limits // and at the beginning
	now       limits
	shrunk    uint64 // how often
	successes int    // since now changed
}

type limits struct{ size, depth int }

func newPace(size, depth int) *pace {
	most := limits{size, depth}
	return &pace{most: most, now: most}
}

// next returns the limits of a request that is about to be made, and what
// denied wants to know of it.
func (p *pace) next() (l limits, asked uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now, p.shrunk
}

// denied is told that the host had no memory for a request. It says whether a
// smaller one is worth a try. Of the requests that were on the way together
// only the first counts, or one refusal of the host would shrink everything to
// the least.
func (p *pace) denied(asked uint64) (shrunk bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if asked != p.shrunk {
		return true
	}
	least := limits{min(minRequest, p.most.size), 1}
	if p.now == least {
		return false
	}
	p.now = limits{max(p.now.size/2&^511, least.size), max(p.now.depth-1, least.depth)}
	p.shrunk++
	p.successes = 0
	return true
}

// served is told that a request succeeded. After as many as show that the host
// bears it, a little more is asked for.
func (p *pace) served() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.now == p.most {
		return
	}
	if p.successes++; p.successes < 16*p.now.depth {
		return
	}
	p.successes = 0
	p.now = limits{min(p.now.size+minRequest, p.most.size), min(p.now.depth+1, p.most.depth)}
}
