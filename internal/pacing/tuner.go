package pacing

import (
	"fmt"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
)

const (
	// The Tuner measures how many bytes per second are read (the rate), each time over a window of
	// time. A window has at least minRequests requests and lasts at least minWindow. If there are
	// fewer requests, the window ends after maxWindow.
	minWindow   = 200 * time.Millisecond
	maxWindow   = time.Second
	minRequests = 32
	// The constant settle is a waiting time after a change of the number of
	// connections. During this time nothing is measured, because a new connection has
	// too few requests in flight at first.
	settle = 50 * time.Millisecond
	// The constant gain is the factor by which one more connection must raise the
	// rate. A connection that raises the rate by less is closed again.
	gain = 1.1
	// The load of the host and of the network may change. Therefore the Tuner tries one more
	// connection from time to time, at first after 5 seconds (firstProbe). Each try without success
	// doubles the time until the next try, up to 5 minutes (lastProbe).
	firstProbe = 5 * time.Second
	lastProbe  = 5 * time.Minute
)

// Tuner finds the smallest number of connections that reaches the highest rate, in bytes per
// second. It adds one connection after the other, as long as each one raises the rate by a tenth.
// If the connection that was added last did not raise the rate enough, the Tuner removes that
// connection again.
//
// The caller calls Add for each request, and opens or closes connections until it has as many as
// Add returns. The Tuner has no clock: all times are passed to it, and are durations since any
// fixed point in time. It is not safe for concurrent use.
//
// The Tuner only measures while there are enough requests to keep all connections busy. If the
// reader of the data is slower than the disk, there are too few requests, and the number of
// connections does not change.
type Tuner struct {
	most int // the largest number of connections
	want int // the number of connections that there should be

	// These fields describe the window of time that is being measured.
	from     time.Duration // nothing before this time is measured
	last     time.Duration // time of the last call of Add
	loaded   time.Duration // measured time
	bytes    int64         // bytes read in the measured time
	requests int           // requests in the measured time

	// These fields contain the results of the windows that have been measured before.
	state  tunerState
	rates  []float64     // the last rate, in bytes per second, by the number of connections
	probe  time.Duration // measured time until another number of connections is tried
	atRest time.Duration // measured time since the last try
	worse  int           // windows in a row that were slower than usual

	change string // see Change
}

type tunerState uint8

const (
	measuring tunerState = iota // the rate of the first connection is being measured
	growing                     // a connection was added, and the new rate is being measured
	resting                     // the number of connections stays until the rate drops or probe is over
	shrinking                   // a connection was removed, and the new rate is being measured
)

// NewTuner returns a Tuner that asks for at most the given number of connections. It begins
// with one open connection.
func NewTuner(limit int) *Tuner {
	return &Tuner{most: limit, want: 1, rates: make([]float64, limit+1), probe: firstProbe}
}

