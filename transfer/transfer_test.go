package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

func plan(t testing.TB, src source.Disk) *transfer.Plan {
	t.Helper()
	p, err := transfer.NewPlan(t.Context(), src)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func create(t testing.TB, m *sinktest.Memory, size int64, o sink.Options) sink.Disk {
	t.Helper()
	d, err := m.Create(t.Context(), size, o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// ended checks that a copy, however it ended, kept the contract of sink.Disk and
// closed the target.
func ended(t testing.TB, m *sinktest.Memory) {
	t.Helper()
	for _, v := range m.Violations() {
		t.Errorf("the sink's contract was broken: %s", v)
	}
	if !m.Ended() {
		t.Error("the sink was left open")
	}
}

// randomDisk returns a disk with random data, Zero extents, and zeros in Data
// extents. All of them begin at multiples of align.
func randomDisk(r *rand.Rand, size int64, align int64) *sourcetest.Memory {
	m := &sourcetest.Memory{Bytes: make([]byte, size)}
	for off := int64(0); off < size; {
		n := min(size-off, (1+r.Int64N(300_000))/align*align+align)
		e := source.Extent{Off: off, Len: n}
		switch r.IntN(4) {
		case 0:
			e.Kind = source.Zero
		case 1: // zeros in a Data extent
		default:
			for i := range m.Bytes[off : off+n] {
				m.Bytes[off+int64(i)] = byte(r.Uint32() | 1)
			}
		}
		m.ExtentList = append(m.ExtentList, e)
		off += n
	}
	return m
}

func TestCopyIsIdentical(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for _, size := range []int64{0, 1, 511, 4096, 1<<20 - 1, 1 << 20, 5<<20 + 12345} {
		for _, unit := range []int64{1, 512, 64 << 10} {
			for _, parallel := range []int{0, 1, 5} {
				for _, zeroed := range []bool{false, true} {
					for _, align := range []int64{1, 512, 65536} {
						src := randomDisk(r, size, align)
						dst := &sinktest.Memory{Unit: unit, Parallel: parallel, Zeroed: zeroed, Encoded: unit > 1 && parallel == 0}
						if !zeroed {
							dst.Fill = 0xAA
						}
						o := transfer.Options{
							RequestSize: 64 << 10 << r.IntN(3), Requests: 1 + r.IntN(6),
							Sparse: []int64{0, 512, 4096, 100 << 10}[r.IntN(4)], KeepZeros: r.IntN(4) == 0,
							Counters: new(progress.Counters),
						}
						name := fmt.Sprintf("size %d unit %d parallel %d zeroed %v align %d %+v", size, unit, parallel, zeroed, align, o)
						p := plan(t, src)
						if r.IntN(2) == 0 { // the copy queries most of the extents
							var err error
							if p, err = transfer.NewPlanWithin(t.Context(), src, 0, new(progress.Counters)); err != nil {
								t.Fatal(err)
							}
							if size > 1<<20 && p.Known == size {
								t.Fatalf("%s: the plan waited for all extents", name)
							}
						}
						if _, err := transfer.Copy(t.Context(), src, create(t, dst, size, sink.Options{}), p, o); err != nil {
							t.Fatalf("%s: %v", name, err)
						}
						ended(t, dst)
						got, ok := dst.Published()
						if !ok || !bytes.Equal(got, src.Bytes) {
							t.Fatalf("%s: published %v, content differs", name, ok)
						}
						s := o.Counters.Snapshot()
						if s.Done != s.Planned || s.Planned+s.Skipped < p.Data {
							t.Errorf("%s: done %d of %d, skipped %d", name, s.Done, s.Planned, s.Skipped)
						}
						if s.Phase != progress.Finish {
							t.Errorf("%s: phase %s at the end", name, s.Phase)
						}
					}
				}
			}
		}
	}
}

// TestCopyRequestLog checks the exact calls for a small disk. Requests end at
// multiples of their size, a short hole is read with the data around it, and long
// holes and zeros in data become calls of ZeroAt.
func TestCopyRequestLog(t *testing.T) {
	const k = 1024
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{7}, 1024*k), ExtentList: []source.Extent{
		{Off: 0, Len: 100 * k},
		{Off: 100 * k, Len: 8 * k, Kind: source.Zero}, // short: read with the data around it
		{Off: 108 * k, Len: 92 * k},
		{Off: 200 * k, Len: 500 * k, Kind: source.Zero},
		{Off: 700 * k, Len: 324 * k},
	}}
	clear(src.Bytes[100*k : 108*k])
	clear(src.Bytes[200*k : 700*k])
	clear(src.Bytes[800*k : 900*k]) // zeros in data, which the scan finds
	clear(src.Bytes[1000*k : 1002*k])
	var reads []string
	var mu sync.Mutex
	src.OnRead = func(off int64, n int) error {
		mu.Lock()
		defer mu.Unlock()
		reads = append(reads, fmt.Sprintf("[%dK, %dK)", off/k, (off+int64(n))/k))
		return nil
	}
	dst := &sinktest.Memory{Zeroed: true}
	_, err := transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{}), plan(t, src), transfer.Options{RequestSize: 256 * k, Requests: 1})
	if err != nil {
		t.Fatal(err)
	}
	ended(t, dst)
	if got, want := strings.Join(reads, " "), "[0K, 200K) [700K, 768K) [768K, 1024K)"; got != want {
		t.Errorf("reads: %s\nwant:  %s", got, want)
	}
	want := []sinktest.Call{
		{Op: sinktest.OpWrite, Off: 0, Len: 100 * k},
		{Op: sinktest.OpZero, Off: 100 * k, Len: 8 * k},
		{Op: sinktest.OpWrite, Off: 108 * k, Len: 92 * k},
		{Op: sinktest.OpZero, Off: 200 * k, Len: 500 * k},
		{Op: sinktest.OpWrite, Off: 700 * k, Len: 68 * k},
		{Op: sinktest.OpWrite, Off: 768 * k, Len: 32 * k},
		{Op: sinktest.OpZero, Off: 800 * k, Len: 100 * k},
		{Op: sinktest.OpWrite, Off: 900 * k, Len: 124 * k},
		{Op: sinktest.OpFinish},
		{Op: sinktest.OpPublish},
	}
	if got := dst.Calls(); fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("calls:\n%s\nwant:\n%v", dst.Log(), want)
	}
}

