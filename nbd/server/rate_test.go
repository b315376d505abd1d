package server

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func unlimited() bool { return false }

// TestRateLimit checks how long requests wait. The clock is that of package synctest.
func TestRateLimit(t *testing.T) {
	for _, c := range []struct {
		name      string
		perSecond int64
		requests  []int64 // one after the other
		seconds   float64
	}{
		{"less than the burst", 1 << 20, []int64{4096, 4096}, 0},
		{"ten seconds", 1 << 20, []int64{4 << 20, 6 << 20, 100 << 10}, 10},
		{"many small requests", 4096, []int64{4096, 4096, 4096, 409}, 3},
		{"one byte per second", 1, []int64{1, 4}, 4},
		{"a long request", 64 << 20, []int64{4<<30 - 1 + 7<<20}, 64},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				l, p, begun := newRateLimit(c.perSecond), new(peer), time.Now()
				for _, n := range c.requests {
					if err := l.wait(t.Context(), nil, p, n, unlimited); err != nil {
						t.Fatal(err)
					}
				}
				if took := time.Since(begun).Seconds(); took < c.seconds-0.11 || took > c.seconds+0.11 {
					t.Errorf("the requests took %g s, want %g s", took, c.seconds)
				}
				l.mu.Lock() // the timer is no goroutine of this test
				defer l.mu.Unlock()
				if len(l.queue) != 0 || len(l.waiting) != 0 {
					t.Errorf("%d peers still wait", len(l.queue))
				}
			})
		})
	}
}

// TestRateLimitBurst checks that bytes are saved up for a tenth of a second at most.
func TestRateLimitBurst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l, p := newRateLimit(1000), new(peer)
		time.Sleep(time.Hour)
		begun := time.Now()
		if err := l.wait(t.Context(), nil, p, 1100, unlimited); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun).Seconds(); took < 0.99 || took > 1.01 {
			t.Errorf("1100 bytes took %g s, want 1 s", took)
		}
	})
}

// TestRateLimitIsFair checks that two peers get the same rate although one of them has more
// connections and longer requests, and that a third one that wants little does not wait for long.
func TestRateLimitIsFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const perSecond = 10 << 20
		l := newRateLimit(perSecond)
		greedy, modest, little := new(peer), new(peer), new(peer)
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		got := map[*peer]int64{}
		var mu sync.Mutex
		var all sync.WaitGroup
		client := func(p *peer, n int64) {
			all.Go(func() {
				for l.wait(ctx, nil, p, n, unlimited) == nil {
					mu.Lock()
					got[p] += n
					mu.Unlock()
				}
			})
		}
		for range 8 {
			client(greedy, 2<<20)
		}
		client(modest, 64<<10)
		time.Sleep(10 * time.Second)
		begun := time.Now()
		if err := l.wait(ctx, nil, little, 4096, unlimited); err != nil {
			t.Fatal(err)
		}
		if waited := time.Since(begun); waited > 100*time.Millisecond {
			t.Errorf("a short request waited %v", waited)
		}
		time.Sleep(90 * time.Second)
		cancel()
		all.Wait()
		if sum := got[greedy] + got[modest]; sum < 98*perSecond || sum > 101*perSecond {
			t.Errorf("%d bytes in 100 s, want %d", sum, 100*perSecond)
		}
		if d := got[greedy] - got[modest]; d > 20<<20 || d < -20<<20 {
			t.Errorf("the peers got %d and %d bytes", got[greedy], got[modest])
		}
	})
}

// TestRateLimitEnds checks that a request stops waiting when its connection or the server ends, and
// that the others then get its share.
func TestRateLimitEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newRateLimit(1000)
		gone, p := new(peer), new(peer)
		ctx, cancel := context.WithCancelCause(t.Context())
		stopping := make(chan struct{})
		ended, stopped, waited := make(chan error), make(chan error), 0
		go func() { ended <- l.wait(ctx, nil, gone, 1<<40, func() bool { waited++; return false }) }()
		go func() { stopped <- l.wait(t.Context(), stopping, new(peer), 1<<40, unlimited) }()
		synctest.Wait()
		why := errors.New("the connection has ended")
		cancel(why)
		close(stopping)
		if err := <-ended; err != why || waited != 1 {
			t.Errorf("error %v after %d calls, want %v", err, waited, why)
		}
		if err := <-stopped; err != ErrShutdown {
			t.Errorf("error %v, want ErrShutdown", err)
		}
		left := 0
		if err := l.wait(t.Context(), nil, p, 1<<40, func() bool { left++; return left == 3 }); err != errGone {
			t.Errorf("error %v after the client has left, want errGone", err)
		}
		begun := time.Now()
		if err := l.wait(t.Context(), nil, p, 5000, unlimited); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun).Seconds(); took > 5.01 {
			t.Errorf("5000 bytes took %g s, although no other request waits", took)
		}
		l.mu.Lock() // the timer is no goroutine of this test
		defer l.mu.Unlock()
		if len(l.queue) != 0 || len(l.waiting) != 0 {
			t.Errorf("%d peers still wait", len(l.queue))
		}
	})
}
