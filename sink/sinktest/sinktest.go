// Package sinktest holds the conformance suite of sink.Disk, and a sink in
// memory for the tests of what writes to one.
package sinktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// Target is a place where one disk can be written: a path, a device, a server.
type Target interface {
	Create(ctx context.Context, size int64, o sink.Options) (sink.Disk, error)
	// Published returns the content, decoded, of what has the target's final
	// name, and whether there is something. It may be longer than the disk
	// where the target is. Of an InPlace target it is called after Publish
	// only.
	Published() ([]byte, bool)
	// Leftovers names what lies beside the published target: partial files.
	Leftovers() []string
}

// Breaker is a Target that can make the next write or zeroing of its open disk
// fail with err.
type Breaker interface{ Break(err error) }

// Config says what the sink under test can do.
type Config struct {
	// New returns a new place for each disk, of MaxSize bytes or more. Where
	// the target has content before, fill it with other bytes than zeros. It
	// is called when the disks before have ended, so that a device may serve
	// for all.
	New func(t testing.TB) Target
	// Unit is what each disk's Unit must return.
	Unit int64
	// Multiple is what sizes of disks must be a multiple of; 0 means 1.
	Multiple int64
	// InPlace: the target exists before, is written under its final name, and
	// stays when the run fails. Block devices, NBD.
	InPlace bool
	// Once: the disk takes no Checkpoint, and can't be resumed.
	Once bool
	// Stream: a target InPlace whose disks are Once.
	Stream bool
	// Discards: an InPlace target that keeps nothing.
	Discards bool
	// Backing: SameAt leaves ranges to Options.Backing.
	Backing bool
}

// MaxSize is the size in bytes of the largest disk that the suite writes to a
// target of that unit.
func MaxSize(unit int64) int64 { return (pieces + 1) * max(unit, 64<<10) }

// pieces is how many pieces the suite cuts a disk into, a shorter last one aside.
const pieces = 12

// Test runs the suite.
func Test(t *testing.T, c Config) {
	c.Multiple = max(c.Multiple, 1)
	c.Once = c.Once || c.Stream
	c.InPlace = c.InPlace || c.Stream || c.Discards
	for _, test := range []struct {
		name string
		run  func(*testing.T, Config)
		need bool
	}{
		{"InOrder", testInOrder, true},
		{"AnyOrder", testAnyOrder, true},
		{"AllZero", testAllZero, true},
		{"UnknownSize", testUnknownSize, true},
		{"SameAt", testSameAt, true},
		{"Resume", testResume, !c.Once && !c.Discards},
		{"ResumeAtEnd", testResumeAtEnd, !c.Once && !c.Discards},
		{"SuspendFinished", testSuspendFinished, !c.InPlace},
		{"CheckpointOfOnce", testCheckpointOfOnce, c.Once},
		{"Abort", testAbort, true},
		{"Order", testOrder, true},
		{"Error", testError, true},
		{"BadRange", testBadRange, true},
		{"Closed", testClosed, true},
		{"Context", testContext, true},
	} {
		if test.need {
			t.Run(test.name, func(t *testing.T) { test.run(t, c) })
		}
	}
}

// piece is one call of the suite.
type piece struct {
	off, end int64
	zero     bool
}

// plan is a disk to write: its content and how it is cut.
type plan struct {
	want   []byte
	pieces []piece
}

func (p plan) size() int64 { return int64(len(p.want)) }

// newPlan cuts a disk that ends in the middle of a unit where that can be: at
// odd places where the unit allows it, with each third piece zeros.
func (c Config) newPlan() plan {
	step := max(c.Unit, 4096)
	if c.Unit == 1 && c.Multiple == 1 {
		step += 3
	}
	tail := int64(777)
	tail -= tail % c.Multiple
	if tail == 0 {
		tail = c.Multiple
	}
	var p plan
	size := pieces*step + tail
	random := rand.NewChaCha8([32]byte{10})
	p.want = make([]byte, size)
	random.Read(p.want)
	// Pieces of one, two and three steps by turns.
	for off, i := int64(0), int64(0); off < size; i++ {
		end := min(off+(i%3+1)*step, size)
		if end > size-step { // the short last piece is one of its own
			end = size - tail
			if off == end {
				end = size
			}
		}
		s := piece{off, end, i%3 == 1}
		if s.zero {
			clear(p.want[off:end])
		}
		p.pieces = append(p.pieces, s)
		off = end
	}
	return p
}