// Add counts a request that has read n bytes and has ended now. open is the number of open
// connections. loaded says whether there have been enough requests to keep all of them busy since
// the previous call of Add. The result is the number of connections that the caller should have
// open.
func (t *Tuner) Add(now time.Duration, n int64, open int, loaded bool) (want int) {
	since := now - max(t.last, t.from)
	t.last = now
	if open != t.want {
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
	if t.want != open {
		t.restart(now)
	}
	return t.want
}

// Change returns a text about the last change of the result of Add: from which number to which, and
// why. A second call returns "", and so does a call if the result has not changed.
func (t *Tuner) Change() string {
	text := t.change
	t.change = ""
	return text
}

func (t *Tuner) restart(now time.Duration) {
	t.from, t.loaded, t.bytes, t.requests = now+settle, 0, 0, 0
}

// Failed tells the Tuner that one more connection could not be opened. open is the number of
// open connections. From then on the Tuner never asks for more than this number.
func (t *Tuner) Failed(open int) {
	t.most = max(open, 1)
	t.want = min(t.want, t.most)
	t.rest(t.probe)
}

// Settled returns the number of connections that the Tuner has decided on. If the Tuner is just
// trying one connection more or one fewer, this is the number before the try.
func (t *Tuner) Settled() int {
	switch t.state {
	case growing:
		return t.want - 1
	case shrinking:
		return t.want + 1
	}
	return t.want
}

// Denied tells the Tuner that the host has no memory for another connection at present.
// open is the number of open connections. The Tuner will ask for more connections later.
func (t *Tuner) Denied(open int) {
	t.want = max(open, 1)
	t.rest(t.probe)
}

// The method judge decides on the number of connections at the end of a window. rate is the rate in
// the window, in bytes per second.
func (t *Tuner) judge(rate float64) {
	before := t.rates[t.want]
	t.rates[t.want] = rate
	switch t.state {
	case measuring:
		t.grow(fmt.Sprintf("the rate with %s is %s, one more is tried", connections(t.want), perSecond(rate)))
	case growing:
		fewer := t.rates[t.want-1]
		if rate < fewer*gain {
			t.to(t.want-1, fmt.Sprintf("the rate was %s with %s, and is %s with %d: one more does not raise it by a tenth", perSecond(fewer), connections(t.want-1), perSecond(rate), t.want))
			t.rest(min(t.probe*2, lastProbe))
			return
		}
		t.probe = firstProbe
		t.grow(fmt.Sprintf("the rate was %s with %s, and is %s with %d: one more is tried", perSecond(fewer), connections(t.want-1), perSecond(rate), t.want))
	case shrinking:
		more := t.rates[t.want+1]
		if rate*gain <= more { // the removed connection is needed
			t.to(t.want+1, fmt.Sprintf("the rate was %s with %s, and is only %s with %d", perSecond(more), connections(t.want+1), perSecond(rate), t.want))
			t.rest(min(t.probe*2, lastProbe))
			return
		}
		t.probe = firstProbe
		t.shrink(fmt.Sprintf("the rate was %s with %s, and is %s with %d: one fewer is tried", perSecond(more), connections(t.want+1), perSecond(rate), t.want))
	case resting:
		// The usual rate is a moving average, which changes slowly. If the measured rate
		// drops suddenly, the average is still close to its old value. Therefore the
		// measured rate is lower than the average, and the drop is noticed.
		t.rates[t.want] = before + (rate-before)/8
		if rate*gain < before {
			t.worse++
		} else {
			t.worse = 0
		}
		if t.worse >= 3 { // the host may have become busy, and be faster with fewer connections
			t.rates[t.want] = rate
			t.shrink(fmt.Sprintf("the rate with %s was %s, and has fallen to %s: one fewer is tried", connections(t.want), perSecond(before), perSecond(rate)))
		} else if t.atRest >= t.probe {
			t.grow(fmt.Sprintf("the rate with %s is %s, one more is tried again", connections(t.want), perSecond(rate)))
		}
	}
}

func (t *Tuner) grow(why string) {
	if t.want == t.most {
		t.rest(t.probe)
		return
	}
	t.state = growing
	t.to(t.want+1, why)
}

func (t *Tuner) shrink(why string) {
	if t.want == 1 {
		t.rest(t.probe)
		return
	}
	t.state = shrinking
	t.to(t.want-1, why)
	t.worse = 0
}

// The method to changes the number of connections to n, for the given reason.
func (t *Tuner) to(n int, why string) {
	t.change = fmt.Sprintf("%s instead of %d: %s", connections(n), t.want, why)
	t.want = n
}

func connections(n int) string {
	if n == 1 {
		return "1 connection"
	}
	return fmt.Sprintf("%d connections", n)
}

func perSecond(rate float64) string { return bytesize.Format(int64(rate)) + "/s" }

func (t *Tuner) rest(probe time.Duration) {
	t.state, t.probe, t.atRest, t.worse = resting, probe, 0, 0
}
