package sinktest

import (
	"context"
	"errors"
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
)

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
			c.checkNothingLeft(t, target)
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
	c.checkNothingLeft(t, target)

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
			t.Skip("the target is not a Breaker")
		}
		d := c.create(t, target, p.size(), sink.Options{})
		if _, ok := sink.Ability[sink.Zeroed](d); ok && zero {
			continue // ZeroAt does nothing, so it cannot fail
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
				return errors.New("want the error of the failed call")
			}
			return nil
		})
		if err := d.Abort(); err != nil {
			t.Errorf("Abort after an error: %v", err)
		}
		c.checkNothingLeft(t, target)
	}
}

// allFail calls all methods of the disk d except Unit, Suspend and Abort, and
// expects each of them to return an error. It passes these errors to the
// parameter check, which checks that they are the expected ones.
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
		unit      bool // valid if the unit is one byte
		zeroNever bool // for ZeroAt only: a slice cannot have this length
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
		c.checkNothingLeft(t, target)
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
				return fmt.Errorf("want sink.ErrClosed after %s", end)
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
			return fmt.Errorf("want the cause of the context")
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
		c.checkNothingLeft(t, target)
	}

	// Here the context that is passed to Finish has ended, but not the context
	// of the disk.
	target := c.New(t)
	d := c.create(t, target, p.size(), sink.Options{})
	ctx, stop := context.WithCancelCause(t.Context())
	stop(why)
	if err := d.Finish(ctx); !errors.Is(err, why) {
		t.Errorf("Finish with a context that has ended: %v", err)
	}
	d.Abort()
	c.checkNothingLeft(t, target)
}
