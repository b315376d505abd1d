package pacing

import "time"

const (
	// The rate is measured over a window of at least minWindow and minRequests requests, or
	// of maxWindow with any number of requests.
	minWindow   = 200 * time.Millisecond
	maxWindow   = time.Second
	minRequests = 32
	// settle is the time after each change that is not measured, because a new connection has
	// fewer requests in flight at first.
	settle = 50 * time.Millisecond
	// gain is the factor by which the rate must rise for one more connection to be kept.
	gain = 1.1
	// The load of the host and of the network may change. Therefore one more connection is
	// tried after firstProbe, and after each failure the time to the next try is doubled, up
	// to lastProbe.
	firstProbe = 5 * time.Second
	lastProbe  = 5 * time.Minute
)

// Tuner finds the smallest number of connections that reaches the highest rate. It adds one
// connection after the other as long as each raises the rate by a tenth, and removes the last
// one if that did not. The caller reports the bytes that were read, and opens and closes
// connections as Add says. A Tuner reads no clock: all times are passed in, counted from any
// fixed point. It is not safe for concurrent use.
//
// Only time in which all connections have enough requests is measured. If the disk waits for
// the reader of its data, the number of connections does not change.
type Tuner struct {
	most int // the largest number of connections
	want int // the number of connections that there should be

	// These fields describe the window that is being measured.
	from     time.Duration // nothing before this time is measured
	last     time.Duration // time of the last call of Add
	loaded   time.Duration // measured time
	bytes    int64         // bytes read in the measured time
	requests int           // requests in the measured time

	// These fields have the results of earlier windows.
	state  tunerState
	rates  []float64     // the last rate, in bytes per second, by the number of connections
	probe  time.Duration // measured time until another number of connections is tried
	atRest time.Duration // measured time since the last try
	worse  int           // windows in a row that were slower than usual
}

type tunerState uint8

const (
	measuring tunerState = iota // the rate of the first connection is being measured
	growing                     // a connection was added, and the new rate is being measured
	resting                     // the number of connections stays until the rate drops or probe is over
	shrinking                   // a connection was removed, and the new rate is being measured
)

// NewTuner returns a Tuner for at most most connections. It expects one connection at first.
func NewTuner(most int) *Tuner {
	return &Tuner{most: most, want: 1, rates: make([]float64, most+1), probe: firstProbe}
}

// Add counts a request that read n bytes and ended now. have is the number of open
// connections; loaded means that all of them had enough requests since the last call. Add
// returns the number of connections that there should be.
func (t *Tuner) Add(now time.Duration, n int64, have int, loaded bool) (want int) {
	since := now - max(t.last, t.from)
	t.last = now
	if have != t.want {
		t.restart(now) // a connection is being opened or closed
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
	t.from = now // no time to settle is needed unless the number changes
	t.judge(rate)
	if t.want != have {
		t.restart(now)
	}
	return t.want
}

func (t *Tuner) restart(now time.Duration) {
	t.from, t.loaded, t.bytes, t.requests = now+settle, 0, 0, 0
}

// Failed records that no connection beyond the have open ones can be opened. The Tuner asks
// for no more from then on.
func (t *Tuner) Failed(have int) {
	t.most = max(have, 1)
	t.want = min(t.want, t.most)
	t.rest(t.probe)
}

// Settled returns the number of connections without the one that is being tried.
func (t *Tuner) Settled() int {
	switch t.state {
	case growing:
		return t.want - 1
	case shrinking:
		return t.want + 1
	}
	return t.want
}

// Denied records that there is no room for more than have connections at this time.
func (t *Tuner) Denied(have int) {
	t.want = max(have, 1)
	t.rest(t.probe)
}

// judge decides on the number of connections, after a window in which rate bytes per second were
// read.
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
			t.want++ // the removed connection is needed
			t.rest(min(t.probe*2, lastProbe))
			return
		}
		t.probe = firstProbe
		t.shrink()
	case resting:
		// The usual rate is a moving average that changes slowly, so that a drop of the
		// rate is recognized.
		t.rates[t.want] = before + (rate-before)/8
		if rate*gain < before {
			t.worse++
		} else {
			t.worse = 0
		}
		if t.worse >= 3 { // the host may have become busy, and be faster with fewer connections
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
