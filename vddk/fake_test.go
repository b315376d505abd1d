package vddk

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// fakeHost simulates a host with one disk, and the workers that open it, with any fault that a test
// needs. Hooks are set before the first Open and are called concurrently; a hook may be nil. The
// library returns the error that a hook returns.
type fakeHost struct {
	t         testing.TB
	content   io.ReaderAt // also an io.WriterAt in tests that write
	opened    worker.Opened
	lacks     string              // name of a function that the library lacks
	holes     []worker.Block      // in ascending order; nil if no query is expected
	delay     time.Duration       // time that each request takes
	onConfig  func(worker.Config) // at the start of each worker
	onStart   func(n int) error   // at the start of worker n, from 1
	onOpen    func(n int, o *worker.Opened) error
	onRead    func(k int, p *fakeWorker, sector uint64, sectors int) error // for read k of all workers, from 1
	onWrite   func(k int, p *fakeWorker, sector uint64, sectors int) error
	onFlush   func(k int, p *fakeWorker) error
	onPrepare func(p *fakeWorker) error
	onQuery   func(k int, p *fakeWorker, start, sectors uint64) error

	mu                                     sync.Mutex
	workers                                []*fakeWorker
	starts, reads, writes, flushes         int
	queries, cleanups, prepares, endAccess int
	inFlight, mostInFlight                 int
	requests                               []worker.OpenRequest
}

// Hooks return these errors to make the worker crash or hang.
var (
	errCrash = errors.New("the worker crashes")
	errHang  = errors.New("the library hangs")
)

func libraryError(code uint64, text string) error {
	return &worker.Error{Code: code, Op: "VixDiskLib_Function", Text: text}
}

// newFakeHost returns a host with a disk of size bytes, and the random content of the disk.
func newFakeHost(t testing.TB, size int) (*fakeHost, []byte) {
	content := make([]byte, size)
	rand.NewChaCha8([32]byte{1}).Read(content)
	return &fakeHost{t: t, content: bytes.NewReader(content),
		opened: worker.Opened{Capacity: uint64(size / sectorSize), Adapter: 3, UUID: "60 00", Transport: "nbd", Links: 1}}, content
}

// fastRetry repeats a request up to retries times, after 1 ms each.
func fastRetry(retries int) source.RetryOptions {
	return source.RetryOptions{Retries: retries, Backoff: func(int) time.Duration { return time.Millisecond }}
}

// open opens the disk. At the end of the test, it closes the disk and checks that no worker is left.
func (f *fakeHost) open(ctx context.Context, p Params, o Options) (*Disk, error) {
	if p.File == "" {
		p.File = "[ds (1)] a b/a b.vmdk"
	}
	d, err := open(ctx, p, Library{Path: "/x/libvixDiskLib.so.8.0.1", Version: 8}, o, "AA:BB", f.start)
	if err == nil {
		f.t.Cleanup(func() { d.Close(); f.checkGone() })
	}
	return d, err
}

func (f *fakeHost) mustOpen(p Params, o Options) *Disk {
	f.t.Helper()
	d, err := f.open(f.t.Context(), p, o)
	if err != nil {
		f.t.Fatal(err)
	}
	return d
}

func (f *fakeHost) checkGone() {
	f.t.Helper()
	f.mu.Lock()
	defer f.mu.Unlock()
	for i, w := range f.workers {
		if w.Err() == nil {
			f.t.Errorf("worker %d of %d was left running", i+1, len(f.workers))
		}
		w.mu.Lock()
		if !w.released {
			f.t.Errorf("the memory of worker %d of %d was not given back", i+1, len(f.workers))
		}
		w.mu.Unlock()
	}
}

func (f *fakeHost) start(ctx context.Context, c worker.Config) (process, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.onConfig != nil {
		f.onConfig(c)
	}
	f.starts++
	w := &fakeWorker{host: f, number: f.starts, slotSize: c.SlotSize, memory: make([]byte, c.Slots*c.SlotSize),
		busy: make([]bool, c.Slots), done: make(chan struct{}), log: c.Log}
	if f.onStart != nil {
		if err := f.onStart(f.starts); err != nil {
			return nil, err
		}
	}
	f.workers = append(f.workers, w)
	return w, nil
}

