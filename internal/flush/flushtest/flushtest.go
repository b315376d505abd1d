// Package flushtest checks that concurrent calls of a disk's Flush share their flushes, as
// package flush implements it:
//
//	flushtest.Run(t, func(t *testing.T, flush func() error) flushtest.Disk { ... })
package flushtest

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// Disk has the methods of the tested disk that this package needs.
type Disk struct {
	Flush func(context.Context) error
	Calls func() uint64 // see flush.Group
	EIO   error         // what Flush returns, wrapped, for a flush that returned syscall.EIO
}

// Run runs all tests. The parameter open is a function that returns the disk to test. To flush its
// data, the disk must call the function flush, and must not flush a file, server or library. The
// function flush returns nil or syscall.EIO.
func Run(t *testing.T, open func(t *testing.T, flush func() error) Disk) {
	t.Run("waiting", func(t *testing.T) { testTogether(t, open, false) })
	t.Run("ended", func(t *testing.T) { testTogether(t, open, true) })
	t.Run("failed", func(t *testing.T) { testFailed(t, open) })
}

// The method await waits until n calls of Flush have begun.
func (d Disk) await(n uint64) {
	for d.Calls() < n {
		runtime.Gosched()
	}
}

// testTogether starts many calls of Flush while a first flush is running. The parameter ends says
// what it tests. If it is false, the test checks that these calls share one second flush. If it is
// true, the test ends the context of these calls during the first flush, and checks that no second
// flush begins.
func testTogether(t *testing.T, open func(*testing.T, func() error) Disk, ends bool) {
	const calls = 50
	first, going := make(chan struct{}), make(chan struct{})
	var flushes atomic.Int64
	d := open(t, func() error {
		if flushes.Add(1) == 1 {
			close(first)
			<-going
		}
		return nil
	})
	ctx, end := context.WithCancel(t.Context())
	defer end()
	var all sync.WaitGroup
	all.Go(func() {
		if err := d.Flush(t.Context()); err != nil {
			t.Error(err)
		}
	})
	<-first
	for range calls {
		all.Go(func() {
			if err := d.Flush(ctx); (err != nil) != ends || ends && !errors.Is(err, context.Canceled) {
				t.Errorf("Flush: %v", err)
			}
		})
	}
	d.await(1 + calls)
	want := int64(2)
	if ends {
		end()
		want = 1
	}
	close(going)
	all.Wait()
	if n := flushes.Load(); n != want {
		t.Errorf("%d flushes with %d calls that came during the first, want %d", n, calls, want)
	}
	if err := d.Flush(t.Context()); err != nil {
		t.Errorf("Flush after that: %v", err)
	}
}

// testFailed checks that all calls of Flush fail after one flush has failed. It makes one call that
// begins during the failed flush, and one call after it. Both must fail, because the kernel may
// report lost data only to one flush.
func testFailed(t *testing.T, open func(*testing.T, func() error) Disk) {
	first, going := make(chan struct{}), make(chan struct{})
	var flushes atomic.Int64
	d := open(t, func() error {
		if flushes.Add(1) > 1 {
			return nil
		}
		close(first)
		<-going
		return syscall.EIO
	})
	fails := func(which string) {
		if err := d.Flush(t.Context()); !errors.Is(err, d.EIO) {
			t.Errorf("%s: %v, want %v", which, err, d.EIO)
		}
	}
	var both sync.WaitGroup
	both.Go(func() { fails("the flush that failed") })
	<-first
	both.Go(func() { fails("a call during the flush") })
	d.await(2)
	close(going)
	both.Wait()
	fails("a later call")
	if n := flushes.Load(); n != 1 {
		t.Errorf("%d flushes, want 1", n)
	}
}
