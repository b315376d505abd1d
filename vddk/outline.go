package vddk

import (
	"math/bits"
	"sync"

	"github.com/vddkcp/vddkcp/internal/allocation"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

const (
	// outlineQueries is the number of queries that an outline needs. It does not depend on the
	// size of the disk.
	outlineQueries = 2
	// outlineFailures is the number of failures that are accepted: after so many failed queries
	// for the outline, the disk is read without it.
	outlineFailures = 3
	// outlineFrom is a number of windows. Only disks with more windows get an outline.
	outlineFrom = 8
)

// outline is a coarse map of a disk. It shows in large units which parts of the disk are
// allocated. On a disk of 1 TiB, for example, a unit has 1 MiB.
//
// To list the blocks of an empty range, the library needs as much time as for a full range. The
// outline shows which ranges are empty, so that they need no query. On a disk of 64 TiB with little
// data, nearly all ranges are empty. An outline is safe for concurrent use.
type outline struct {
	queries *allocationQueries
	unit    uint64 // chunks; 0 if the disk gets no outline

	mu    sync.Mutex // held during the queries for the outline
	parts [outlineQueries]*allocation.Map
	left  int // failed queries that are still allowed
}

func (o *outline) init(q *allocationQueries) {
	o.queries = q
	if q.chunks > outlineFrom*windowChunks {
		o.left = outlineFailures
		o.unit = 1 << bits.Len64((q.chunks-1)/(outlineQueries*windowChunks))
	}
}

// bounds is called for a range with the given number of chunks. first is the number of its first
// chunk, counted from the beginning of the disk. bounds returns a part of the range, [start, stop),
// that contains all allocated chunks of the range. start and stop are counted from the beginning of
// the range. If the outline is not known, the part is the whole range.
func (o *outline) bounds(first, chunks uint64) (start, stop uint64) {
	// The outline is not used for the first window: every copy begins with this window, and must
	// not wait for the queries of the outline.
	if o.unit == 0 || first == 0 {
		return 0, chunks
	}
	number := first / (windowChunks * o.unit)
	a := o.part(number)
	if a == nil {
		return 0, chunks
	}
	base := number * windowChunks * o.unit // the first chunk of the part; a window never spans two parts
	end := first + chunks
	lowest, highest := end, first
	for at := first; at < end; {
		unit := (at - base) / o.unit
		if unit >= uint64(a.Chunks()) { // the end of the disk that is shorter than a unit
			lowest, highest = min(lowest, at), end
			break
		}
		allocated, until := a.Run(uint32(unit))
		next := min(base+uint64(until)*o.unit, end)
		if allocated {
			lowest, highest = min(lowest, at), next
		}
		at = next
	}
	if lowest >= highest {
		return 0, 0
	}
	return lowest - first, highest - first
}

// The method part returns the part of the outline that has the given number. Each part is the
// answer to one query. If this query has not been answered before, part makes it. The result is nil
// if the query fails, or if no query is made because too many queries have failed before.
func (o *outline) part(number uint64) *allocation.Map {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.left == 0 || o.parts[number] != nil {
		return o.parts[number]
	}
	first := number * windowChunks * o.unit
	units := min(windowChunks, (o.queries.chunks-first)/o.unit)
	if units == 0 {
		return nil
	}
	blocks, err := o.queries.query(first, units*o.unit, o.unit)
	if err == nil {
		o.parts[number], err = allocation.New(first*chunkSectors, uint32(units), o.unit*chunkSectors, blocks)
	}
	if err != nil {
		o.left--
		if e := asError(err); e == nil && !isLost(err) || e != nil && (e.code() == worker.CodeInvalidArg || e.code() == worker.CodeNotSupported) {
			o.left = 0 // the library does not accept units of this size
		}
		o.queries.pool.report.debug("extents", "no outline of the allocation", "error", err)
	}
	return o.parts[number]
}