// put writes one piece as an engine does.
func (p plan) put(ctx context.Context, d sink.Disk, s piece) error {
	if !s.zero {
		n, err := d.WriteAt(p.want[s.off:s.end], s.off)
		if err == nil && int64(n) != s.end-s.off {
			err = fmt.Errorf("WriteAt of %d bytes at %d = %d, nil", s.end-s.off, s.off, n)
		}
		return err
	}
	if z, ok := sink.Ability[sink.Zeroed](d); ok && z.ZeroedFrom(s.off) {
		return nil
	}
	return d.ZeroAt(ctx, s.off, s.end-s.off)
}

func (p plan) putAll(t *testing.T, d sink.Disk, pieces []piece) {
	t.Helper()
	for _, s := range pieces {
		if err := p.put(t.Context(), d, s); err != nil {
			t.Fatalf("%+v: %v", s, err)
		}
	}
}

func (c Config) create(t *testing.T, target Target, size int64, o sink.Options) sink.Disk {
	t.Helper()
	return c.createIn(t, t.Context(), target, size, o)
}

func (c Config) createIn(t *testing.T, ctx context.Context, target Target, size int64, o sink.Options) sink.Disk {
	t.Helper()
	d, err := target.Create(ctx, size, o)
	if err != nil {
		t.Fatalf("Create(%d, %+v): %v", size, o, err)
	}
	t.Cleanup(func() { d.Abort() })
	if d.Unit() != c.Unit {
		t.Fatalf("Unit() = %d, want %d", d.Unit(), c.Unit)
	}
	if p, ok := sink.Ability[sink.Parallel](d); ok && p.MaxParallel() < 1 {
		t.Fatalf("MaxParallel() = %d", p.MaxParallel())
	}
	return d
}

// finish ends a disk as an engine does, and checks the target at each step.
func (c Config) finish(t *testing.T, target Target, d sink.Disk, want []byte) {
	t.Helper()
	c.unpublished(t, target, "before Finish")
	if err := d.Finish(t.Context()); err != nil {
		t.Fatalf("Finish: %v", err)
	}
	c.unpublished(t, target, "before Publish")
	if v, ok := sink.Ability[sink.Verifiable](d); ok {
		r, err := v.Reopen(t.Context())
		if err != nil {
			t.Fatalf("Reopen: %v", err)
		}
		got := make([]byte, len(want)+1)
		n, err := r.ReadAt(got, 0)
		if r.Size() != int64(len(want)) || n != len(want) || err != io.EOF {
			t.Errorf("Reopen: size %d, ReadAt of one byte more = %d, %v; want %d, EOF", r.Size(), n, err, len(want))
		}
		diff(t, "Reopen", got[:n], want)
		if err := r.Close(); err != nil {
			t.Errorf("Reopen, Close: %v", err)
		}
	}
	if err := d.Publish(t.Context()); err != nil {
		t.Fatalf("Publish: %v", err)
	}
	if err := d.Abort(); err != nil {
		t.Errorf("Abort after Publish: %v", err)
	}
	c.check(t, target, want)
}

// unpublished checks that nothing has the final name yet.
func (c Config) unpublished(t *testing.T, target Target, when string) {
	t.Helper()
	if c.InPlace {
		return
	}
	if _, ok := target.Published(); ok {
		t.Errorf("there is a published target %s", when)
	}
}

// check compares the published target.
func (c Config) check(t *testing.T, target Target, want []byte) {
	t.Helper()
	if left := target.Leftovers(); len(left) > 0 {
		t.Errorf("left beside the published target: %q", left)
	}
	if c.Discards {
		return
	}
	got, ok := target.Published()
	if !ok {
		t.Fatal("there is no published target")
	}
	if c.InPlace && !c.Stream && len(got) > len(want) {
		got = got[:len(want)]
	}
	diff(t, "the published target", got, want)
}

