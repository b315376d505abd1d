package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

var errSignal = errors.New("stopped by SIGINT")

// shelf keeps all checkpoints of a copy.
type shelf struct {
	mu   sync.Mutex
	kept []transfer.Checkpoint
}

func (s *shelf) keep(c transfer.Checkpoint) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.kept = append(s.kept, c)
	return nil
}

func (s *shelf) last() *transfer.Checkpoint { return &s.kept[len(s.kept)-1] }

// TestResumeThatCannotBegin checks that a copy which fails before it begins keeps the
// target of the earlier copy that it was to continue.
func TestResumeThatCannotBegin(t *testing.T) {
	const size = 1 << 20
	src := randomDisk(rand.New(rand.NewPCG(1, 2)), size, 512)
	m := &sinktest.Memory{Unit: 512}
	var s shelf
	stop, cancel := context.WithCancelCause(t.Context())
	m.Before = func(_ context.Context, c sinktest.Call) error {
		if c.Op == sinktest.OpCheckpoint {
			cancel(errSignal)
		}
		return nil
	}
	o := transfer.Options{RequestSize: 64 << 10, Keep: s.keep, Interval: 1, Stop: stop}
	var resumable *transfer.ResumableError
	if _, err := transfer.Copy(t.Context(), src, create(t, m, size, sink.Options{}), plan(t, src), o); !errors.As(err, &resumable) || len(s.kept) == 0 {
		t.Fatalf("the first copy ended with %v and %d checkpoints, want a checkpoint and an error that can be resumed", err, len(s.kept))
	}
	o.Resume, o.Stop = s.last(), nil
	target := create(t, m, size, sink.Options{State: o.Resume.State, Resume: o.Resume.Offset})
	other := randomDisk(rand.New(rand.NewPCG(1, 2)), 2*size, 512)
	_, err := transfer.Copy(t.Context(), src, target, plan(t, other), o)
	if !errors.As(err, &resumable) || resumable.Offset != o.Resume.Offset {
		t.Errorf("a copy with the plan of another disk: %v, want an error that can be resumed at %d", err, o.Resume.Offset)
	}
	if len(m.Leftovers()) == 0 {
		t.Error("the target of the earlier copy is gone")
	}
}

// TestResume checks that a copy which is stopped again and again, or whose target
// becomes full, has the same result as one that is not, and does not read again what
// was done.
func TestResume(t *testing.T) {
	const size = 5<<20 + 512
	for seed := range uint64(60) {
		r := rand.New(rand.NewPCG(9, seed))
		src := randomDisk(r, size, 512)
		m := &sinktest.Memory{Unit: []int64{1, 512, 64 << 10}[r.IntN(3)]}
		switch r.IntN(3) {
		case 0:
			m.Parallel = 3
		case 1:
			m.Encoded = m.Unit > 1
		}
		if m.Zeroed = r.IntN(2) == 0; !m.Zeroed {
			m.Fill = 0xAA
		}
		var below atomic.Int64
		src.OnRead = func(off int64, n int) error {
			if off < below.Load() {
				return fmt.Errorf("[%d, %d) is read again, and was done", off, off+int64(n))
			}
			return nil
		}
		var s shelf
		o := transfer.Options{
			RequestSize: 64 << 10 << r.IntN(3), Requests: 1 + r.IntN(4), Digest: digest.SHA256,
			Keep: s.keep, Interval: time.Duration(1 + r.IntN(2)*int(time.Hour)),
		}
		for stops := 0; ; stops++ {
			stop, cancel := context.WithCancelCause(t.Context())
			calls, when, full := atomic.Int64{}, 1+r.Int64N(20), r.IntN(3) == 0
			m.Before = func(_ context.Context, c sinktest.Call) error {
				if c != (sinktest.Call{Op: sinktest.OpCheckpoint}) && calls.Add(1) == when && stops < 5 {
					if full {
						return syscall.ENOSPC
					}
					cancel(errSignal)
				}
				return nil
			}
			o.Stop, o.Counters = stop, new(progress.Counters)
			so := sink.Options{}
			if len(s.kept) > 0 {
				o.Resume = s.last()
				so.State, so.Resume = o.Resume.State, o.Resume.Offset
				below.Store(so.Resume)
			}
			result, err := transfer.Copy(t.Context(), src, create(t, m, size, so), plan(t, src), o)
			cancel(nil)
			ended(t, m)
			if err == nil {
				if got, _ := m.Published(); !bytes.Equal(got, src.Bytes) {
					t.Fatalf("seed %d: after %d stops the content differs", seed, stops)
				}
				whole := digest.New(digest.SHA256)
				whole.Data(src.Bytes)
				if result.Digest.Value != whole.Value() {
					t.Errorf("seed %d: after %d stops the digest is %s, want %s", seed, stops, result.Digest.Value, whole.Value())
				}
				break
			}
			var resumable *transfer.ResumableError
			if !errors.As(err, &resumable) || !full && !errors.Is(err, errSignal) {
				t.Fatalf("seed %d: stop %d: %v", seed, stops, err)
			}
			if len(m.Leftovers()) == 0 || resumable.Offset != s.last().Offset {
				t.Fatalf("seed %d: stop %d: kept %v, at %d, the checkpoint at %d", seed, stops, m.Leftovers(), resumable.Offset, s.last().Offset)
			}
			if err := s.last().CheckTail(t.Context(), bytes.NewReader(src.Bytes)); err != nil {
				t.Errorf("seed %d: stop %d: %v", seed, stops, err)
			}
		}
	}
}

