package batch

import (
	"math"
	"testing"
	"time"
)

// TestCurveIsBounded samples batches of different lengths and checks that the curve is short and
// that its rates stand for all bytes.
func TestCurveIsBounded(t *testing.T) {
	for _, c := range []struct {
		length, every time.Duration
		seconds       float64
		rates         int
	}{
		{3 * time.Second, 2 * time.Second, 10, 1},
		{45 * time.Second, 2 * time.Second, 10, 5},
		{time.Hour, 2 * time.Second, 10, 360},
		{time.Hour + 10*time.Second, 2 * time.Second, 20, 181},
		{9 * time.Hour, 2 * time.Second, 160, 203},
		{100 * time.Hour, 7 * time.Minute, 1280, 282}, // the machine was stopped in between
	} {
		var s sampler
		bytes := func(at time.Duration) int64 { return int64(at.Seconds() * 1000) }
		for at := c.every; at < c.length; at += c.every {
			s.add(at, bytes(at))
		}
		got := s.curve(c.length, bytes(c.length))
		if got.Seconds != c.seconds || len(got.Rates) != c.rates {
			t.Errorf("%v: %d intervals of %g s, want %d of %g s", c.length, len(got.Rates), got.Seconds, c.rates, c.seconds)
		}
		for i, rate := range got.Rates {
			if math.Abs(rate-1000) > 1 {
				t.Errorf("%v: rates[%d] = %g, want 1000", c.length, i, rate)
				break
			}
		}
	}
}

// TestCurveOfRepeatedWork checks that a counter that decreases gives no negative rate.
func TestCurveOfRepeatedWork(t *testing.T) {
	var s sampler
	for i, n := range []int64{100, 50, 80, 200} {
		s.add(time.Duration(i+1)*curveInterval, n)
	}
	got := s.curve(4*curveInterval, 200)
	for i, want := range []float64{10, 0, 0, 10} {
		if got.Rates[i] != want {
			t.Errorf("rates %v, want 10 0 0 10", got.Rates)
			break
		}
	}
}