func diff(t *testing.T, what string, got, want []byte) {
	t.Helper()
	if len(got) != len(want) {
		t.Errorf("%s has %d bytes, want %d", what, len(got), len(want))
	}
	if bytes.Equal(got, want) {
		return
	}
	for i := range min(len(got), len(want)) {
		if got[i] != want[i] {
			t.Errorf("%s differs first at byte %d of %d: %#x, want %#x", what, i, len(want), got[i], want[i])
			return
		}
	}
}

// nothing checks that no run has left anything.
func (c Config) nothing(t *testing.T, target Target) {
	t.Helper()
	c.unpublished(t, target, "after a run that failed")
	if left := target.Leftovers(); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

func testInOrder(t *testing.T, c Config) {
	p, target := c.newPlan(), c.New(t)
	d := c.create(t, target, p.size(), sink.Options{})
	p.putAll(t, d, p.pieces)
	c.finish(t, target, d, p.want)
}

func testAnyOrder(t *testing.T, c Config) {
	p, target := c.newPlan(), c.New(t)
	d := c.create(t, target, p.size(), sink.Options{})
	parallel, ok := sink.Ability[sink.Parallel](d)
	if !ok {
		t.Skip("the sink is sequential")
	}
	todo := make(chan piece, len(p.pieces))
	for _, i := range rand.New(rand.NewPCG(1, 2)).Perm(len(p.pieces)) {
		todo <- p.pieces[i]
	}
	close(todo)
	var writers sync.WaitGroup
	for range parallel.MaxParallel() {
		writers.Go(func() {
			for s := range todo {
				if err := p.put(t.Context(), d, s); err != nil {
					t.Errorf("%+v: %v", s, err)
				}
			}
		})
	}
	writers.Wait()
	c.finish(t, target, d, p.want)
}

func testAllZero(t *testing.T, c Config) {
	target, size := c.New(t), c.newPlan().size()
	d := c.create(t, target, size, sink.Options{})
	if err := d.ZeroAt(t.Context(), 0, size); err != nil {
		t.Fatal(err)
	}
	c.finish(t, target, d, make([]byte, size))
}

func testUnknownSize(t *testing.T, c Config) {
	p := c.newPlan()
	known := c.create(t, c.New(t), p.size(), sink.Options{})
	s, ok := sink.Ability[sink.Sizer](known)
	if !ok {
		t.Skip("the sink is no Sizer")
	}
	if err := s.SetSize(p.size()); err == nil {
		t.Error("SetSize of a disk whose size is known: no error")
	}
	known.Abort()
	if d, err := c.New(t).Create(t.Context(), sink.UnknownSize, sink.Options{}); errors.Is(err, errors.ErrUnsupported) {
		t.Skip(err) // not with these options
	} else if err == nil {
		d.Abort()
	}
	for _, end := range []int{len(p.pieces), len(p.pieces) - 1, 2, 0} { // after data, in a unit or not; after zeros; empty
		p := plan{p.want, p.pieces[:end]}
		p.want = p.want[:0]
		if end > 0 {
			p.want = p.want[:p.pieces[end-1].end]
		}
		target := c.New(t)
		d := c.create(t, target, sink.UnknownSize, sink.Options{})
		p.putAll(t, d, p.pieces)
		if err := d.(sink.Sizer).SetSize(p.size()); err != nil {
			t.Fatalf("SetSize(%d): %v", p.size(), err)
		}
		c.finish(t, target, d, p.want)
	}
	target := c.New(t)
	d := c.create(t, target, sink.UnknownSize, sink.Options{})
	p.putAll(t, d, p.pieces)
	if err := d.Finish(t.Context()); err == nil {
		t.Error("Finish before SetSize: no error")
	}
	d.Abort()
	c.nothing(t, target)
}

func testSameAt(t *testing.T, c Config) {
	p, target := c.newPlan(), c.New(t)
	if !c.Backing {
		d := c.create(t, target, p.size(), sink.Options{})
		if err := d.SameAt(t.Context(), 0, p.pieces[0].end); err == nil {
			t.Error("SameAt without a backing: no error")
		}
		return
	}
	d := c.create(t, target, p.size(), sink.Options{Backing: backing{p.want}})
	for i, s := range p.pieces {
		if i%2 == 0 {
			if err := d.SameAt(t.Context(), s.off, s.end-s.off); err != nil {
				t.Fatalf("SameAt %+v: %v", s, err)
			}
		} else {
			p.putAll(t, d, []piece{s})
		}
	}
	c.finish(t, target, d, p.want)
}

// backing is a source.Disk over the content that the suite writes.
type backing struct{ content []byte }

func (b backing) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(b.content).ReadAt(p, off)
}
func (b backing) Size() int64  { return int64(len(b.content)) }
func (b backing) Close() error { return nil }
func (b backing) Extents(_ context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return source.WholeData(off, length)
}