func TestCopyLeavesSameToTheBacking(t *testing.T) {
	const k = 1024
	backing := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{0xBB}, 300*k)}
	want := make([]byte, 512*k)
	copy(want, backing.Bytes)
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{0xEE}, 512*k), ExtentList: []source.Extent{
		{Off: 0, Len: 130 * k, Kind: source.Inherited},
		{Off: 130 * k, Len: 10 * k},
		{Off: 140 * k, Len: 5 * k, Kind: source.Zero},
		{Off: 145 * k, Len: 300 * k, Kind: source.Inherited}, // ends after the end of the backing
		{Off: 445 * k, Len: 67 * k},
	}}
	copy(want[130*k:140*k], src.Bytes[130*k:])
	clear(want[140*k : 145*k])
	copy(want[445*k:], src.Bytes[445*k:])
	dst := &sinktest.Memory{Unit: 64 * k, Zeroed: true}
	_, err := transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{Backing: backing}), plan(t, src), transfer.Options{Backing: backing})
	if err != nil {
		t.Fatal(err)
	}
	ended(t, dst)
	got, _ := dst.Published()
	if !bytes.Equal(got, want) {
		t.Error("content differs")
	}
	if !strings.Contains(dst.Log(), "same") {
		t.Errorf("nothing was left to the backing:\n%s", dst.Log())
	}
}

var errBoom = errors.New("boom")

// lyingDisk is a disk whose extents come from a function.
type lyingDisk struct {
	source.Disk
	extents func(off, length int64) iter.Seq2[source.Extent, error]
}

func (d lyingDisk) Extents(_ context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return d.extents(off, length)
}