// TestStopKeepsWhatIsDone checks that a stopped copy begins no more requests, and that
// the last checkpoint includes those in progress.
func TestStopKeepsWhatIsDone(t *testing.T) {
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 8<<20)}
	m := &sinktest.Memory{}
	stop, cancel := context.WithCancelCause(t.Context())
	m.Before = func(_ context.Context, c sinktest.Call) error {
		if c.Op == sinktest.OpWrite && c.Off == 2<<20 {
			cancel(errSignal)
		}
		return nil
	}
	var s shelf
	_, err := transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), plan(t, src),
		transfer.Options{RequestSize: 1 << 20, Requests: 1, Stop: stop, Keep: s.keep, Interval: time.Hour})
	var resumable *transfer.ResumableError
	if !errors.As(err, &resumable) || resumable.Offset < 3<<20 || resumable.Offset > 6<<20 {
		t.Fatalf("error %v, %+v", err, resumable)
	}
}

// TestStopDuringFailingSync stops a copy while a checkpoint is made durable, which then
// fails. The failure is the error of the copy, as it is without a stop.
func TestStopDuringFailingSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 8<<20)}
		m := &sinktest.Memory{}
		stop, cancel := context.WithCancelCause(t.Context())
		syncs := 0
		m.Before = func(_ context.Context, c sinktest.Call) error {
			if c.Op != sinktest.OpSync {
				time.Sleep(time.Millisecond)
				return nil
			}
			if syncs++; syncs == 1 {
				cancel(errSignal)
				time.Sleep(time.Second) // until the pieces in progress are finished
			}
			return errBoom
		}
		var s shelf
		_, err := transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), plan(t, src),
			transfer.Options{RequestSize: 1 << 20, Requests: 1, Stop: stop, Keep: s.keep, Interval: 1})
		if !errors.Is(err, errBoom) || errors.Is(err, errSignal) {
			t.Errorf("error %v, want %v", err, errBoom)
		}
	})
}

// TestLostTarget checks that data which was not synced when the target was lost is
// written again.
func TestLostTarget(t *testing.T) {
	const size = 4 << 20
	for seed := range uint64(30) {
		r := rand.New(rand.NewPCG(10, seed))
		src := randomDisk(r, size, 512)
		m := &sinktest.Memory{Parallel: r.IntN(4), Zeroed: true}
		var calls, losses atomic.Int64
		next := 1 + r.Int64N(15)
		m.Before = func(_ context.Context, c sinktest.Call) error {
			if c != (sinktest.Call{Op: sinktest.OpCheckpoint}) && calls.Add(1) == next && losses.Add(1) < 5 {
				return fmt.Errorf("boom: %w", sink.ErrLost)
			}
			return nil
		}
		failed := false
		o := transfer.Options{
			RequestSize: 64 << 10, Requests: 3, Digest: digest.Blksum, Interval: time.Duration(1 + r.IntN(2)*int(time.Hour)),
			Counters: new(progress.Counters),
			Lost:     source.RetryOptions{Retries: 20, Backoff: func(int) time.Duration { return 0 }},
		}
		o.Reopen = func(ctx context.Context, state []byte, resume int64) (sink.Disk, error) {
			if failed = !failed; failed {
				return nil, errBoom
			}
			next = calls.Load() + 1 + r.Int64N(15)
			return m.Create(ctx, size, sink.Options{State: state, Resume: resume})
		}
		planned := plan(t, src)
		if seed%2 == 0 { // the copy queries the other extents
			var err error
			if planned, err = transfer.NewPlanWithin(t.Context(), src, 0, new(progress.Counters)); err != nil {
				t.Fatal(err)
			}
		}
		m.Unit = []int64{0, 0, 4096}[seed%3]
		_, err := transfer.Copy(t.Context(), src, create(t, m, size, sink.Options{}), planned, o)
		ended(t, m)
		if err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
		if got, _ := m.Published(); !bytes.Equal(got, src.Bytes) {
			t.Fatalf("seed %d: after %d losses the content differs", seed, losses.Load())
		}
		if s := o.Counters.Snapshot(); s.Done != s.Planned || s.Planned+s.Skipped != size {
			t.Errorf("seed %d: after %d losses %d of %d bytes are done, and %d skipped, of a disk of %d", seed, losses.Load(), s.Done, s.Planned, s.Skipped, size)
		}
	}
}

