package server

import (
	"context"
	"errors"
	"testing"
	"testing/synctest"
	"time"
)

func TestMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pressure := 0
		m := newMemory(8<<20, func() { pressure++ })
		one, other := new(peer), new(peer)
		hog, second, third, stranger := &holder{peer: one}, &holder{peer: one}, &holder{peer: one}, &holder{peer: other}
		take := func(h *holder, n int) *buffer {
			t.Helper()
			b := m.tryAcquire(h, n)
			if b == nil || len(b.b) != n || b.reserve {
				t.Fatalf("%d bytes of %d used: %v", n, m.used, b)
			}
			return b
		}
		var hogs []*buffer
		for range 4 {
			hogs = append(hogs, take(hog, 1<<20))
		}
		if m.tryAcquire(hog, 1) != nil {
			t.Error("one has more than half")
		}
		first := take(second, 1<<20)
		if m.tryAcquire(second, 1) != nil {
			t.Error("another has more than its first piece while half is used")
		}
		// One peer can hold three quarters of the memory.
		last := take(third, 1<<20)
		if m.tryAcquire(&holder{peer: one}, 1) != nil {
			t.Error("a peer has more than three quarters")
		}
		m.release(take(stranger, 1<<20))
		m.release(last)
		wait := func(h *holder, n int, got chan<- *buffer) {
			b, err := m.acquire(t.Context(), h, n)
			if err != nil {
				t.Error(err)
			}
			got <- b
		}
		more, next := make(chan *buffer, 1), make(chan *buffer, 1)
		go wait(hog, 1<<20, more)
		synctest.Wait()
		go wait(second, 4096, next)
		synctest.Wait()
		// Only a connection without memory may overtake those that wait.
		m.release(hogs[0])
		synctest.Wait()
		if len(more) != 0 || len(next) != 0 {
			t.Fatalf("%d bytes used, and more was given", m.used)
		}
		m.release(take(third, 4096))
		m.release(first)
		synctest.Wait()
		if len(next) != 1 || len(more) != 1 {
			t.Errorf("after room was made: %d, %d", len(more), len(next))
		}
		// A connection that stops waiting must release everything.
		m.release(<-more)
		m.release(<-next)
		hogs = append(hogs[1:], take(hog, 1<<20))
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("gone")
		ended := make(chan error, 1)
		go func() {
			_, err := m.acquire(ctx, hog, 1<<20)
			ended <- err
		}()
		synctest.Wait()
		cancel(gone)
		if err := <-ended; err != gone {
			t.Errorf("%v, want its cause", err)
		}
		if pressure != 0 {
			t.Errorf("%d times under pressure, and nobody waited long", pressure)
		}

		// A connection that has waited for patience gets its reserve. The next time it
		// gets the reserve at once.
		start := time.Now()
		b, err := m.acquire(t.Context(), hog, 1<<20)
		if err != nil || !b.reserve || len(b.b) != reserve || time.Since(start) != patience || pressure != 1 {
			t.Fatalf("%v, %v after %v, %d times under pressure", b, err, time.Since(start), pressure)
		}
		// While other connections release memory, a connection waits longer, up to
		// maxTries times patience.
		first = take(second, 1<<20)
		start = time.Now()
		go wait(second, 1<<20, next)
		for range 19 {
			time.Sleep(100 * time.Millisecond)
			m.release(take(stranger, 4096))
		}
		synctest.Wait()
		if len(next) != 0 {
			t.Error("it works with its reserve although memory is given back")
		}
		got := <-next
		if !got.reserve || time.Since(start) != maxTries*patience {
			t.Errorf("%v after %v", got, time.Since(start))
		}
		m.release(got)
		m.release(first)
		go wait(hog, 100, more)
		time.Sleep(time.Hour)
		if len(more) != 0 {
			t.Error("a reserve is used twice")
		}
		m.release(b)
		if b = <-more; !b.reserve || len(b.b) != 100 {
			t.Errorf("%v", b)
		}
		m.release(b)
		start = time.Now()
		if b, err = m.acquire(t.Context(), hog, 1<<20); err != nil || !b.reserve || time.Since(start) != 0 {
			t.Errorf("%v, %v after %v", b, err, time.Since(start))
		}
		m.release(b)
		for _, b := range hogs {
			m.release(b)
		}
		if b, err = m.acquire(t.Context(), hog, 1<<20); err != nil || b.reserve || len(b.b) != 1<<20 {
			t.Errorf("after room was made: %v, %v", b, err)
		}
		m.release(b)
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.used != 0 || one.held != 0 || other.held != 0 || hog.held != 0 || hog.reserved || len(m.waiting) != 0 {
			t.Errorf("%d used, %d, %d, %d held, %d waiting", m.used, one.held, other.held, hog.held, len(m.waiting))
		}
	})
}

func TestClass(t *testing.T) {
	for n, want := range map[int]int{0: 0, 1: 0, 4096: 0, 4097: 1, 8192: 1, 1<<20 - 1: 8, 1 << 20: 8} {
		if got := class(n); got != want || minPiece<<got < n {
			t.Errorf("class(%d) is %d, want %d", n, got, want)
		}
	}
}
