package nfc_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/internal/nfcbudget"
	"github.com/vddkcp/vddkcp/nfc"
	"github.com/vddkcp/vddkcp/nfc/nfctest"
	"github.com/vddkcp/vddkcp/source"
)

// descriptors returns the number of open file descriptors of the process.
func descriptors(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(entries)
}

// TestManyConnections opens 1000 connections one after another, in several ways. With the race
// detector, it opens fewer.
func TestManyConnections(t *testing.T) {
	content := pattern(128<<10, 80)
	h, ts := newHost(t, content, nfctest.Options{Connections: 1})
	noLeaks(t, h)
	before := descriptors(t)
	o := patient()
	o.Clear = true
	d := open(t, ts, nfc.Params{Name: file, Frozen: true}, o)
	const reopened, opened = 300 / patience, 700 / patience
	for range reopened {
		h.Cut()
		readAll(t, d, content, 128<<10)
	}
	d.Close()
	o.Hosts = nfc.NewHosts()
	for i := range opened - 1 {
		o.Clear = i%8 != 0
		d := open(t, ts, nfc.Params{Name: file}, o)
		if _, err := d.ReadAt(make([]byte, 512), int64(i)); err != nil {
			t.Fatal(err)
		}
		d.Close()
	}
	// The host notices a moment later that a connection was ended.
	if s := h.Stats(); s.Connections != reopened+opened || s.Tickets != reopened+opened || s.UnusedTickets != 0 || s.MostOpen > 8 || s.CloseHandshakes != opened {
		t.Errorf("%+v", s)
	}
	if !h.AwaitClosed(5 * time.Second) {
		t.Errorf("%d connections are open", h.Stats().Open)
	}
	if after := descriptors(t); after > before+10 {
		t.Errorf("%d file descriptors are open, and before %d", after, before)
	}
}

// TestManyDisks reads eight disks at once from a host whose memory is enough for three.
func TestManyDisks(t *testing.T) {
	content := pattern(2<<20, 81)
	h, ts := newHost(t, content, nfctest.Options{Memory: 48 << 20})
	noLeaks(t, h)
	o := patient()
	o.Buffers = nfcbudget.Buffers{Size: 2 << 20, Count: 8}
	budget := nfcbudget.New(48 << 20)
	o.Budget, o.Hosts = only(budget), nfc.NewHosts()
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			d, err := nfc.Open(t.Context(), nfc.Params{Name: file, Frozen: true}, ts, o)
			if err != nil {
				t.Error(err)
				return
			}
			defer d.Close()
			got := make([]byte, len(content))
			if _, err := d.ReadAt(got, 0); err != nil || !bytes.Equal(got, content) {
				t.Errorf("%v", err)
			}
		})
	}
	wg.Wait()
	if s := h.Stats(); s.Connections != 8 || s.Tickets != 8 || s.MostMemory > 48<<20 || s.MostMemory < 16<<20 {
		t.Errorf("%+v", s)
	}
	if _, ok := budget.TryAcquire(48 << 20); !ok {
		t.Error("memory was not given back")
	}
}

// TestTooManyConnections opens more disks than a host allows connections.
func TestTooManyConnections(t *testing.T) {
	content := pattern(128<<10, 83)
	h, ts := newHost(t, content, nfctest.Options{Connections: 1})
	noLeaks(t, h)
	first := open(t, ts, nfc.Params{Name: file}, patient())
	var e *nfc.Error
	if _, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, patient()); !errors.As(err, &e) || source.IsPermanent(err) || e.Step != nfc.StepBanner {
		t.Error(err)
	}
	readAll(t, first, content, 64<<10)
	first.Close()
	readAll(t, open(t, ts, nfc.Params{Name: file}, patient()), content, 64<<10)
}

