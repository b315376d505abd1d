package transfer_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// fault makes calls of a copy fail after it was armed.
type fault struct {
	where string
	err   error
	ready chan struct{} // closed when the fault is armed
	once  sync.Once
}

// arm makes calls fail from now on.
func (f *fault) arm() { f.once.Do(func() { close(f.ready) }) }

// at returns the error of the call named where. If late is true, it waits until the
// fault is armed.
func (f *fault) at(where string, late bool) error {
	if where != f.where {
		return nil
	}
	if late {
		<-f.ready
	}
	select {
	case <-f.ready:
		return f.err
	default:
		return nil
	}
}

// faultyDisk is a source whose calls can fail.
type faultyDisk struct {
	*sourcetest.Memory
	f       *fault
	buffers int
}

func (d *faultyDisk) Buffer(_ context.Context, n int) ([]byte, func(), error) {
	d.buffers++
	if err := d.f.at("buffer", d.buffers == 3); err != nil {
		return nil, nil, err
	}
	return make([]byte, n), func() {}, nil
}

func (d *faultyDisk) Identity(context.Context) (string, string, error) {
	return "disk", "snapshot", d.f.at("identity", false)
}

// countedDisk is a faultyDisk that is source.Counted: it has retried before it fails.
type countedDisk struct{ *faultyDisk }

func (countedDisk) Stats() source.Stats { return source.Stats{} }

// errPlain is an error that says nothing about whether a later run meets it.
var errPlain = errors.New("boom")

// failure is a case of TestFailuresKeepWork.
type failure struct {
	where      string // the call that fails
	ofSource   bool   // the call is one of the source
	name       string // of the error
	err        error
	checkpoint string // which checkpoints exist: "none", "of this run", "of an earlier run"
	counted    bool   // the source is source.Counted
	hold       bool   // Options.Hold
}

func (c *failure) String() string {
	return fmt.Sprintf("%s/%s/checkpoint %s/counted %v/hold %v", c.where, c.name, c.checkpoint, c.counted, c.hold)
}

// TestFailuresKeepWork checks that a copy that fails keeps its work by one rule,
// whichever call fails. If a checkpoint exists, every error keeps the work, except a
// source that changed and a target that has its final name already. Without a
// checkpoint, only errors that a later run may not meet keep it. With Options.Hold and a
// checkpoint, a source that changed keeps the target too.
func TestFailuresKeepWork(t *testing.T) {
	places := map[string]bool{ // whether an error there is one of the source
		"read": true, "buffer": true, "extents": true, "identity": true,
		"write": false, "zero": false, "checkpoint": false, "sync": false, "finish": false, "publish": false,
		"journal": false, "reopening": false,
	}
	errs := []struct {
		name string
		err  error
	}{
		{"plain", errPlain}, {"permanent", source.Permanent(errPlain)},
		{"refused reopening", source.Permanent(fmt.Errorf("%w: %w", source.ErrReopen, errPlain))},
		{"full", syscall.ENOSPC}, {"quota", syscall.EDQUOT}, {"lost", sink.ErrLost}, {"changed", source.Changed(errPlain)},
		{"other disk", fmt.Errorf("%w: %w", source.ErrReopen, source.Changed(errPlain))}, {"EIO", syscall.EIO}, {"EROFS", syscall.EROFS},
		{"elsewhere", sink.ErrElsewhere}, {"unsynced", sink.ErrUnsynced},
	}
	for where, ofSource := range places {
		failed := 0
		for _, e := range errs {
			for _, checkpoint := range []string{"none", "of this run", "of an earlier run"} {
				for _, counted := range []bool{false, true} {
					for _, hold := range []bool{false, true} {
						c := &failure{where, ofSource, e.name, e.err, checkpoint, counted, hold}
						if c.run(t) {
							failed++
						}
					}
				}
			}
		}
		if failed < len(errs) {
			t.Errorf("%s: only %d copies failed", where, failed)
		}
	}
}

