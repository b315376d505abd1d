package sinktest

import (
	"bytes"
	"errors"
	"slices"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
)

func testResume(t *testing.T, c Config) {
	full := c.newPlan()
	for at := 1; at < len(full.pieces)-1; at++ {
		p := plan{slices.Clone(full.want), full.pieces}
		target := c.New(t)
		off := p.pieces[at].off
		d := c.create(t, target, p.size(), sink.Options{})
		p.putAll(t, d, p.pieces[:at])
		state := c.checkpointBeside(t, d, off, func() {
			// These bytes lie above the checkpoint. The second run, which
			// resumes from the checkpoint, must overwrite them.
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
		// The stale bytes, which the first run wrote above the checkpoint, cover
		// the next two pieces of the plan. The second run writes zeros over the
		// first of these pieces. It writes all later pieces as planned.
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

// checkpointBeside makes a checkpoint at the given offset. Checkpoint returns a
// function that makes the checkpoint durable. checkpointBeside runs this
// function and the given function write at the same time.
func (c Config) checkpointBeside(t *testing.T, d sink.Disk, off int64, write func()) []byte {
	t.Helper()
	state, sync, err := d.Checkpoint(off)
	if err != nil {
		t.Fatalf("Checkpoint(%d): %v", off, err)
	}
	if state == nil {
		t.Errorf("Checkpoint(%d): the state is nil, which means a new disk in Options", off)
	}
	synced := make(chan error)
	go func() { synced <- sync(t.Context()) }()
	write()
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

// If a disk is suspended after Finish, its data are kept, for example as evidence
// of a failed verification.
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
