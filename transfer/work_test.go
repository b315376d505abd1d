package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// A watcher checks the counters of a copy while it runs: what is planned stays the same, and what
// is done never decreases and never exceeds it.
type watcher struct {
	t        *testing.T
	name     string
	counters *progress.Counters

	mu   sync.Mutex
	last progress.Snapshot
}

func (w *watcher) look() {
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.counters.Snapshot()
	if s.Phase == progress.Plan {
		return
	}
	if w.last.Phase != progress.Plan && (s.Planned != w.last.Planned || s.Skipped != w.last.Skipped) {
		w.t.Errorf("%s: in phase %s %d bytes are planned and %d skipped, and were %d and %d", w.name, s.Phase, s.Planned, s.Skipped, w.last.Planned, w.last.Skipped)
	}
	if s.Done < w.last.Done || s.Done > s.Planned {
		w.t.Errorf("%s: in phase %s %d of %d bytes are done after %d", w.name, s.Phase, s.Done, s.Planned, w.last.Done)
	}
	w.last = s
}

// watch makes the counters be checked at each read of src, and at each call to dst.
func (w *watcher) watch(src *sourcetest.Memory, dst *sinktest.Memory) {
	src.OnRead = func(int64, int) error { w.look(); return nil }
	before := dst.Before
	dst.Before = func(ctx context.Context, c sinktest.Call) error {
		w.look()
		if before != nil {
			return before(ctx, c)
		}
		return nil
	}
}

// copyTwice copies src. With interrupt it stops after some reads and copies the rest in a second
// run, whose counters are those of o.
func copyTwice(t *testing.T, src *sourcetest.Memory, dst *sinktest.Memory, p *transfer.Plan, o transfer.Options, interrupt bool) (transfer.Result, error) {
	if !interrupt {
		return transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{}), p, o)
	}
	first, onRead := o, src.OnRead
	stop, cancel := context.WithCancel(t.Context())
	defer cancel()
	reads := 0
	src.OnRead = func(int64, int) error {
		if reads++; reads == 12 {
			cancel()
		}
		return nil
	}
	var s shelf
	first.Counters, first.Requests, first.Interval, first.Keep, first.Stop = new(progress.Counters), 1, 1, s.keep, stop
	var resumable *transfer.ResumableError
	if _, err := transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{}), p, first); !errors.As(err, &resumable) {
		t.Fatalf("the first run: %v", err)
	}
	src.OnRead = onRead
	o.Resume, o.Keep = s.last(), s.keep
	if o.Resume.Offset == 0 {
		t.Fatal("the first run has copied nothing")
	}
	return transfer.Copy(t.Context(), src, create(t, dst, src.Size(), sink.Options{State: o.Resume.State, Resume: o.Resume.Offset}), p, o)
}

// TestPlannedFromTheStart copies disks with holes, zeros in data, checks after the copy, and
// resumed copies. The planned bytes must not change after the copy has begun, and must all be done
// at the end.
func TestPlannedFromTheStart(t *testing.T) {
	const size = 6<<20 + 12345
	r := rand.New(rand.NewPCG(3, 4))
	for i := range 64 {
		bit := func(n int) bool { return i>>n&1 != 0 }
		verify, again, interrupt, unknown, zeroed, units := bit(0), bit(1), bit(2), bit(3), bit(4), bit(5)
		src := randomDisk(r, size, 512)
		copy(src.Bytes[5<<20:], make([]byte, 1<<19)) // zeros in data
		dst := &sinktest.Memory{Zeroed: zeroed, Parallel: r.IntN(4)}
		if units {
			dst.Unit = 64 << 10
		}
		w := &watcher{t: t, counters: new(progress.Counters)}
		w.name = fmt.Sprintf("verify %v, read again %v, resumed %v, extents unknown %v, zeroed %v, units %v", verify, again, interrupt, unknown, zeroed, units)
		w.watch(src, dst)
		p := plan(t, src)
		if unknown {
			var err error
			if p, err = transfer.NewPlanWithin(t.Context(), src, 0, new(progress.Counters)); err != nil {
				t.Fatal(err)
			}
		}
		o := transfer.Options{RequestSize: 64 << 10, Verify: verify, Reread: again, Counters: w.counters}
		result, err := copyTwice(t, src, dst, p, o, interrupt)
		if err != nil {
			t.Fatalf("%s: %v", w.name, err)
		}
		w.look()
		s := w.last
		if s.Done != s.Planned || s.Planned-s.Checks+s.Skipped != size {
			t.Errorf("%s: %d of %d bytes are done, %d were skipped", w.name, s.Done, s.Planned, s.Skipped)
		}
		if verify != (s.Checks > size/4 && result.Verify.Status == report.VerifyOK) && !again {
			t.Errorf("%s: %d bytes of checks were planned", w.name, s.Checks)
		}
		if s.Read > size {
			t.Errorf("%s: %d bytes of the source were read", w.name, s.Read)
		}
		if got, ok := dst.Published(); !ok || !bytes.Equal(got, src.Bytes) {
			t.Errorf("%s: published %v, or the content differs", w.name, ok)
		}
	}
}

// TestStreamPlannedFromTheStart does the same for streams. If the size of a stream is not known, it
// is planned when the stream has ended.
func TestStreamPlannedFromTheStart(t *testing.T) {
	const size = 3<<20 + 777
	src := randomDisk(rand.New(rand.NewPCG(5, 6)), size, 512)
	for _, known := range []int64{size, sink.UnknownSize} {
		for _, verify := range []bool{false, true} {
			w := &watcher{t: t, name: fmt.Sprintf("size %d, verify %v", known, verify), counters: new(progress.Counters)}
			dst := &sinktest.Memory{Zeroed: true}
			if known == size {
				w.watch(new(sourcetest.Memory), dst)
			}
			d, err := dst.Create(t.Context(), known, sink.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := transfer.CopyStream(t.Context(), bytes.NewReader(src.Bytes), known, d, transfer.Options{RequestSize: 64 << 10, Verify: verify, Counters: w.counters}); err != nil {
				t.Fatalf("%s: %v", w.name, err)
			}
			s := w.counters.Snapshot()
			if s.Done != s.Planned || s.Work() != size || verify != (s.Checks == size) {
				t.Errorf("%s: %d of %d bytes are done, %d of them checks", w.name, s.Done, s.Planned, s.Checks)
			}
		}
	}
}

// TestSumIsPlanned checks that the counters of Sum and Compare are those of their disks.
func TestSumIsPlanned(t *testing.T) {
	d := sourcetest.Pattern(1<<20, source.Extent{Len: 256 << 10})
	counters := new(progress.Counters)
	if _, err := transfer.Sum(t.Context(), d, digest.Blksum, transfer.CompareOptions{Counters: counters}); err != nil {
		t.Fatal(err)
	}
	if s := counters.Snapshot(); s.Done != 256<<10 || s.Planned != s.Done || s.Skipped != 768<<10 || s.Read != s.Done || s.Checks != 0 {
		t.Errorf("%+v", s)
	}
}
