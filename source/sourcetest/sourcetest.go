// Package sourcetest holds what every source.Disk must pass, and disks in
// memory for the tests of what reads from one.
package sourcetest

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/source"
)

// Config is an implementation of source.Disk that is tested.
type Config struct {
	// Open opens the disk anew, to live under ctx. The suite closes it; what
	// else there is to remove is t.Cleanup's.
	Open func(ctx context.Context, t testing.TB) source.Disk
	// Content is what the disk must hold: at most 64 MiB, since it is read
	// several times over.
	Content []byte
}

// Run holds the disk against the contract of source.Disk and of the abilities
// that it has.
func Run(t *testing.T, c Config) {
	for _, test := range []struct {
		name string
		run  func(*testing.T, Config)
	}{
		{"Size", testSize},
		{"ReadWhole", testReadWhole},
		{"ReadBorders", testReadBorders},
		{"ReadEnd", testReadEnd},
		{"ReadConcurrently", testReadConcurrently},
		{"Reader", testReader},
		{"Extents", testExtents},
		{"ExtentsOfPart", testExtentsOfPart},
		{"ExtentsBreak", testExtentsBreak},
		{"ExtentsClose", testExtentsClose},
		{"ExtentsOutside", testExtentsOutside},
		{"Context", testContext},
		{"ContextOfExtents", testContextOfExtents},
		{"Close", testClose},
		{"CloseBesideCalls", testCloseBesideCalls},
		{"Identified", testIdentified},
		{"Described", testDescribed},
		{"InFile", testInFile},
		{"Map", testMap},
		{"Allocator", testAllocator},
		{"Uncached", testUncached},
	} {
		t.Run(test.name, func(t *testing.T) { test.run(t, c) })
	}
}

// open opens the disk for one test.
func (c Config) open(t *testing.T) source.Disk {
	t.Helper()
	d := c.Open(t.Context(), t)
	t.Cleanup(func() { d.Close() })
	return d
}

func (c Config) size() int64 { return int64(len(c.Content)) }

func (c Config) random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 1)) }

// within fails the test when do hangs. The contract says a second; the limit
// is far above it, so that a busy machine fails nothing.
func within(t *testing.T, what string, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s hangs", what)
	}
}