type fakeWorker struct {
	host     *fakeHost
	number   int
	slotSize int
	memory   []byte
	done     chan struct{}
	log      func(worker.Level, string)

	mu       sync.Mutex
	busy     []bool
	err      error
	released bool
}

func (w *fakeWorker) die(err *worker.GoneError) {
	w.mu.Lock()
	if w.err != nil {
		w.mu.Unlock()
		return
	}
	w.err = err
	w.mu.Unlock()
	close(w.done)
}

func (w *fakeWorker) Kill()                 { w.die(&worker.GoneError{PID: w.number, Killed: true}) }
func (w *fakeWorker) Done() <-chan struct{} { return w.done }
func (w *fakeWorker) Err() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

func (w *fakeWorker) Has(name string) bool { return name != w.host.lacks }

func (w *fakeWorker) Close(ctx context.Context) error {
	if ctx.Err() != nil {
		w.Kill()
		return context.Cause(ctx)
	}
	w.mu.Lock()
	for i, b := range w.busy {
		if b {
			w.host.t.Errorf("worker %d: Close with a request in slot %d", w.number, i)
		}
	}
	w.mu.Unlock()
	w.die(&worker.GoneError{PID: w.number, Closed: true})
	return nil
}

func (w *fakeWorker) Release() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.host.t.Errorf("worker %d: released while it runs", w.number)
	}
	if w.released {
		w.host.t.Errorf("worker %d: released twice", w.number)
	}
	w.released = true
	for i := 0; i < len(w.memory); i += sectorSize {
		w.memory[i] = 0xDD // a read of released memory gets other data
	}
}

// settle simulates the result err of a hook, and the delay of the host.
func (w *fakeWorker) settle(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, errCrash):
		w.die(&worker.GoneError{PID: w.number, Signal: syscall.SIGSEGV})
		return w.Err()
	case errors.Is(err, errHang):
		select {
		case <-w.done:
			return w.Err()
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	case err != nil:
		return err
	}
	if w.host.delay > 0 {
		select {
		case <-w.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(w.host.delay):
		}
	}
	return w.Err()
}

func (w *fakeWorker) Open(ctx context.Context, r worker.OpenRequest) (worker.Opened, error) {
	f := w.host
	f.mu.Lock()
	o := f.opened
	f.requests = append(f.requests, r)
	f.mu.Unlock()
	var err error
	if f.onOpen != nil {
		err = f.onOpen(w.number, &o)
	}
	return o, w.settle(ctx, err)
}

func (w *fakeWorker) Slot(i int) []byte {
	return w.memory[i*w.slotSize : (i+1)*w.slotSize : (i+1)*w.slotSize]
}

// request checks and counts a request, calls the hook, and then do if the hook returned nil.
func (w *fakeWorker) request(ctx context.Context, slot int, sector uint64, sectors int, hook func() error, do func(p []byte) error) error {
	f := w.host
	w.mu.Lock()
	if w.err != nil {
		w.mu.Unlock()
		return w.Err()
	}
	if w.busy[slot] || sectors <= 0 || sectors*sectorSize > w.slotSize || sector+uint64(sectors) > f.opened.Capacity {
		f.t.Errorf("worker %d: slot %d (busy: %v), sectors [%d, +%d)", w.number, slot, w.busy[slot], sector, sectors)
	}
	w.busy[slot] = true
	w.mu.Unlock()
	f.mu.Lock()
	f.inFlight++
	f.mostInFlight = max(f.mostInFlight, f.inFlight)
	f.mu.Unlock()
	err := w.settle(ctx, hook())
	f.mu.Lock()
	f.inFlight--
	f.mu.Unlock()
	w.mu.Lock()
	defer w.mu.Unlock()
	w.busy[slot] = false
	if w.released {
		f.t.Errorf("worker %d: memory was released with a request in slot %d", w.number, slot)
	}
	if err != nil {
		return err
	}
	if w.err != nil {
		return w.err
	}
	return do(w.Slot(slot)[:sectors*sectorSize])
}