func testResume(t *testing.T, c Config) {
	full := c.newPlan()
	for at := 1; at < len(full.pieces)-1; at++ {
		p := plan{slices.Clone(full.want), full.pieces}
		target := c.New(t)
		off := p.pieces[at].off
		d := c.create(t, target, p.size(), sink.Options{})
		p.putAll(t, d, p.pieces[:at])
		state := c.checkpointBeside(t, d, off, func() {
			// What the first run writes above the checkpoint is stale.
			stale := bytes.Repeat([]byte{0xAA}, int(p.pieces[at+1].end-off))
			if _, err := d.WriteAt(stale, off); err != nil {
				t.Error(err)
			}
		})
		if err := d.Suspend(); err != nil {
			t.Fatalf("Suspend: %v", err)
		}
		if err := d.Abort(); err != nil {
			t.Errorf("Abort after Suspend: %v", err)
		}
		c.unpublished(t, target, "after Suspend")

		d = c.create(t, target, p.size(), sink.Options{State: state, Resume: off})
		// Zeros first, where the first run left stale bytes, then data.
		rest := slices.Clone(p.pieces[at:])
		split := rest[0]
		rest[0].zero = true
		if !split.zero {
			clear(p.want[split.off:split.end])
		}
		p.putAll(t, d, rest)
		c.finish(t, target, d, p.want)
		if t.Failed() {
			t.Fatalf("resumed at %d", off)
		}
	}
}

// checkpointBeside calls Checkpoint(off), and runs the function that it
// returns beside the calls that beside makes.
func (c Config) checkpointBeside(t *testing.T, d sink.Disk, off int64, beside func()) []byte {
	t.Helper()
	state, sync, err := d.Checkpoint(off)
	if err != nil {
		t.Fatalf("Checkpoint(%d): %v", off, err)
	}
	if state == nil {
		t.Errorf("Checkpoint(%d): the state is nil, which Options take for a new disk", off)
	}
	synced := make(chan error)
	go func() { synced <- sync(t.Context()) }()
	beside()
	if err := <-synced; err != nil {
		t.Fatalf("Checkpoint(%d), sync: %v", off, err)
	}
	return state
}

func testResumeAtEnd(t *testing.T, c Config) {
	p, target := c.newPlan(), c.New(t)
	d := c.create(t, target, p.size(), sink.Options{})
	p.putAll(t, d, p.pieces)
	state := c.checkpointBeside(t, d, p.size(), func() {})
	if err := d.Suspend(); err != nil {
		t.Fatal(err)
	}
	d = c.create(t, target, p.size(), sink.Options{State: state, Resume: p.size()})
	c.finish(t, target, d, p.want)
}

// A disk that was verified and found different is kept as evidence.
func testSuspendFinished(t *testing.T, c Config) {
	p, target := c.newPlan(), c.New(t)
	d := c.create(t, target, p.size(), sink.Options{})
	p.putAll(t, d, p.pieces)
	if err := d.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := d.Suspend(); err != nil {
		t.Fatal(err)
	}
	c.unpublished(t, target, "after Suspend")
	if len(target.Leftovers()) == 0 {
		t.Error("nothing was kept")
	}
}

func testCheckpointOfOnce(t *testing.T, c Config) {
	p, target := c.newPlan(), c.New(t)
	d := c.create(t, target, p.size(), sink.Options{})
	p.putAll(t, d, p.pieces[:1])
	if _, _, err := d.Checkpoint(p.pieces[0].end); !errors.Is(err, errors.ErrUnsupported) {
		t.Errorf("Checkpoint: %v, want an errors.ErrUnsupported", err)
	}
}

