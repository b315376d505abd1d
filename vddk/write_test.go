package vddk

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// memoryDisk is the content of a writable disk.
type memoryDisk struct {
	mu sync.Mutex
	b  []byte
}

func (m *memoryDisk) ReadAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(p, m.b[off:]), nil
}

func (m *memoryDisk) WriteAt(p []byte, off int64) (int, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return copy(m.b[off:], p), nil
}

func newWritable(t *testing.T, size int, o Options) (*fakeHost, *memoryDisk, *Disk) {
	host, content := newFakeHost(t, size)
	m := &memoryDisk{b: bytes.Clone(content)}
	host.content = m
	o.Writable = true
	if o.Retry.Backoff == nil {
		o.Retry = fastRetry(-1)
	}
	return host, m, host.mustOpen(Params{}, o)
}

// Concurrent writes of any alignment change only the bytes that they name.
func TestWrite(t *testing.T) {
	for _, o := range []Options{{}, {RequestSize: 4096, Depth: 1}} {
		host, m, d := newWritable(t, 2*mib+512, o)
		host.delay = 20 * time.Microsecond // gives other writes time between the read of a sector and its write
		want := bytes.Clone(m.b)
		var wg sync.WaitGroup
		const writers = 8
		for w := range writers {
			// Each writer writes every eighth piece of 100 bytes, so that writers share
			// sectors.
			wg.Go(func() {
				r := rand.New(rand.NewPCG(uint64(w), 1))
				for range 100 {
					piece := r.IntN(len(want)/100/writers)*writers + w
					p := want[piece*100 : piece*100+100]
					for i := range p {
						p[i] = byte(r.Int())
					}
					if _, err := d.WriteAt(p, int64(piece)*100); err != nil {
						t.Error(err)
					}
				}
			})
		}
		wg.Wait()
		if !bytes.Equal(m.b, want) {
			t.Error("small writes: the content differs")
		}
		r := rand.New(rand.NewPCG(9, 9))
		for range 50 {
			off := r.IntN(len(want))
			n := r.IntN(min(len(want)-off, 300_000))
			if r.IntN(2) == 0 {
				clear(want[off : off+n])
				if err := d.ZeroAt(t.Context(), int64(off), int64(n), source.MayTrim); err != nil {
					t.Fatal(err)
				}
				continue
			}
			for i := range want[off : off+n] {
				want[off+i] = byte(r.Int())
			}
			if k, err := d.WriteAt(want[off:off+n], int64(off)); err != nil || k != n {
				t.Fatal(k, err)
			}
		}
		if !bytes.Equal(m.b, want) {
			t.Error("large writes: the content differs")
		}
		for e, err := range d.Extents(t.Context(), 0, d.Size()) {
			if err != nil || e.Kind != source.Data {
				t.Errorf("%+v, %v: a handle that wrote is not asked", e, err)
			}
		}
		if host.queries != 0 || len(host.workers) != 1 {
			t.Errorf("%d queries, %d workers", host.queries, len(host.workers))
		}
		if err := d.ZeroAt(t.Context(), 0, 512, source.MayTrim|source.FastOnly); !errors.Is(err, errors.ErrUnsupported) {
			t.Error(err)
		}
		for _, r := range [][2]int64{{-1, 1}, {d.Size(), 1}, {0, d.Size() + 1}} {
			if err := d.ZeroAt(t.Context(), r[0], r[1], source.MayTrim); err == nil {
				t.Errorf("ZeroAt %v", r)
			}
			if err := d.Trim(t.Context(), r[0], r[1]); err == nil {
				t.Errorf("Trim %v", r)
			}
		}
		if _, err := d.WriteAt(make([]byte, 2), d.Size()-1); !errors.Is(err, syscall.ENOSPC) {
			t.Error(err)
		}
		if err := d.Flush(t.Context()); err != nil || host.flushes != 1 {
			t.Error(err, host.flushes)
		}
	}
}

func TestReadOnly(t *testing.T) {
	host, _ := newFakeHost(t, mib)
	d := host.mustOpen(Params{}, Options{})
	if _, err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, syscall.EROFS) {
		t.Error(err)
	}
	if r := host.requests[0]; !r.ReadOnly || r.Flags&worker.FlagReadOnly == 0 {
		t.Errorf("opened with %v, %#x", r.ReadOnly, r.Flags)
	}
}

