package vddk

import (
	"testing"
)

// TestRetireBesideWaiting checks that a retiring connection is closed even if another request waits
// for it when its last request ends. The waiting request uses another connection.
func TestRetireBesideWaiting(t *testing.T) {
	const size = 1 << 20
	host, _ := newFakeHost(t, size)
	begun := make(chan *fakeWorker)
	ends := []chan struct{}{make(chan struct{}), make(chan struct{})}
	host.onRead = func(k int, w *fakeWorker, _ uint64, _ int) error {
		if k <= 2 {
			begun <- w
			<-ends[w.number-1]
		}
		return nil
	}
	d := host.mustOpen(Params{}, Options{Depth: 1})
	if !d.pool.growth.add(func() {}, nil) {
		t.Fatal("no second connection")
	}
	read := make(chan error, 4)
	for range 2 {
		go func() {
			_, err := d.ReadAt(make([]byte, sectorSize), 0)
			read <- err
		}()
		<-begun
	}
	for range 2 {
		go func() {
			_, err := d.ReadAt(make([]byte, sectorSize), 0)
			read <- err
		}()
	}
	d.pool.mu.Lock()
	first, second := d.pool.handles[0], d.pool.handles[1]
	for first.waiting+second.waiting < 2 {
		d.pool.mu.Unlock()
		d.pool.mu.Lock()
	}
	second.retiring = true // as the tuner does
	d.pool.mu.Unlock()

	close(ends[1])
	if err := <-read; err != nil {
		t.Error(err)
	}
	close(ends[0])
	for range 3 {
		if err := <-read; err != nil {
			t.Error(err)
		}
	}
	d.pool.mu.Lock()
	defer d.pool.mu.Unlock()
	if len(d.pool.handles) != 1 || d.pool.handles[0] != first {
		t.Errorf("%d connections are left, want the one that does not retire", len(d.pool.handles))
	}
}
