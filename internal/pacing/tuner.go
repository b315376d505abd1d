package pacing

import "time"

const (
	// A window is long enough for the rate to mean something: so long, and so
	// many requests; or as long as maxWindow, with however many.
	minWindow   = 200 * time.Millisecond
	maxWindow   = time.Second
	minRequests = 32
	// settle is left out after each change: connections fill up.
	settle = 50 * time.Millisecond
	// gain is by what factor the rate must rise for one more connection to
	// stay.
	gain = 1.1
	// A change of the host's or of the network's load is looked for after
	// firstProbe, then after twice as long each time in vain, and at the
	// latest after lastProbe.
	firstProbe = 5 * time.Second
	lastProbe  = 5 * time.Minute
)

// Tuner finds the fewest connections that are fastest: it asks for one more
// while that raises the rate by a tenth, and takes it away again when it does
// not. It is told of the bytes that were read and says how many connections
// there should be; it has no clock and no lock of its own.
//
// Time in which the disk is not what is waited for says nothing of it, and is
// left out: with a slow sink nothing changes.
type Tuner struct {
	most int
	want int // connections

	// The window.
	from     time.Duration // what is before it does not count
	last     time.Duration // of the last call
	loaded   time.Duration // of it, with requests waiting
	bytes    int64         // read in that time
	requests int

	// What has been found out.
	state  tunerState
	rates  []float64 // bytes/s by connections, the last that was measured
	probe  time.Duration
	atRest time.Duration // loaded time since the last probe
	worse  int           // windows in a row that were slower
}

type tunerState uint8

const (
	measuring tunerState = iota // with the first connection
	growing                     // one was added, and is to prove itself
	resting                     // nothing to do until something changes
	shrinking                   // one was taken away: is it as fast without?
)

func NewTuner(most int) *Tuner {
	return &Tuner{most: most, want: 1, rates: make([]float64, most+1), probe: firstProbe}
}

// Add tells of n bytes more that were read until now, with have connections
// open and whether since the last call each of them had requests enough. It
// returns how many there should be.
func (t *Tuner) Add(now time.Duration, n int64, have int, loaded bool) (want int) {
	since := now - max(t.last, t.from)
	t.last = now
	if have != t.want {
		t.restart(now) // it is being opened or closed
		return t.want
	}
	if since < 0 || !loaded {
		return t.want
	}
	t.loaded += since
	t.bytes += n
	t.requests++
	if t.loaded < minWindow || t.requests < minRequests && t.loaded < maxWindow {
		return t.want
	}
	rate := float64(t.bytes) / t.loaded.Seconds()
	t.atRest += t.loaded
	t.restart(now)
	t.from = now // nothing changed
	t.judge(rate)
	if t.want != have {
		t.restart(now)
	}
	return t.want
}

func (t *Tuner) restart(now time.Duration) {
	t.from, t.loaded, t.bytes, t.requests = now+settle, 0, 0, 0
}

// Failed is told that a connection more could not be had. It is done without.
func (t *Tuner) Failed(have int) {
	t.most = max(have, 1)
	t.want = min(t.want, t.most)
	t.rest(t.probe)
}

// Settled is how many connections have proved to be worth it.
func (t *Tuner) Settled() int {
	switch t.state {
	case growing:
		return t.want - 1
	case shrinking:
		return t.want + 1
	}
	return t.want
}

// Denied is told that there is no room for a connection more at this time.
func (t *Tuner) Denied(have int) {
	t.want = max(have, 1)
	t.rest(t.probe)
}

// judge is told of the rate with the connections that are wanted.
func (t *Tuner) judge(rate float64) {
	before := t.rates[t.want]
	t.rates[t.want] = rate
	switch t.state {
	case measuring:
		t.grow()
	case growing:
		if rate < t.rates[t.want-1]*gain {
			t.want--
			t.rest(min(t.probe*2, lastProbe))
			return
		}
		t.probe = firstProbe
		t.grow()
	case shrinking:
		if rate*gain <= t.rates[t.want+1] {
			t.want++ // it was worth it
			t.rest(min(t.probe*2, lastProbe))
			return
		}
		t.probe = firstProbe
		t.shrink()
	case resting:
		// The rate at rest is kept as a slow mean, so that a drop shows
		// against what was usual.
		t.rates[t.want] = before + (rate-before)/8
		if rate*gain < before {
			t.worse++
		} else {
			t.worse = 0
		}
		if t.worse >= 3 { // a busier host may do better with fewer
			t.rates[t.want] = rate
			t.shrink()
		} else if t.atRest >= t.probe {
			t.grow()
		}
	}
}

func (t *Tuner) grow() {
	if t.want == t.most {
		t.rest(t.probe)
		return
	}
	t.state = growing
	t.want++
}

func (t *Tuner) shrink() {
	if t.want == 1 {
		t.rest(t.probe)
		return
	}
	t.state = shrinking
	t.want--
	t.worse = 0
}

func (t *Tuner) rest(probe time.Duration) {
	t.state, t.probe, t.atRest, t.worse = resting, probe, 0, 0
}