// run makes the copy of a case and checks what is left. It reports whether the copy
// failed.
func (c *failure) run(t *testing.T) (failed bool) {
	const request = 64 << 10
	f := &fault{where: c.where, err: c.err, ready: make(chan struct{})}
	m := &sinktest.Memory{Unit: 512}
	memory := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 8*request)}
	// A hole in the middle, so that the target gets zeros too.
	clear(memory.Bytes[6*request : 7*request])
	memory.ExtentList = []source.Extent{{Len: 6 * request}, {Off: 6 * request, Len: request, Kind: source.Zero}, {Off: 7 * request, Len: request}}
	disk := &faultyDisk{Memory: memory, f: f}
	var src source.Disk = disk
	if c.counted {
		src = countedDisk{disk}
	}
	p, err := transfer.NewPlanWithin(t.Context(), src, -1, new(progress.Counters)) // the copy queries the extents
	if err != nil {
		t.Fatal(err)
	}
	var s shelf
	o := transfer.Options{RequestSize: request, Requests: 1, Interval: time.Hour, Hold: c.hold}
	so := sink.Options{}
	if c.checkpoint == "of an earlier run" {
		so, o.Resume = earlier(t, m, memory, p, &s, request)
	}
	if c.checkpoint == "of this run" || c.where == "reopening" || c.where == "sync" || c.where == "checkpoint" || c.where == "journal" {
		o.Interval = 1
	}
	o.Keep = c.keeper(f, &s)
	memory.OnRead = func(off int64, _ int) error { return f.at("read", off == 4*request) }
	memory.OnExtent = func(e source.Extent) error { return f.at("extents", e.Off == 6*request) }
	m.Before = c.beforeCall(f, request)
	if c.where == "reopening" {
		o.Lost = source.RetryOptions{Backoff: func(int) time.Duration { return 0 }, Retries: 1}
		o.Reopen = func(context.Context, []byte, int64) (sink.Disk, error) { return nil, c.err }
	}
	_, err = transfer.Copy(t.Context(), src, create(t, m, memory.Size(), so), p, o)
	ended(t, m)
	if err == nil {
		// Whether a checkpoint is due after the fault is armed depends on the goroutines.
		// A copy with Options.Hold does not call Publish.
		if c.where != "sync" && c.where != "checkpoint" && c.where != "journal" && !(c.where == "publish" && c.hold) {
			t.Errorf("%s: no error", c)
		}
		return false
	}
	c.check(t, err, &s, m)
	return true
}

// keeper returns the function Options.Keep of the copy. The first checkpoint of the
// run arms the fault if the case wants one.
func (c *failure) keeper(f *fault, s *shelf) func(transfer.Checkpoint) error {
	keep := s.keep
	return func(checkpoint transfer.Checkpoint) error {
		if err := f.at("journal", false); err != nil {
			return err
		}
		err := keep(checkpoint)
		if c.checkpoint == "of this run" {
			f.arm()
		}
		return err
	}
}

// beforeCall returns the function that runs before each call of the target.
func (c *failure) beforeCall(f *fault, request int64) func(context.Context, sinktest.Call) error {
	writes := 0
	return func(_ context.Context, call sinktest.Call) error {
		if call.Op == sinktest.OpWrite {
			// The first piece is done when the second is written.
			if writes++; writes == 2 && c.checkpoint == "none" || c.checkpoint == "of an earlier run" {
				f.arm()
			}
			if c.where == "reopening" && call.Off >= 4*request {
				<-f.ready
				return sink.ErrLost
			}
		}
		late := call.Off == 3*request && call.Op == sinktest.OpWrite || call.Op == sinktest.OpZero
		return f.at(string(call.Op), late)
	}
}

// check checks the error of the copy, and whether the work is kept.
func (c *failure) check(t *testing.T, err error, s *shelf, m *sinktest.Memory) {
	existed := len(s.kept) > 0
	var resumable *transfer.ResumableError
	kept := errors.As(err, &resumable)
	want := existed
	switch {
	case errors.Is(err, transfer.ErrSourceChanged), errors.Is(err, sink.ErrElsewhere), errors.Is(err, sink.ErrUnsynced):
		want = false
	case existed:
	case errors.Is(err, syscall.ENOSPC), errors.Is(err, syscall.EDQUOT), errors.Is(err, sink.ErrLost):
		want = true
	default:
		want = c.ofSource && c.counted
	}
	if !errors.Is(err, c.err) && !errors.Is(err, errPlain) {
		t.Errorf("%s: the error is lost: %v", c, err)
	}
	if c.checkpoint != "none" && !existed {
		t.Errorf("%s: there was no checkpoint", c)
	}
	// Abort does not remove the work of an earlier run, and a lost target is suspended.
	left := len(m.Leftovers()) > 0
	if c.hold && existed && errors.Is(err, transfer.ErrSourceChanged) {
		if kept || !left {
			t.Errorf("%s: resumable %v, left %v: %v", c, kept, m.Leftovers(), err)
		}
		return
	}
	if kept != want || left != (kept || c.checkpoint == "of an earlier run" || c.where == "reopening") {
		t.Errorf("%s: resumable %v, want %v; left %v: %v", c, kept, want, m.Leftovers(), err)
	}
	if kept && existed && resumable.Offset != s.last().Offset {
		t.Errorf("%s: resumes at %d, and the last checkpoint is at %d", c, resumable.Offset, s.last().Offset)
	}
}

// earlier makes a copy that is stopped after some requests, and returns the options
// and the checkpoint for the next copy.
func earlier(t *testing.T, m *sinktest.Memory, src *sourcetest.Memory, p *transfer.Plan, s *shelf, request int) (sink.Options, *transfer.Checkpoint) {
	t.Helper()
	stop, cancel := context.WithCancelCause(t.Context())
	src.OnRead = func(int64, int) error {
		cancel(errSignal)
		return nil
	}
	_, err := transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), p, transfer.Options{
		RequestSize: request, Requests: 1, Interval: time.Hour, Stop: stop, Keep: s.keep,
	})
	if !errors.Is(err, errSignal) || len(s.kept) == 0 {
		t.Fatalf("the earlier copy ended with %v", err)
	}
	last := *s.last()
	return sink.Options{State: last.State, Resume: last.Offset}, &last
}