// TestBudget follows the share of the host's memory through the life of a disk.
func TestBudget(t *testing.T) {
	content := pattern(1<<20, 82)
	h, ts := newHost(t, content, nfctest.Options{})
	noLeaks(t, h)
	first, second := nfcbudget.New(4<<20), nfcbudget.New(4<<20)
	current := first
	var failed error
	o := patient()
	o.Budget = func(context.Context) (*nfcbudget.Budget, error) { return current, failed }
	free := func(b *nfcbudget.Budget) bool {
		release, ok := b.TryAcquire(4 << 20)
		if ok {
			release()
		}
		return ok
	}
	rule := h.On(nfctest.Fault{Step: nfctest.StepOpenFile, Kind: nfctest.ErrorThenZeros})
	if _, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, o); err == nil || !free(first) {
		t.Errorf("after a failed opening: %v", err)
	}
	rule.Remove()
	failed = errors.New("no inventory")
	if _, err := nfc.Open(t.Context(), nfc.Params{Name: file}, ts, o); !errors.Is(err, failed) || ts.count() != 1 {
		t.Errorf("%d tickets: %v", ts.count(), err)
	}
	failed = nil
	d := open(t, ts, nfc.Params{Name: file, Frozen: true}, o)
	if free(first) {
		t.Error("an open disk has no share")
	}
	held := true
	h.On(nfctest.Fault{Step: nfctest.StepBanner, Kind: nfctest.Drop, Times: 2, Do: func() { held = held && !free(first) }})
	h.Cut()
	readAll(t, d, content, 1<<20)
	if !held {
		t.Error("the disk has lost its share while it was opened again")
	}
	current = second // the machine was migrated
	h.Cut()
	readAll(t, d, content, 1<<20)
	if !free(first) || free(second) {
		t.Error("the share of the first host was not exchanged for one of the second")
	}
	current = nil // a host without limits
	h.Cut()
	readAll(t, d, content, 1<<20)
	if !free(second) {
		t.Error("the share of the second host was not given back")
	}
	current = first
	h.Cut()
	readAll(t, d, content, 1<<20)
	d.Close()
	if !free(first) || !free(second) {
		t.Error("a closed disk has a share")
	}
	o.Budget = func(context.Context) (*nfcbudget.Budget, error) { return nil, nil }
	open(t, ts, nfc.Params{Name: file}, o).Close()
}

// sparse has zeros, and a byte at each multiple of 1 TiB.
type sparse struct{}

func (sparse) ReadAt(p []byte, off int64) (int, error) {
	clear(p)
	if next := (off + 1<<40 - 1) &^ (1<<40 - 1); next < off+int64(len(p)) {
		p[next-off] = byte(next>>40) | 1
	}
	return len(p), nil
}

// TestSparse reads 2 GiB of a disk of 64 TiB. Zeros cost little on the wire, and no memory.
func TestSparse(t *testing.T) {
	const size = 64 << 40
	h := nfctest.New(t, nfctest.Options{})
	h.AddDisk(file, nfctest.Disk{Content: sparse{}, Size: size})
	ts := &tickets{host: h}
	noLeaks(t, h)
	d := open(t, ts, nfc.Params{Name: file, Frozen: true, Capacity: size}, nfc.Options{Clear: true})
	if d.Size() != size {
		t.Fatalf("%d bytes", d.Size())
	}
	p, want := make([]byte, 4<<20), make([]byte, 4<<20)
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	most := uint64(0)
	const reads = 512 / patience
	for i := range int64(reads) {
		off := i * (size / reads)
		if i%2 == 1 {
			off += size/reads - int64(len(p)) - 1
		}
		if _, err := d.ReadAt(p, off); err != nil {
			t.Fatal(err)
		}
		sparse{}.ReadAt(want, off)
		if !bytes.Equal(p, want) {
			t.Fatalf("other bytes at %d", off)
		}
		if i%16 == 0 {
			runtime.ReadMemStats(&after)
			most = max(most, after.HeapAlloc)
		}
	}
	if most > before.HeapAlloc+32<<20 {
		t.Errorf("the heap has grown from %d to %d bytes", before.HeapAlloc, most)
	}
	if n := h.Stats().Sent; n > reads*4<<20/1000 {
		t.Errorf("%d bytes were sent for %d MiB of zeros", n, reads*4)
	}
}
