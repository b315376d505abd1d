// Package sourcetest has a test suite that every source.Disk must pass. A test of an
// implementation calls [Run]. If the disk has the ability source.Writable, the test
// also calls [Writable]. [Memory] and [Pattern] are disks in memory for tests of code
// that reads from a Disk.
package sourcetest

import (
	"context"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/source"
)

// Config describes the implementation of source.Disk that Run tests.
type Config struct {
	// Open opens the disk with the context ctx. It is called once or more for each test. The
	// suite closes the disk. If Open creates a file or anything else, Open must remove it with
	// t.Cleanup.
	Open func(ctx context.Context, t testing.TB) source.Disk
	// Content is the expected content of the disk. It should have at most 64 MiB,
	// because the suite reads it several times.
	Content []byte
}

// Run tests that the disk follows the contract of source.Disk and of each ability that
// it has.
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

// The method open opens the disk and closes it at the end of the test.
func (c Config) open(t *testing.T) source.Disk {
	t.Helper()
	d := c.Open(t.Context(), t)
	t.Cleanup(func() { d.Close() })
	return d
}

func (c Config) size() int64 { return int64(len(c.Content)) }

func (c Config) random(seed uint64) *rand.Rand { return rand.New(rand.NewPCG(seed, 1)) }

// The function within calls the function f, and fails the test if f does not return within 30
// seconds. The parameter what is the name that the failure message has for f. The contract of
// source.Disk allows only one second. A limit of one second, however, would make tests fail on
// a busy machine.
func within(t *testing.T, what string, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		f()
	}()
	select {
	case <-done:
	case <-time.After(30 * time.Second):
		t.Fatalf("%s hangs", what)
	}
}