func TestFlush(t *testing.T) {
	for _, test := range []struct {
		name  string
		do    func(t *testing.T, h *fakeHost, d *Disk)
		fails bool
	}{
		{"nothing was lost", func(t *testing.T, h *fakeHost, d *Disk) {
			d.WriteAt(make([]byte, 512), 0)
		}, false},
		{"all was flushed before the crash", func(t *testing.T, h *fakeHost, d *Disk) {
			d.WriteAt(make([]byte, 512), 0)
			if err := d.Flush(t.Context()); err != nil {
				t.Error(err)
			}
			loseWorker(h)
		}, false},
		{"nothing was written before the crash", func(t *testing.T, h *fakeHost, d *Disk) {
			loseWorker(h)
			d.WriteAt(make([]byte, 512), 0)
		}, false},
		{"a crash with writes not flushed", func(t *testing.T, h *fakeHost, d *Disk) {
			d.WriteAt(make([]byte, 512), 0)
			loseWorker(h)
		}, true},
		{"and a write after it", func(t *testing.T, h *fakeHost, d *Disk) {
			d.WriteAt(make([]byte, 512), 0)
			loseWorker(h)
			if _, err := d.WriteAt(make([]byte, 512), 0); err != nil {
				t.Error(err)
			}
		}, true},
		{"a crash in a write", func(t *testing.T, h *fakeHost, d *Disk) {
			var once atomic.Bool
			h.onWrite = func(int, *fakeWorker, uint64, int) error { return when(once.CompareAndSwap(false, true), errCrash) }
			if _, err := d.WriteAt(make([]byte, 512), 0); err != nil { // the write is repeated
				t.Error(err)
			}
		}, false},
		{"Flush fails", func(t *testing.T, h *fakeHost, d *Disk) {
			d.WriteAt(make([]byte, 512), 0)
			h.onFlush = func(k int, _ *fakeWorker) error { return when(k == 1, libraryError(1, "Unknown error")) }
		}, true},
		{"a crash in Flush", func(t *testing.T, h *fakeHost, d *Disk) {
			d.WriteAt(make([]byte, 512), 0)
			h.onFlush = func(k int, _ *fakeWorker) error { return when(k == 1, errCrash) }
		}, true},
		{"reads that fail don't cost what was written", func(t *testing.T, h *fakeHost, d *Disk) {
			d.WriteAt(make([]byte, 512), 0)
			h.onRead = func(k int, _ *fakeWorker, _ uint64, _ int) error {
				return when(k < 6, libraryError(1, "Unknown error"))
			}
			if _, err := d.ReadAt(make([]byte, 512), 4096); err != nil {
				t.Error(err)
			}
		}, false},
		{"a write fails", func(t *testing.T, h *fakeHost, d *Disk) {
			h.onWrite = func(int, *fakeWorker, uint64, int) error { return libraryError(1, "Unknown error") }
			if _, err := d.WriteAt(make([]byte, 512), 0); !errors.Is(err, syscall.EIO) {
				t.Error(err)
			}
		}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			host, _, d := newWritable(t, mib, Options{})
			test.do(t, host, d)
			for range 2 {
				err := d.Flush(t.Context())
				if test.fails != errors.Is(err, syscall.EIO) || !test.fails && err != nil {
					t.Errorf("Flush: %v, want it to fail: %v", err, test.fails)
				}
			}
		})
	}
}

// If the library does not answer any flush, the error says why the workers ended.
func TestFlushHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, _, d := newWritable(t, mib, Options{Timeout: 4 * time.Second})
		host.onFlush = func(int, *fakeWorker) error { return errHang }
		err := d.Flush(t.Context())
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "no answer within 4s") {
			t.Errorf("Flush: %v, want the 4s after which the workers were killed", err)
		}
		d.Close()
		host.checkGone()
	})
}

// loseWorker makes the last worker crash.
func loseWorker(h *fakeHost) {
	h.mu.Lock()
	w := h.workers[len(h.workers)-1]
	h.mu.Unlock()
	w.die(&worker.GoneError{PID: w.number, Signal: syscall.SIGSEGV})
}