func testAbort(t *testing.T, c Config) {
	p := c.newPlan()
	for _, stage := range []string{"created", "half written", "suspended", "finished"} {
		t.Run(stage, func(t *testing.T) {
			target := c.New(t)
			d := c.create(t, target, p.size(), sink.Options{})
			switch stage {
			case "half written":
				p.putAll(t, d, p.pieces[:len(p.pieces)/2])
			case "suspended":
				p.putAll(t, d, p.pieces[:1])
				if err := d.Suspend(); err != nil {
					t.Fatal(err)
				}
			case "finished":
				p.putAll(t, d, p.pieces)
				if err := d.Finish(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			before := target.Leftovers()
			for range 2 {
				if err := d.Abort(); err != nil {
					t.Errorf("Abort: %v", err)
				}
			}
			if stage == "suspended" {
				if after := target.Leftovers(); !slices.Equal(before, after) {
					t.Errorf("Abort after Suspend: left before %q, after %q", before, after)
				}
				return
			}
			c.nothing(t, target)
		})
	}
}

func testOrder(t *testing.T, c Config) {
	p, target := c.newPlan(), c.New(t)
	d := c.create(t, target, p.size(), sink.Options{})
	p.putAll(t, d, p.pieces)
	if err := d.Publish(t.Context()); err == nil || errors.Is(err, sink.ErrClosed) {
		t.Errorf("Publish before Finish: %v", err)
	}
	d.Abort()
	c.nothing(t, target)

	target = c.New(t)
	d = c.create(t, target, p.size(), sink.Options{})
	p.putAll(t, d, p.pieces)
	if err := d.Finish(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := d.WriteAt(p.want[:p.pieces[0].end], 0); err == nil {
		t.Error("WriteAt after Finish: no error")
	}
}

func testError(t *testing.T, c Config) {
	p := c.newPlan()
	boom := errors.New("boom")
	for _, zero := range []bool{false, true} {
		target := c.New(t)
		breaker, ok := target.(Breaker)
		if !ok {
			t.Skip("the target can't be made to fail")
		}
		d := c.create(t, target, p.size(), sink.Options{})
		if _, ok := sink.Ability[sink.Zeroed](d); ok && zero {
			continue // there is nothing to do that could fail
		}
		p.putAll(t, d, p.pieces[:2])
		breaker.Break(boom)
		s := p.pieces[2]
		s.zero = zero
		if err := p.put(t.Context(), d, s); !errors.Is(err, boom) {
			t.Fatalf("a call that fails (zero: %v): %v, want %v", zero, err, boom)
		}
		c.allFail(t, d, p, func(err error) error {
			if errors.Is(err, sink.ErrClosed) || err == nil {
				return errors.New("it is not an error of the failure")
			}
			return nil
		})
		if err := d.Abort(); err != nil {
			t.Errorf("Abort after an error: %v", err)
		}
		c.nothing(t, target)
	}
}

// allFail makes every call but those that end the disk, and holds its error
// against check.
func (c Config) allFail(t *testing.T, d sink.Disk, p plan, check func(error) error) {
	t.Helper()
	ctx := context.WithoutCancel(t.Context())
	first := p.pieces[0]
	_, writeErr := d.WriteAt(p.want[first.off:first.end], first.off)
	_, _, checkpointErr := d.Checkpoint(0)
	for _, call := range []struct {
		name string
		err  error
	}{
		{"WriteAt", writeErr},
		{"ZeroAt", d.ZeroAt(ctx, first.off, first.end)},
		{"SameAt", d.SameAt(ctx, first.off, first.end)},
		{"Checkpoint", checkpointErr},
		{"Finish", d.Finish(ctx)},
		{"Publish", d.Publish(ctx)},
	} {
		if err := check(call.err); err != nil {
			t.Errorf("%s: %v; %v", call.name, call.err, err)
		}
	}
}

func testBadRange(t *testing.T, c Config) {
	p := c.newPlan()
	size := p.size()
	for _, bad := range []struct {
		off, n    int64
		unit      bool // only wrong where a unit is more than a byte
		zeroNever bool // can't be made as a write
	}{
		{off: -c.Unit, n: c.Unit},
		{off: 0, n: size + c.Unit},
		{off: size - size%c.Unit, n: c.Unit + size%c.Unit},
		{off: (size/c.Unit + 2) * c.Unit, n: c.Unit},
		{off: math.MaxInt64 - c.Unit + 1, n: c.Unit},
		{off: 0, n: c.Unit - 1, unit: true},
		{off: 1, n: c.Unit - 1, unit: true},
		{off: 0, n: c.Unit + 1, unit: true},
		{off: 0, n: -c.Unit, zeroNever: true},
	} {
		if bad.unit && c.Unit == 1 {
			continue
		}
		target := c.New(t)
		d := c.create(t, target, size, sink.Options{})
		if err := d.ZeroAt(t.Context(), bad.off, bad.n); err == nil {
			t.Errorf("ZeroAt(%d, %d) in a disk of %d bytes, unit %d: no error", bad.off, bad.n, size, c.Unit)
		}
		d.Abort()
		if bad.zeroNever {
			continue
		}
		d = c.create(t, c.New(t), size, sink.Options{})
		if n, err := d.WriteAt(make([]byte, bad.n), bad.off); err == nil {
			t.Errorf("WriteAt(%d, %d) in a disk of %d bytes, unit %d = %d, nil", bad.off, bad.n, size, c.Unit, n)
		}
		d.Abort()
		c.nothing(t, target)
	}
}

func testClosed(t *testing.T, c Config) {
	p := c.newPlan()
	for _, end := range []string{"Publish", "Suspend", "Abort"} {
		d := c.create(t, c.New(t), p.size(), sink.Options{})
		var err error
		switch end {
		case "Publish":
			p.putAll(t, d, p.pieces)
			if err = d.Finish(t.Context()); err == nil {
				err = d.Publish(t.Context())
			}
		case "Suspend":
			err = d.Suspend()
		case "Abort":
			err = d.Abort()
		}
		if err != nil {
			t.Fatalf("%s: %v", end, err)
		}
		c.allFail(t, d, p, func(err error) error {
			if !errors.Is(err, sink.ErrClosed) {
				return fmt.Errorf("after %s it must be sink.ErrClosed", end)
			}
			return nil
		})
		if err := d.Suspend(); !errors.Is(err, sink.ErrClosed) {
			t.Errorf("Suspend after %s: %v", end, err)
		}
		if v, ok := sink.Ability[sink.Verifiable](d); ok {
			if r, err := v.Reopen(t.Context()); !errors.Is(err, sink.ErrClosed) {
				t.Errorf("Reopen after %s: %v, %v", end, r, err)
			}
		}
		if err := d.Abort(); err != nil {
			t.Errorf("Abort after %s: %v", end, err)
		}
	}
}

func testContext(t *testing.T, c Config) {
	p := c.newPlan()
	why := errors.New("the operator said stop")
	isWhy := func(err error) error {
		if !errors.Is(err, why) {
			return fmt.Errorf("it must be the context's cause")
		}
		return nil
	}
	for _, stage := range []string{"writing", "finished"} {
		target := c.New(t)
		ctx, stop := context.WithCancelCause(t.Context())
		d := c.createIn(t, ctx, target, p.size(), sink.Options{})
		if stage == "finished" {
			p.putAll(t, d, p.pieces)
			if err := d.Finish(t.Context()); err != nil {
				t.Fatal(err)
			}
		} else {
			p.putAll(t, d, p.pieces[:2])
		}
		stop(why)
		if stage == "finished" {
			if err := d.Publish(t.Context()); !errors.Is(err, why) {
				t.Errorf("Publish after the context's end: %v", err)
			}
		} else {
			c.allFail(t, d, p, isWhy)
		}
		if err := d.Abort(); err != nil {
			t.Errorf("Abort after the context's end: %v", err)
		}
		c.nothing(t, target)
	}

	// The context of one call, not of the disk.
	target := c.New(t)
	d := c.create(t, target, p.size(), sink.Options{})
	ctx, stop := context.WithCancelCause(t.Context())
	stop(why)
	if err := d.Finish(ctx); !errors.Is(err, why) {
		t.Errorf("Finish with a context that has ended: %v", err)
	}
	d.Abort()
	c.nothing(t, target)
}
