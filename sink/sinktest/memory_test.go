package sinktest_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/sinktest"
)

// memory is a Memory that can be broken, as the suite wants it.
type memory struct {
	*sinktest.Memory
	broken atomic.Pointer[error]
}

func (m *memory) Break(err error) { m.broken.Store(&err) }

func newMemory(unit int64, parallel int, zeroed bool, fill byte) *memory {
	m := &memory{Memory: &sinktest.Memory{Unit: unit, Parallel: parallel, Zeroed: zeroed, Fill: fill}}
	m.Before = func(_ context.Context, c sinktest.Call) error {
		if err := m.broken.Load(); err != nil && (c.Op == sinktest.OpWrite || c.Op == sinktest.OpZero) {
			return *err
		}
		return nil
	}
	return m
}

func TestMemory(t *testing.T) {
	for _, c := range []struct {
		unit     int64
		parallel int
		zeroed   bool
		fill     byte
	}{
		{1, 0, false, 0xAA}, {1, 1, true, 0}, {1, 8, false, 0xAA}, {4096, 4, true, 0}, {65536, 0, false, 0xAA}, {1 << 20, 0, true, 0},
	} {
		for _, backing := range []bool{false, true} {
			t.Run(fmt.Sprintf("unit %d parallel %d zeroed %v backing %v", c.unit, c.parallel, c.zeroed, backing), func(t *testing.T) {
				sinktest.Test(t, sinktest.Config{
					New:     func(testing.TB) sinktest.Target { return newMemory(c.unit, c.parallel, c.zeroed, c.fill) },
					Unit:    c.unit,
					Backing: backing,
				})
			})
		}
	}
}

func TestMemoryLog(t *testing.T) {
	m := &sinktest.Memory{Unit: 512}
	d, err := m.Create(t.Context(), 2000, sink.Options{})
	if err != nil {
		t.Fatal(err)
	}
	d.WriteAt(make([]byte, 512), 0)
	d.ZeroAt(t.Context(), 512, 1488)
	_, sync, _ := d.Checkpoint(2000)
	sync(t.Context())
	d.Finish(t.Context())
	d.Publish(t.Context())
	d.Abort()
	want := "write [0, 512)\nzero [512, 2000)\ncheckpoint 2000\nsync 2000\nfinish\npublish\n"
	if got := m.Log(); got != want {
		t.Errorf("log:\n%swant:\n%s", got, want)
	}
	if v := m.Violations(); len(v) > 0 || !m.Ended() {
		t.Errorf("violations %q, ended %v", v, m.Ended())
	}
	if got := m.Counts(); got != (sinktest.Counts{Writes: 1, Zeroes: 1, WrittenBytes: 512, ZeroBytes: 1488, MaxInFlight: 1}) {
		t.Errorf("counts: %+v", got)
	}
}

func TestMemoryViolations(t *testing.T) {
	write := func(d sink.Disk, off, n int64) { d.WriteAt(make([]byte, n), off) }
	for _, c := range []struct {
		name     string
		parallel int
		do       func(d sink.Disk)
		want     string
	}{
		{"gap", 0, func(d sink.Disk) { write(d, 512, 512) }, "does not start at 0"},
		{"backwards", 0, func(d sink.Disk) { write(d, 0, 512); write(d, 0, 512) }, "does not start at 512"},
		{"twice", 2, func(d sink.Disk) { write(d, 512, 512); write(d, 0, 1024) }, "again: [512, 1024) is done"},
		{"not covered", 2, func(d sink.Disk) { write(d, 512, 512); d.Finish(context.Background()) }, "nothing was written at 0"},
		{"end missing", 0, func(d sink.Disk) { write(d, 0, 512); d.Finish(context.Background()) }, "nothing was written at 512 of 4096"},
		{"checkpoint too far", 2, func(d sink.Disk) { write(d, 0, 512); d.Checkpoint(1024) }, "nothing was written at 512"},
		{"misaligned", 0, func(d sink.Disk) { write(d, 0, 100) }, "not whole units"},
		{"past the end", 2, func(d sink.Disk) { write(d, 4096, 512) }, "not in a disk of 4096 bytes"},
		{"publish first", 0, func(d sink.Disk) { d.Publish(context.Background()) }, "before Finish"},
	} {
		m := &sinktest.Memory{Unit: 512, Parallel: c.parallel}
		d, err := m.Create(t.Context(), 4096, sink.Options{})
		if err != nil {
			t.Fatal(err)
		}
		c.do(d)
		if v := m.Violations(); len(v) != 1 || !strings.Contains(v[0], c.want) {
			t.Errorf("%s: violations %q, want one with %q", c.name, v, c.want)
		}
	}
}

func TestMemoryInFlight(t *testing.T) {
	for _, c := range []struct {
		parallel int
		want     string
	}{{0, "the sink is not Parallel"}, {1, "the most is 1"}, {2, ""}} {
		inside, leave := make(chan struct{}), make(chan struct{})
		m := &sinktest.Memory{Parallel: c.parallel, Before: func(_ context.Context, c sinktest.Call) error {
			if c.Off == 0 {
				close(inside)
				<-leave
			}
			return nil
		}}
		d, err := m.Create(t.Context(), 2, sink.Options{})
		if err != nil {
			t.Fatal(err)
		}
		first := make(chan error)
		go func() { _, err := d.WriteAt([]byte{1}, 0); first <- err }()
		<-inside
		d.WriteAt([]byte{2}, 1)
		close(leave)
		if err := <-first; err != nil {
			t.Error(err)
		}
		if v := strings.Join(m.Violations(), "; "); !strings.Contains(v, c.want) || (v == "") != (c.want == "") {
			t.Errorf("parallel %d: violations %q, want %q", c.parallel, v, c.want)
		}
	}
}

func TestMemoryHuge(t *testing.T) {
	for _, countOnly := range []bool{false, true} {
		m := &sinktest.Memory{CountOnly: countOnly, Fill: 0xAA}
		const size = 8 << 60 >> 1
		d, err := m.Create(t.Context(), size, sink.Options{})
		if err != nil {
			t.Fatal(err)
		}
		if err := d.ZeroAt(t.Context(), 0, size-5); err != nil {
			t.Fatal(err)
		}
		if _, err := d.WriteAt([]byte("12345"), size-5); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(d.Finish(t.Context()), d.Publish(t.Context())); err != nil {
			t.Fatal(err)
		}
		if got := m.Counts(); got.ZeroBytes != size-5 || got.WrittenBytes != 5 {
			t.Errorf("counts: %+v", got)
		}
	}
}