func TestPlanRefusesExtentsThatDoNotCover(t *testing.T) {
	disk := &sourcetest.Memory{Bytes: make([]byte, 1000)}
	for name, list := range map[string][]source.Extent{
		"none":       {},
		"short":      {{Off: 0, Len: 999}},
		"long":       {{Off: 0, Len: 1001}},
		"gap":        {{Off: 0, Len: 10}, {Off: 11, Len: 989}},
		"overlap":    {{Off: 0, Len: 10}, {Off: 9, Len: 991}},
		"empty":      {{Off: 0, Len: 0}, {Off: 0, Len: 1000}},
		"late start": {{Off: 1, Len: 999}},
	} {
		src := lyingDisk{disk, func(int64, int64) iter.Seq2[source.Extent, error] {
			return func(yield func(source.Extent, error) bool) {
				for _, e := range list {
					if !yield(e, nil) {
						return
					}
				}
			}
		}}
		if _, err := transfer.NewPlan(t.Context(), src); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// TestCopyFaults checks that the target is removed and not published when a call fails.
func TestCopyFaults(t *testing.T) {
	fail := func(op sinktest.Op, nth int) func(context.Context, sinktest.Call) error {
		var n atomic.Int64
		return func(_ context.Context, c sinktest.Call) error {
			if c.Op == op && n.Add(1) == int64(nth) {
				return errBoom
			}
			return nil
		}
	}
	for _, parallel := range []int{0, 4} {
		for _, c := range []struct {
			name   string
			read   func(off int64, n int) error
			extent func(source.Extent) error
			sink   func(context.Context, sinktest.Call) error
		}{
			{name: "first read", read: func(off int64, _ int) error { return boomAt(off == 0) }},
			{name: "last read", read: func(off int64, n int) error { return boomAt(off+int64(n) == 8<<20) }},
			{name: "first write", sink: fail(sinktest.OpWrite, 1)},
			{name: "later write", sink: fail(sinktest.OpWrite, 5)},
			{name: "zero", sink: fail(sinktest.OpZero, 1)},
			{name: "finish", sink: fail(sinktest.OpFinish, 1)},
			{name: "publish", sink: fail(sinktest.OpPublish, 1)},
		} {
			src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 8<<20), OnRead: c.read}
			clear(src.Bytes[3<<20 : 4<<20])
			dst := &sinktest.Memory{Parallel: parallel, Before: c.sink}
			_, err := transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{}), plan(t, src), transfer.Options{})
			if !errors.Is(err, errBoom) {
				t.Errorf("%s, parallel %d: error %v, want boom", c.name, parallel, err)
			}
			ended(t, dst)
			if _, ok := dst.Published(); ok || len(dst.Leftovers()) > 0 {
				t.Errorf("%s, parallel %d: published %v, left %v", c.name, parallel, ok, dst.Leftovers())
			}
		}
	}
}

func boomAt(now bool) error {
	if now {
		return errBoom
	}
	return nil
}

// TestCopyAsksExtentsOnce checks that a copy does not query extents again that the
// plan has in memory.
func TestCopyAsksExtentsOnce(t *testing.T) {
	var asked atomic.Int64
	src := &sourcetest.Memory{Bytes: make([]byte, 1<<20), OnExtent: func(source.Extent) error { asked.Add(1); return nil }}
	dst := &sinktest.Memory{}
	p := plan(t, src)
	before := asked.Load()
	if _, err := transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{}), p, transfer.Options{}); err != nil {
		t.Fatal(err)
	}
	if asked.Load() != before {
		t.Errorf("%d more extents were asked for", asked.Load()-before)
	}
}

// TestPlanOfManyExtents copies a disk with more extents than a plan keeps in memory.
func TestPlanOfManyExtents(t *testing.T) {
	const pieces = 3 << 20
	size := int64(pieces) * 512
	checkers := lyingDisk{sourcetest.Pattern(size), func(off, length int64) iter.Seq2[source.Extent, error] {
		return func(yield func(source.Extent, error) bool) {
			for end := off + length; off < end; off += 512 {
				if !yield(source.Extent{Off: off, Len: 512, Kind: source.Kind(off / 512 % 2)}, nil) {
					return
				}
			}
		}
	}}
	p := plan(t, checkers)
	if p.Data != size/2 || p.Zero != size/2 || p.Extents != pieces {
		t.Errorf("plan %d data, %d zero, %d extents", p.Data, p.Zero, p.Extents)
	}
	dst := &sinktest.Memory{CountOnly: true, Zeroed: true}
	counters := new(progress.Counters)
	if _, err := transfer.Copy(t.Context(), checkers, create(t, dst, size, sink.Options{}), p, transfer.Options{Counters: counters}); err != nil {
		t.Fatal(err)
	}
	if s := counters.Snapshot(); s.Zeroed != size {
		t.Errorf("%d bytes zeroed, want %d", s.Zeroed, size)
	}
}