func TestLostTargetIsGivenUp(t *testing.T) {
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 1<<20)}
	m := &sinktest.Memory{}
	m.Before = func(_ context.Context, c sinktest.Call) error {
		if c.Op == sinktest.OpWrite {
			return sink.ErrLost
		}
		return nil
	}
	tries := 0
	var s shelf
	_, err := transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), plan(t, src), transfer.Options{
		Keep: s.keep, Lost: source.RetryOptions{Retries: 2, Backoff: func(int) time.Duration { return 0 }},
		Reopen: func(context.Context, []byte, int64) (sink.Disk, error) { tries++; return nil, errBoom },
	})
	if tries != 2 || err == nil || !errors.Is(err, errBoom) {
		t.Errorf("after %d tries: %v", tries, err)
	}
}

func TestCheckTail(t *testing.T) {
	content := bytes.Repeat([]byte{1, 2, 3}, 1000)
	c := transfer.Checkpoint{Offset: 3000, Tail: []transfer.Stretch{{Off: 0, Len: 3000, CRC: 0xFFFFFFFF}}}
	if err := c.CheckTail(t.Context(), bytes.NewReader(content)); !errors.Is(err, transfer.ErrTail) {
		t.Errorf("wrong sum: %v", err)
	}
	for _, s := range []transfer.Stretch{{Off: -1, Len: 1}, {Off: 2999, Len: 2}, {Off: 0, Len: 1 << 40}, {Off: 1, Len: -1}} {
		c.Tail[0] = s
		if err := c.CheckTail(t.Context(), bytes.NewReader(content)); !errors.Is(err, transfer.ErrTail) {
			t.Errorf("%+v: %v", s, err)
		}
	}
}

// TestStopWhileFinishing checks that a target which is complete and durable is
// published, although the copy is stopped.
func TestStopWhileFinishing(t *testing.T) {
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 1<<20)}
	m := &sinktest.Memory{}
	stop, cancel := context.WithCancelCause(t.Context())
	m.Before = func(_ context.Context, c sinktest.Call) error {
		if c.Op == sinktest.OpFinish {
			cancel(errSignal)
		}
		return nil
	}
	var s shelf
	_, err := transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), plan(t, src), transfer.Options{Stop: stop, Keep: s.keep})
	if _, published := m.Published(); err != nil || !published {
		t.Errorf("published %v: %v", published, err)
	}
}

// TestEndWhileFinished checks that a target which cannot be published is kept with a
// checkpoint, possibly that of the beginning.
func TestEndWhileFinished(t *testing.T) {
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 1<<20)}
	m := &sinktest.Memory{}
	ctx, cancel := context.WithCancelCause(t.Context())
	dst, err := m.Create(ctx, src.Size(), sink.Options{})
	if err != nil {
		t.Fatal(err)
	}
	m.Before = func(_ context.Context, c sinktest.Call) error {
		if c.Op == sinktest.OpFinish {
			cancel(errSignal)
		}
		return nil
	}
	var s shelf
	_, err = transfer.Copy(ctx, src, dst, plan(t, src), transfer.Options{Keep: s.keep})
	if !errors.As(err, new(*transfer.ResumableError)) || len(s.kept) == 0 {
		t.Errorf("%d checkpoints: %v", len(s.kept), err)
	}
}