// TestStopWhileSourceHangs checks that a copy which is stopped while the source hangs
// takes a checkpoint of everything it copied. The context of the source ends before
// that of the target.
func TestStopWhileSourceHangs(t *testing.T) {
	const request = 1 << 20
	reading, stopReading := context.WithCancelCause(t.Context())
	stop, cancel := context.WithCancelCause(t.Context())
	src := &sourcetest.Memory{Context: reading, Bytes: bytes.Repeat([]byte{1}, 8*request)}
	m := &sinktest.Memory{}
	src.OnRead = func(off int64, _ int) error {
		if off < 4*request {
			return nil
		}
		<-reading.Done()
		return context.Cause(reading)
	}
	m.Before = func(_ context.Context, c sinktest.Call) error {
		if c.Op == sinktest.OpWrite && c.Off == 3*request {
			cancel(errSignal)
			stopReading(errSignal) // the grace period has ended
		}
		return nil
	}
	var s shelf
	_, err := transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), plan(t, src),
		transfer.Options{RequestSize: request, Requests: 1, Stop: stop, Keep: s.keep, Interval: time.Hour})
	ended(t, m)
	var resumable *transfer.ResumableError
	if !errors.As(err, &resumable) || resumable.Offset != 4*request || !strings.HasPrefix(err.Error(), errSignal.Error()) {
		t.Errorf("%d checkpoints: %v", len(s.kept), err)
	}
}

// TestMismatchWhoseSearchFails checks that a mismatch is reported as such if the
// search for the first difference fails, and that the target is closed and kept.
func TestMismatchWhoseSearchFails(t *testing.T) {
	src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 1<<20)}
	m := &sinktest.Memory{}
	m.Before = func(_ context.Context, c sinktest.Call) error {
		if c.Op == sinktest.OpReopen {
			src.OnRead = func(int64, int) error { return errBoom }
		}
		return nil
	}
	dst := create(t, m, src.Size(), sink.Options{})
	corrupt := &corrupting{dst}
	_, err := transfer.Copy(t.Context(), src, corrupt, plan(t, src), transfer.Options{Verify: true})
	ended(t, m)
	if !errors.As(err, new(*transfer.MismatchError)) || !strings.Contains(err.Error(), errBoom.Error()) || errors.Is(err, errBoom) {
		t.Errorf("%v", err)
	}
	if len(m.Leftovers()) == 0 {
		t.Error("the evidence was removed")
	}
}

// corrupting is a target that changes the first byte of each write.
type corrupting struct{ sink.Disk }

func (c *corrupting) WriteAt(p []byte, off int64) (int, error) {
	q := slices.Clone(p)
	q[0] ^= 1
	return c.Disk.WriteAt(q, off)
}

func (c *corrupting) Reopen(ctx context.Context) (source.Disk, error) {
	return c.Disk.(sink.Verifiable).Reopen(ctx)
}

// TestLostTargetPatience checks that a lost target is given up within a second of the
// timeout, whether it is lost again and again, cannot be opened, or hangs.
func TestLostTargetPatience(t *testing.T) {
	const patience = 6 * time.Second
	for _, how := range []string{"lost again", "refused", "hangs", "stopped while it hangs"} {
		t.Run(how, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				src := &sourcetest.Memory{Bytes: bytes.Repeat([]byte{1}, 1<<20)}
				m := &sinktest.Memory{}
				m.Before = func(_ context.Context, c sinktest.Call) error {
					if c.Op == sinktest.OpWrite {
						return sink.ErrLost
					}
					return nil
				}
				stop, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				want := patience
				if how == "stopped while it hangs" {
					want = 2 * time.Second
					time.AfterFunc(want, func() { cancel(errSignal) })
				}
				var s shelf
				start := time.Now()
				_, err := transfer.Copy(t.Context(), src, create(t, m, src.Size(), sink.Options{}), plan(t, src), transfer.Options{
					Keep: s.keep, Stop: stop, Lost: source.RetryOptions{Retries: -1, Timeout: patience},
					Reopen: func(ctx context.Context, state []byte, resume int64) (sink.Disk, error) {
						switch how {
						case "lost again":
							return m.Create(ctx, src.Size(), sink.Options{State: state, Resume: resume})
						case "refused":
							return nil, errBoom
						}
						<-ctx.Done()
						return nil, context.Cause(ctx)
					},
				})
				ended(t, m)
				if !errors.As(err, new(*transfer.ResumableError)) || errors.Is(err, errSignal) != (want != patience) {
					t.Errorf("%v", err)
				}
				if took := time.Since(start); took < want-time.Second || took > want+time.Second {
					t.Errorf("ended after %v, want %v", took, want)
				}
			})
		})
	}
}