func TestCopyEndsWithItsContext(t *testing.T) {
	cause := errors.New("stopped by a signal")
	for _, parallel := range []int{0, 4} {
		ctx, cancel := context.WithCancelCause(t.Context())
		var reads atomic.Int64
		src := &sourcetest.Memory{Context: ctx, Bytes: bytes.Repeat([]byte{1}, 16<<20), OnRead: func(int64, int) error {
			if reads.Add(1) == 6 {
				cancel(cause)
			}
			return nil
		}}
		dst := &sinktest.Memory{Parallel: parallel}
		d, err := dst.Create(ctx, src.Size(), sink.Options{})
		if err != nil {
			t.Fatal(err)
		}
		p := plan(t, src)
		if _, err := transfer.Copy(ctx, src, d, p, transfer.Options{}); !errors.Is(err, cause) {
			t.Errorf("error %v, want the cause", err)
		}
		ended(t, dst)
		if _, ok := dst.Published(); ok || len(dst.Leftovers()) > 0 {
			t.Error("something was published or left")
		}
	}
}

func TestCopyNoticesAChangedSource(t *testing.T) {
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 1<<20), ID: "one"}
	src.OnRead = func(int64, int) error { src.ID = "two"; return nil }
	dst := &sinktest.Memory{}
	_, err := transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{}), plan(t, src), transfer.Options{})
	if !errors.Is(err, transfer.ErrSourceChanged) {
		t.Errorf("error %v, want ErrSourceChanged", err)
	}
	ended(t, dst)

	// A change before the copy is noticed too, because the plan has the old extents.
	src = &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 1<<20), ID: "one"}
	p := plan(t, src)
	src.ID = "two"
	_, err = transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{}), p, transfer.Options{})
	if !errors.Is(err, transfer.ErrSourceChanged) {
		t.Errorf("error %v, want ErrSourceChanged", err)
	}
	ended(t, dst)
}

// TestCopyIsBounded checks that the numbers of concurrent reads and of buffers are
// bounded, also while the sink hangs.
func TestCopyIsBounded(t *testing.T) {
	var now, most, begun atomic.Int64
	stuck := make(chan struct{})
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 64<<20)}
	src.OnRead = func(int64, int) error {
		for n := now.Add(1); ; {
			m := most.Load()
			if n <= m || most.CompareAndSwap(m, n) {
				break
			}
		}
		if begun.Add(1) == 6 { // twice the 3 requests is the number of buffers
			close(stuck)
		}
		now.Add(-1)
		return nil
	}
	dst := &sinktest.Memory{Before: func(_ context.Context, c sinktest.Call) error {
		if c.Op == sinktest.OpWrite && c.Off == 0 {
			<-stuck
			if n := begun.Load(); n > 6 {
				t.Errorf("%d reads while nothing was written, want 6", n)
			}
		}
		return nil
	}}
	if _, err := transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{}), plan(t, src), transfer.Options{Requests: 3}); err != nil {
		t.Fatal(err)
	}
	if most.Load() > 3 {
		t.Errorf("%d reads at once, want 3 at most", most.Load())
	}
}

// lender is a source.Allocator.
type lender struct {
	*sourcetest.Memory
	free chan []byte
}

func (l lender) Buffer(ctx context.Context, n int) ([]byte, func(), error) {
	select {
	case b := <-l.free:
		return b[:n], func() { l.free <- b }, nil
	case <-ctx.Done():
		return nil, nil, context.Cause(ctx)
	}
}

