// Package sinktest contains two things for tests. The function [Test] runs the
// conformance suite of sink.Disk, and every package that implements a sink calls
// it. The type [Memory] is a sink in memory, for testing code that writes to
// sinks.
package sinktest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"sync"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

// Target is a place to which one disk can be written: a path, a device, a server.
type Target interface {
	Create(ctx context.Context, size int64, o sink.Options) (sink.Disk, error)
	// Published returns the decoded content of the file under the target's
	// final name, and whether there is such a file. Content of an InPlace
	// target may be longer than the disk. For InPlace targets Published is
	// called only after Publish.
	Published() ([]byte, bool)
	// Leftovers returns the names of partial files that a run has left beside
	// the published target.
	Leftovers() []string
}

// Breaker is a Target that can make the next call of WriteAt or ZeroAt of its
// open disk fail with a given error.
type Breaker interface{ Break(err error) }

// Config describes the abilities of the sink under test.
type Config struct {
	// New returns a new target for a disk of up to MaxSize bytes. Some targets
	// exist before a disk is written to them (see InPlace). New fills such a
	// target with nonzero bytes. The suite calls New only after all earlier
	// disks have ended, so that New may return the same device for all tests.
	New func(t testing.TB) Target
	// Unit is the number that the method Unit of each disk should return.
	Unit int64
	// Multiple is a number of bytes. The suite creates only disks whose size is
	// a multiple of it. The value 0 stands for 1.
	Multiple int64
	// InPlace means that the target exists before the disk is created, is written
	// under its final name, and is not removed if the run fails. Block devices and NBD
	// exports are such targets.
	InPlace bool
	// Once means that the disk cannot be checkpointed or resumed.
	Once bool
	// Stream means that the target is a stream. It implies InPlace and Once.
	Stream bool
	// Discards means that the target stores no data. It implies InPlace.
	Discards bool
	// Backing means that disks support SameAt with Options.Backing.
	Backing bool
}

// MaxSize returns the size in bytes of the largest disk that the suite writes
// to a sink whose Config has the given Unit.
func MaxSize(unit int64) int64 { return (pieces + 1) * max(unit, 64<<10) }

// The constant pieces determines the size of the disks of the suite. The size of
// a disk is the length of its first piece multiplied by this constant, plus the
// length of the short piece at its end (see newPlan).
const pieces = 12

// Test runs the conformance suite with the sink that the Config describes.
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

// piece is the range of one write call.
type piece struct {
	off, end int64
	zero     bool
}

// plan describes a disk to write: its content and the pieces in which it is
// written.
type plan struct {
	want   []byte
	pieces []piece
}

func (p plan) size() int64 { return int64(len(p.want)) }

// newPlan returns a plan in which every third piece consists of zeros. If the
// Config does not require an alignment, the pieces begin at unaligned offsets.
// The last piece of the disk is short, and need not be a whole unit.
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
	// The variable step is the length of the first piece. The second piece is
	// twice as long as the first one, and the third piece three times as long.
	// The lengths of all further pieces repeat this pattern.
	for off, i := int64(0), int64(0); off < size; i++ {
		end := min(off+(i%3+1)*step, size)
		if end > size-step { // the short end of the disk is a piece of its own
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

// The method put writes one piece in the same way as package transfer does.
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

// The method finish calls Finish and Publish of a disk in the same way as
// package transfer, and checks the target after each of these calls.
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

// The method unpublished checks that there is no content under the final name
// yet.
func (c Config) unpublished(t *testing.T, target Target, when string) {
	t.Helper()
	if c.InPlace {
		return
	}
	if _, ok := target.Published(); ok {
		t.Errorf("there is a published target %s", when)
	}
}

// The method check compares the content of the published target with the content
// that it should have, and checks that no partial files are left.
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

// checkNothingLeft checks the target after a run that failed. There must be no
// published content and no partial files.
func (c Config) checkNothingLeft(t *testing.T, target Target) {
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
		t.Skip(err) // unsupported with these options
	} else if err == nil {
		d.Abort()
	}
	for _, end := range []int{len(p.pieces), len(p.pieces) - 1, 2, 0} { // the disk ends after data, within a unit or not, or after zeros, or is empty
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
	c.checkNothingLeft(t, target)
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

// backing is a source.Disk with the content that the suite writes.
type backing struct{ content []byte }

func (b backing) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(b.content).ReadAt(p, off)
}
func (b backing) Size() int64  { return int64(len(b.content)) }
func (b backing) Close() error { return nil }
func (b backing) Extents(_ context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return source.WholeData(off, length)
}
