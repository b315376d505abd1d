package server

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func TestMemory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var dropped atomic.Int64
		m := newMemory(8<<20, func(time.Duration) { dropped.Add(1) })
		var hog, second, third holder
		take := func(h *holder, n int) *buffer {
			t.Helper()
			b := m.try(h, n)
			if b == nil || len(b.b) != n {
				t.Fatalf("%d bytes of %d used: %v", n, m.used, b)
			}
			return b
		}
		var hogs []*buffer
		for range 4 {
			hogs = append(hogs, take(&hog, 1<<20))
		}
		if m.try(&hog, 1) != nil {
			t.Error("one has more than half")
		}
		first := take(&second, 1<<20)
		if m.try(&second, 1) != nil {
			t.Error("another has more than its first piece while half is used")
		}
		wait := func(h *holder, n int, got chan<- *buffer) {
			b, err := m.get(t.Context(), h, n)
			if err != nil {
				t.Error(err)
			}
			got <- b
		}
		more, next := make(chan *buffer, 1), make(chan *buffer, 1)
		go wait(&hog, 1<<20, more)
		synctest.Wait()
		go wait(&second, 4096, next)
		synctest.Wait()
		// Nobody passes those that wait, but for a first piece.
		m.put(hogs[0])
		synctest.Wait()
		if len(more) != 0 || len(next) != 0 {
			t.Fatalf("%d bytes used, and more was given", m.used)
		}
		m.put(take(&third, 4096))
		m.put(first)
		synctest.Wait()
		if len(next) != 1 || len(more) != 1 {
			t.Errorf("after room was made: %d, %d", len(more), len(next))
		}
		// Who stops waiting leaves nothing behind.
		m.put(<-more)
		m.put(<-next)
		hogs = append(hogs[1:], take(&hog, 1<<20))
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("gone")
		ended := make(chan error, 1)
		go func() {
			_, err := m.get(ctx, &hog, 1<<20)
			ended <- err
		}()
		time.Sleep(3*stall - time.Second)
		if n := dropped.Load(); n != 2 {
			t.Errorf("asked for memory %d times, want 2", n)
		}
		cancel(gone)
		if err := <-ended; err != gone {
			t.Errorf("%v, want its cause", err)
		}
		for _, b := range hogs {
			m.put(b)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		if m.used != 0 || hog.held != 0 || second.held != 0 || third.held != 0 || len(m.waiting) != 0 {
			t.Errorf("%d used, %d, %d, %d held, %d waiting", m.used, hog.held, second.held, third.held, len(m.waiting))
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