func TestCopyReadsIntoTheSourcesMemory(t *testing.T) {
	for _, boom := range []bool{false, true} {
		src := lender{randomDisk(rand.New(rand.NewPCG(3, 4)), 9<<20, 512), make(chan []byte, 3)}
		for range cap(src.free) {
			src.free <- make([]byte, 1<<20)
		}
		if boom {
			src.OnRead = func(off int64, _ int) error { return boomAt(off > 5<<20) }
		}
		dst := &sinktest.Memory{}
		_, err := transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{}), plan(t, src), transfer.Options{})
		if boom != (err != nil) {
			t.Fatalf("error %v", err)
		}
		if got, _ := dst.Published(); !boom && !bytes.Equal(got, src.Bytes) {
			t.Error("content differs")
		}
		if len(src.free) != cap(src.free) {
			t.Errorf("%d of %d buffers came back", len(src.free), cap(src.free))
		}
	}
}

func TestCopyStream(t *testing.T) {
	content := randomDisk(rand.New(rand.NewPCG(5, 6)), 5<<20+77, 512).Bytes
	for _, c := range []struct {
		name string
		r    io.Reader
		size int64
		want string // of the error
	}{
		{"whole", bytes.NewReader(content), int64(len(content)), ""},
		{"in small pieces", iotestOneByteReader{bytes.NewReader(content[:70000])}, 70000, ""},
		{"empty", bytes.NewReader(nil), 0, ""},
		{"too long", bytes.NewReader(content), int64(len(content)) - 1, "has more than the expected 5242956 bytes"},
		{"too short", bytes.NewReader(content), int64(len(content)) + 1, "ended after 5242957 of the expected 5242958 bytes"},
		{"broken", io.MultiReader(bytes.NewReader(content[:3<<20]), brokenReader{}), int64(len(content)), "at byte 3145728: boom"},
	} {
		dst := &sinktest.Memory{}
		if c.name == "whole" {
			dst = &sinktest.Memory{Unit: 64 << 10, Encoded: true}
		}
		result, err := transfer.CopyStream(t.Context(), c.r, c.size, create(t, dst, c.size, sink.Options{}), transfer.Options{})
		ended(t, dst)
		if c.want != "" {
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: error %v, want %q", c.name, err, c.want)
			}
			if _, ok := dst.Published(); ok {
				t.Errorf("%s: published", c.name)
			}
			continue
		}
		if err != nil || result.Size != c.size {
			t.Errorf("%s: %d bytes, %v", c.name, result.Size, err)
		}
		if got, _ := dst.Published(); !bytes.Equal(got, content[:c.size]) {
			t.Errorf("%s: content differs", c.name)
		}
	}
}

type brokenReader struct{}

func (brokenReader) Read([]byte) (int, error) { return 0, errBoom }

type iotestOneByteReader struct{ r io.Reader }

func (r iotestOneByteReader) Read(p []byte) (int, error) { return r.r.Read(p[:min(len(p), 1)]) }

func TestLimiterEndsWithItsContext(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	l := transfer.NewLimiter(1)
	if err := l.Wait(ctx, 1); err != nil {
		t.Fatal(err)
	}
	cancel(errBoom)
	if err := l.Wait(ctx, 1<<30); !errors.Is(err, errBoom) {
		t.Errorf("error %v, want the cause", err)
	}
	if err := (*transfer.Limiter)(nil).Wait(t.Context(), 1<<30); err != nil {
		t.Error(err)
	}
}

// BenchmarkCopy measures the engine alone: reading the source costs nothing, and the
// sink does nothing.
func BenchmarkCopy(b *testing.B) {
	const size = 1 << 30
	for _, percent := range []int64{0, 50, 100} {
		for _, parallel := range []int{0, 4} {
			b.Run(fmt.Sprintf("data=%d%%/parallel=%d", percent, parallel), func(b *testing.B) {
				var data []source.Extent
				for off := int64(0); off < size && percent > 0; off += 4 << 20 {
					data = append(data, source.Extent{Off: off, Len: 4 << 20 * percent / 100})
				}
				src := sourcetest.Pattern(size, data...)
				p := plan(b, src)
				b.SetBytes(size)
				b.ReportAllocs()
				for b.Loop() {
					dst := &sinktest.Memory{CountOnly: true, Zeroed: true, Parallel: parallel}
					if _, err := transfer.Copy(b.Context(), src, create(b, dst, size, sink.Options{}), p, transfer.Options{}); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}
