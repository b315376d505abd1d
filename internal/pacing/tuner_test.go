package pacing

import (
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// world simulates the host and the reader that a Tuner works with.
type world struct {
	rate    func(n int, now time.Duration) float64 // bytes/s that n connections reach
	loaded  func(now time.Duration) bool           // whether all connections have enough requests; nil: always
	opening time.Duration                          // the time that opening a connection takes
	most    int                                    // connections that can be opened; 0: no limit
	noise   float64                                // by which share the time of a request varies
}

// run simulates the given length of time. It returns the bytes that were read, the time by
// number of connections, and how often their number changed.
func (w *world) run(t *Tuner, length time.Duration, seed uint64) (read float64, times map[int]time.Duration, changes int) {
	r := rand.New(rand.NewPCG(seed, 1))
	const request = 1 << 20
	times = map[int]time.Duration{}
	have, pending, ready := 1, 0, time.Duration(0)
	for now := time.Duration(0); now < length; {
		rate := w.rate(have, now)
		took := time.Duration(request / rate * (1 + w.noise*(2*r.Float64()-1)) * float64(time.Second))
		loaded := w.loaded == nil || w.loaded(now)
		if !loaded {
			took = 20 * time.Millisecond // a slow reader
		}
		now += took
		times[have] += took
		read += request
		want := t.Add(now, request, have, loaded)
		switch {
		case pending != 0 && now >= ready:
			if w.most > 0 && pending > w.most {
				t.Failed(have)
			} else {
				have = pending
				changes++
			}
			pending = 0
		case pending != 0:
		case want > have:
			pending, ready = have+1, now+w.opening
		case want < have:
			have--
			changes++
		}
	}
	return read, times, changes
}

func TestTuner(t *testing.T) {
	const mb = 1e6
	linear := func(n int, _ time.Duration) float64 { return 200 * mb * float64(n) }
	flat := func(n int, _ time.Duration) float64 { return 400 * mb }
	for _, test := range []struct {
		name  string
		w     world
		best  int     // connections at the end
		share float64 // of the bytes that the best number would have read in 10 s
		most  int     // changes in a minute
	}{
		{"each adds", world{rate: linear}, 4, 0.93, 10},
		{"each adds, noisy", world{rate: linear, noise: 0.5}, 4, 0.93, 14},
		{"each adds, slow to open", world{rate: linear, opening: 500 * time.Millisecond}, 4, 0.80, 10},
		{"the network is full with one", world{rate: flat}, 1, 0.98, 30},
		{"a lock makes more slower", world{rate: func(n int, _ time.Duration) float64 { return 400 * mb / (0.5 + 0.5*float64(n)) }}, 1, 0.95, 30},
		{"two are best, four slower", world{rate: func(n int, _ time.Duration) float64 { return []float64{0, 200 * mb, 400 * mb, 300 * mb, 200 * mb}[n] }}, 2, 0.93, 30},
		{"three are best", world{rate: func(n int, _ time.Duration) float64 { return []float64{0, 200 * mb, 380 * mb, 500 * mb, 510 * mb}[n] }, noise: 0.3}, 3, 0.92, 30},
		{"no more than two can be opened", world{rate: linear, most: 2}, 2, 0.95, 3},
		{"slow requests", world{rate: func(n int, _ time.Duration) float64 { return 5 * mb * float64(n) }}, 4, 0.5, 10},
	} {
		t.Run(test.name, func(t *testing.T) {
			for seed := range uint64(20) {
				read, _, _ := test.w.run(NewTuner(4), 10*time.Second, seed)
				if best := test.w.rate(test.best, 0) * 10; read < test.share*best {
					t.Errorf("seed %d: read %.0f MB in 10 s, %d connections read %.0f", seed, read/mb, test.best, best/mb)
				}
				tu := NewTuner(4)
				_, times, changes := test.w.run(tu, time.Minute, seed)
				if share := times[test.best].Seconds() / 60; share < 0.8 || changes > test.most {
					t.Errorf("seed %d: %d connections %.0f%% of the time, want most of it (%v), %d changes", seed, test.best, share*100, times, changes)
				}
			}
		})
	}
}

// If the reader is slower than the disk, the number of connections does not change.
func TestTunerSlowSink(t *testing.T) {
	w := world{rate: func(n int, _ time.Duration) float64 { return 200e6 * float64(n) }, loaded: func(time.Duration) bool { return false }}
	if _, times, changes := w.run(NewTuner(4), time.Minute, 1); changes != 0 {
		t.Errorf("%d changes, %v", changes, times)
	}
	// A reader that becomes slow after five seconds does not change the number again.
	w.loaded = func(now time.Duration) bool { return now < 5*time.Second }
	if _, times, changes := w.run(NewTuner(4), time.Minute, 1); changes != 3 {
		t.Errorf("%d changes, %v", changes, times)
	}
	// A reader that reads in bursts of 30 ms: the rate of the bursts is measured.
	w.loaded = func(now time.Duration) bool { return now%(100*time.Millisecond) < 30*time.Millisecond }
	w.rate = func(n int, _ time.Duration) float64 { return 400e6 }
	if _, times, _ := w.run(NewTuner(4), time.Minute, 1); times[1] < 50*time.Second {
		t.Errorf("%v", times)
	}
}

// The number of connections falls when the host becomes busy, and rises when it is idle
// again.
func TestTunerFollows(t *testing.T) {
	busy := func(now time.Duration) bool { return now > 60*time.Second && now < 180*time.Second }
	w := world{noise: 0.2, rate: func(n int, now time.Duration) float64 {
		if busy(now) {
			return []float64{0, 200e6, 150e6, 100e6, 80e6}[n]
		}
		return 200e6 * float64(n)
	}}
	for seed := range uint64(10) {
		tu := NewTuner(4)
		w.run(tu, 60*time.Second, seed)
		if tu.want != 4 {
			t.Errorf("seed %d: %d before", seed, tu.want)
		}
		tu = NewTuner(4)
		w.run(tu, 170*time.Second, seed)
		if tu.want > 2 {
			t.Errorf("seed %d: %d while the host is busy", seed, tu.want)
		}
		tu = NewTuner(4)
		w.run(tu, 500*time.Second, seed)
		if tu.want < 3 {
			t.Errorf("seed %d: %d after", seed, tu.want)
		}
	}
}

// Each change of the number of connections has one text, which names both numbers and rates.
func TestTunerChange(t *testing.T) {
	tu := NewTuner(4)
	var got []string
	have, now := 1, time.Duration(0)
	for now < 4*time.Second {
		rate := []float64{0, 100 << 20, 200 << 20, 210 << 20}[have]
		now += time.Duration(1 << 20 / rate * float64(time.Second))
		want := tu.Add(now, 1<<20, have, true)
		if text := tu.Change(); text != "" {
			got = append(got, text)
		} else if want != have {
			t.Errorf("%d connections are wanted instead of %d, and there is no text", want, have)
		}
		have = want
	}
	want := []string{
		"2 connections instead of 1: the rate with 1 connection is 100.0 MiB/s, one more is tried",
		"3 connections instead of 2: the rate was 100.0 MiB/s with 1 connection, and is 205.0 MiB/s with 2: one more is tried",
		"2 connections instead of 3: the rate was 205.0 MiB/s with 2 connections, and is 212.5 MiB/s with 3: one more does not raise it by a tenth",
	}
	if !slices.Equal(got, want) {
		t.Errorf("texts %q, want %q", got, want)
	}
}