func (w *fakeWorker) Read(ctx context.Context, slot int, sector uint64, sectors int) error {
	f := w.host
	f.mu.Lock()
	f.reads++
	k := f.reads
	f.mu.Unlock()
	return w.request(ctx, slot, sector, sectors, func() error {
		if f.onRead == nil {
			return nil
		}
		return f.onRead(k, w, sector, sectors)
	}, func(p []byte) error {
		if _, err := f.content.ReadAt(p, int64(sector)*sectorSize); err != nil && err != io.EOF {
			return err
		}
		return nil
	})
}

func (w *fakeWorker) Write(ctx context.Context, slot int, sector uint64, sectors int) error {
	f := w.host
	f.mu.Lock()
	f.writes++
	k := f.writes
	f.mu.Unlock()
	return w.request(ctx, slot, sector, sectors, func() error {
		if f.onWrite == nil {
			return nil
		}
		return f.onWrite(k, w, sector, sectors)
	}, func(p []byte) error {
		_, err := f.content.(io.WriterAt).WriteAt(p, int64(sector)*sectorSize)
		return err
	})
}

func (w *fakeWorker) Flush(ctx context.Context) error {
	f := w.host
	f.mu.Lock()
	f.flushes++
	k := f.flushes
	f.mu.Unlock()
	if f.onFlush == nil {
		return w.settle(ctx, nil)
	}
	return w.settle(ctx, f.onFlush(k, w))
}

func (w *fakeWorker) Query(ctx context.Context, start, sectors, size uint64) ([]worker.Block, error) {
	f := w.host
	f.mu.Lock()
	f.queries++
	k := f.queries
	f.mu.Unlock()
	if size < 128 || size&(size-1) != 0 || start%size != 0 || sectors%size != 0 || sectors == 0 || sectors/size > worker.MaxChunks || start+sectors > f.opened.Capacity {
		f.t.Errorf("query of [%d, +%d) in chunks of %d, capacity %d (sectors)", start, sectors, size, f.opened.Capacity)
	}
	if f.onQuery != nil {
		if err := w.settle(ctx, f.onQuery(k, w, start, sectors)); err != nil {
			return nil, err
		}
	}
	// All ranges between holes are allocated.
	var blocks []worker.Block
	next, end := start, start+sectors
	for _, h := range f.holes {
		from, to := max(h.Start, start), min(h.Start+h.Count, end)
		if from >= to {
			continue
		}
		if from > next {
			blocks = append(blocks, worker.Block{Start: next, Count: from - next})
		}
		next = to
	}
	if next < end {
		blocks = append(blocks, worker.Block{Start: next, Count: end - next})
	}
	return inChunks(blocks, size), nil
}

// inChunks extends blocks to whole chunks.
func inChunks(blocks []worker.Block, size uint64) (whole []worker.Block) {
	for _, b := range blocks {
		from, to := b.Start/size*size, (b.Start+b.Count+size-1)/size*size
		if n := len(whole); n > 0 && whole[n-1].Start+whole[n-1].Count >= from {
			whole[n-1].Count = to - whole[n-1].Start
			continue
		}
		whole = append(whole, worker.Block{Start: from, Count: to - from})
	}
	return whole
}

func (w *fakeWorker) Cleanup(ctx context.Context, r worker.OpenRequest) (uint32, uint32, error) {
	w.host.mu.Lock()
	defer w.host.mu.Unlock()
	w.host.cleanups++
	return 1, 0, nil
}

func (w *fakeWorker) PrepareAccess(ctx context.Context, r worker.OpenRequest) error {
	if r.Identity == "" {
		return fmt.Errorf("PrepareForAccess without an identity")
	}
	w.host.mu.Lock()
	w.host.prepares++
	w.host.mu.Unlock()
	if w.host.onPrepare != nil {
		return w.settle(ctx, w.host.onPrepare(w))
	}
	return nil
}

func (w *fakeWorker) EndAccess(ctx context.Context, r worker.OpenRequest) error {
	if r.Identity == "" {
		return fmt.Errorf("EndAccess without an identity")
	}
	w.host.mu.Lock()
	defer w.host.mu.Unlock()
	w.host.endAccess++
	return nil
}

// hintOf returns the hint of the first error in err that has one, as the command shows it.
func hintOf(err error) string {
	var e interface{ Hint() string }
	if errors.As(err, &e) {
		return e.Hint()
	}
	return ""
}
