package batch

import "time"

// Curve says how fast a batch has read over time. Rates[i] is the mean in bytes per second of the
// interval that begins i*Seconds after the start of the batch. The last interval may be shorter.
type Curve struct {
	Seconds float64   `json:"seconds"`
	Rates   []float64 `json:"rates"`
}

// The curve of a batch begins with intervals of curveInterval. When it has more than maxCurve
// intervals, pairs of intervals are joined. A curve therefore has a limited size, however long the
// batch takes, and at least half as many intervals.
const (
	curveInterval = 10 * time.Second
	maxCurve      = 360
)

// sampler makes a Curve from readings of a counter. The zero value is ready to use.
type sampler struct {
	interval time.Duration
	sums     []int64 // the counter at the end of each interval
	at       time.Duration
	last     int64 // the counter at the time at
}

// The method add records a reading of the counter. at is the time since the start of the batch.
// Readings between two borders of intervals give the value at a border by linear interpolation.
func (s *sampler) add(at time.Duration, n int64) {
	if s.interval == 0 {
		s.interval = curveInterval
	}
	n = max(n, s.last)
	for border := s.border(); border <= at; border = s.border() {
		share := 1.0
		if at > s.at {
			share = float64(border-s.at) / float64(at-s.at)
		}
		s.sums = append(s.sums, s.last+int64(share*float64(n-s.last)))
		if len(s.sums) > maxCurve {
			s.halve()
		}
	}
	s.at, s.last = at, n
}

// The method border returns the end of the interval that is not complete yet.
func (s *sampler) border() time.Duration { return time.Duration(len(s.sums)+1) * s.interval }

// The method halve joins pairs of intervals. An interval that is left over begins the next pair.
func (s *sampler) halve() {
	s.interval *= 2
	half := s.sums[:0]
	for i := 1; i < len(s.sums); i += 2 {
		half = append(half, s.sums[i])
	}
	s.sums = half
}

// The method curve returns the curve up to the time at, when the counter has the value n.
func (s *sampler) curve(at time.Duration, n int64) *Curve {
	all := *s
	all.sums = append([]int64(nil), s.sums...)
	all.add(at, n)
	c := &Curve{Seconds: all.interval.Seconds(), Rates: make([]float64, 0, len(all.sums)+1)}
	before := int64(0)
	for _, sum := range all.sums {
		c.Rates = append(c.Rates, float64(sum-before)/c.Seconds)
		before = sum
	}
	if rest := (at - time.Duration(len(all.sums))*all.interval).Seconds(); rest > 0 {
		c.Rates = append(c.Rates, float64(all.last-before)/rest)
	}
	return c
}

// joinCurves returns the curve of several batches together, from the time from to the time to. It
// returns nil if no batch has a curve.
func joinCurves(batches []*Report, from, to time.Time) *Curve {
	c := &Curve{Seconds: curveInterval.Seconds()}
	for to.Sub(from).Seconds() > c.Seconds*maxCurve {
		c.Seconds *= 2
	}
	bins := make([]float64, int(to.Sub(from).Seconds()/c.Seconds)+1)
	found := false
	for _, r := range batches {
		if r.Curve == nil {
			continue
		}
		found = true
		r.Curve.each(r.Started, r.Finished, func(start, end time.Time, bytes float64) {
			spread(bins, start.Sub(from).Seconds()/c.Seconds, end.Sub(from).Seconds()/c.Seconds, bytes)
		})
	}
	if !found {
		return nil
	}
	for i := range bins {
		width := min(c.Seconds, to.Sub(from).Seconds()-float64(i)*c.Seconds)
		if width > 0 {
			c.Rates = append(c.Rates, bins[i]/width)
		}
	}
	return c
}

// The method each calls the function do for each interval of a batch that ran from the time from to
// the time to. bytes is the number of bytes read in the interval.
func (c *Curve) each(from, to time.Time, do func(start, end time.Time, bytes float64)) {
	whole := to.Sub(from).Seconds()
	for i, rate := range c.Rates {
		start, end := float64(i)*c.Seconds, min(float64(i+1)*c.Seconds, whole)
		if c.Seconds <= 0 || end <= start {
			return // the report was changed by another program
		}
		do(after(from, start), after(from, end), rate*(end-start))
	}
}

func after(t time.Time, seconds float64) time.Time {
	return t.Add(time.Duration(seconds * float64(time.Second)))
}
