package vddk

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

// callStats adds up the calls of the library's functions, for the table that -D vddk.stats=1
// prints. It is safe for concurrent use.
type callStats struct {
	mu   sync.Mutex
	rows map[string]*callRow // by the name of the function without "VixDiskLib_"
}

// callRow has the sums for one function.
type callRow struct {
	name  string
	time  time.Duration
	calls int
	bytes int64
}

// The method begin records that a call of a function begins. The caller calls the result, with the
// number of bytes that the call has moved, when the call ends.
func (s *callStats) begin(name string) (end func(bytes int64)) {
	begun := time.Now()
	return func(bytes int64) {
		took := time.Since(begun)
		s.mu.Lock()
		defer s.mu.Unlock()
		r := s.rows[name]
		if r == nil {
			r = &callRow{name: name}
			s.rows[name] = r
		}
		r.time += took
		r.calls++
		r.bytes += bytes
	}
}

// The method table returns the lines of the table. It has the columns of the table that nbdkit's
// vddk plugin prints, and the function that has taken the most time comes first.
func (s *callStats) table() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var rows []*callRow
	for _, r := range s.rows {
		rows = append(rows, r)
	}
	slices.SortFunc(rows, func(a, b *callRow) int { return cmp.Or(-cmp.Compare(a.time, b.time), cmp.Compare(a.name, b.name)) })
	lines := []string{fmt.Sprintf("%-24s %15s %5s %15s", "VixDiskLib_...", "µs", "calls", "bytes")}
	for _, r := range rows {
		line := fmt.Sprintf("  %-22s %15d %5d", r.name, r.time.Microseconds(), r.calls)
		if r.bytes > 0 {
			line += fmt.Sprintf(" %15d", r.bytes)
		}
		lines = append(lines, line)
	}
	return lines
}

// measured is a process whose calls are added to a callStats.
type measured struct {
	process
	stats *callStats
}

// The method transfer measures the function call, which moves sectors with the given function of
// the library, or with the asynchronous variant that the worker prefers.
func (m *measured) transfer(function string, sectors int, call func() error) error {
	if m.Has("VixDiskLib_Wait") && m.Has("VixDiskLib_"+function+"Async") {
		function += "Async"
	}
	end := m.stats.begin(function)
	err := call()
	if err != nil {
		sectors = 0
	}
	end(int64(sectors) * sectorSize)
	return err
}

func (m *measured) Read(ctx context.Context, slot int, sector uint64, sectors int) error {
	return m.transfer("Read", sectors, func() error { return m.process.Read(ctx, slot, sector, sectors) })
}

func (m *measured) Write(ctx context.Context, slot int, sector uint64, sectors int) error {
	return m.transfer("Write", sectors, func() error { return m.process.Write(ctx, slot, sector, sectors) })
}

func (m *measured) Open(ctx context.Context, r worker.OpenRequest) (worker.Opened, error) {
	defer m.stats.begin("Open")(0)
	return m.process.Open(ctx, r)
}

func (m *measured) Flush(ctx context.Context) error {
	defer m.stats.begin("Flush")(0)
	return m.process.Flush(ctx)
}

func (m *measured) Query(ctx context.Context, start, sectors, chunk uint64) ([]worker.Block, error) {
	defer m.stats.begin("QueryAllocatedBlocks")(0)
	return m.process.Query(ctx, start, sectors, chunk)
}

func (m *measured) Cleanup(ctx context.Context, r worker.OpenRequest) (cleaned, remaining uint32, err error) {
	defer m.stats.begin("Cleanup")(0)
	return m.process.Cleanup(ctx, r)
}

func (m *measured) PrepareAccess(ctx context.Context, r worker.OpenRequest) error {
	defer m.stats.begin("PrepareForAccess")(0)
	return m.process.PrepareAccess(ctx, r)
}

func (m *measured) EndAccess(ctx context.Context, r worker.OpenRequest) error {
	defer m.stats.begin("EndAccess")(0)
	return m.process.EndAccess(ctx, r)
}

func (m *measured) Close(ctx context.Context) error {
	defer m.stats.begin("Close")(0)
	return m.process.Close(ctx)
}
