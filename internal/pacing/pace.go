package pacing

import "sync"

// minRequest is how small a request gets on a host that can't allocate more.
const minRequest = 64 << 10

// Pace is how much is asked of a host at a time: the bytes of one request and
// the requests in flight on each handle. A host that is out of memory makes
// both shrink (by half, by one), requests that succeed make them grow again, a
// little each. It is safe for concurrent use.
type Pace struct {
	mu        sync.Mutex
	most      Limits // and at the beginning
	now       Limits
	shrunk    uint64 // how often
	successes int    // since now changed
}

type Limits struct{ Size, Depth int }

func NewPace(size, depth int) *Pace {
	most := Limits{size, depth}
	return &Pace{most: most, now: most}
}

// Next returns the Limits of a request that is about to be made, and what
// Denied wants to know of it.
func (p *Pace) Next() (l Limits, asked uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.now, p.shrunk
}

// Denied is told that the host had no memory for a request. It says whether a
// smaller one is worth a try. Of the requests that were on the way together
// only the first counts, or one refusal of the host would shrink everything to
// the least.
func (p *Pace) Denied(asked uint64) (shrunk bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if asked != p.shrunk {
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

// Served is told that a request succeeded. After as many as show that the host
// bears it, a little more is asked for.
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
