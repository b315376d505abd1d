package vddk

import (
	"math/bits"
	"sync"

	"github.com/vddkcp/vddkcp/vddk/worker"
)

// outlineQueries is how many queries have the outline of a whole disk, whatever
// its size.
const outlineQueries = 2

// outlineFailures is how often the outline is asked for in vain: a query that failed
// once may work for a later window.
const outlineFailures = 3

// outlineFrom is how many windows a disk has at least that gets one.
const outlineFrom = 8

// outline is the allocation of a whole disk in large units: of 1 MiB for a disk
// of 1 TiB. A query takes as long for a range that is empty as for one that is
// not, so the outline says which ones need not be asked about: of a disk of 64
// TiB with little on it nearly all.
type outline struct {
	unit uint64 // chunks; 0: there is no outline

	mu    sync.Mutex // held while it is asked for
	parts [outlineQueries]*allocation
	left  int // failures before the outline is done without
}

func (o *outline) init(chunks uint64) {
	if chunks > outlineFrom*windowChunks {
		o.left = outlineFailures
		o.unit = 1 << bits.Len64((chunks-1)/(outlineQueries*windowChunks))
	}
}

// outlined returns the part [from, to) of so many chunks, from a first one on,
// outside of which nothing is allocated.
func (d *Disk) outlined(first, chunks uint64) (from, to uint64) {
	o := &d.allocation.outline
	// The first range is asked about at once: a copy begins with it.
	if o.unit == 0 || first == 0 {
		return 0, chunks
	}
	part := first / (windowChunks * o.unit)
	a := o.part(d, part)
	if a == nil {
		return 0, chunks
	}
	base := part * windowChunks * o.unit // where the part begins; windows lie in one part
	end := first + chunks
	lowest, highest := end, first
	for at := first; at < end; {
		unit := (at - base) / o.unit
		if unit >= uint64(a.chunks) { // the end of the disk, less than a unit
			lowest, highest = min(lowest, at), end
			break
		}
		allocated, until := a.run(uint32(unit))
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

// part returns a part of the outline, or nil where it can't be had: then all is
// asked about.
func (o *outline) part(d *Disk, number uint64) *allocation {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.left == 0 || o.parts[number] != nil {
		return o.parts[number]
	}
	first := number * windowChunks * o.unit
	units := min(windowChunks, (d.allocation.chunks-first)/o.unit)
	if units == 0 {
		return nil
	}
	blocks, err := d.query(first, units*o.unit, o.unit)
	if err == nil {
		o.parts[number], err = newAllocation(first*chunkSectors, uint32(units), o.unit*chunkSectors, blocks)
	}
	if err != nil {
		o.left--
		if e := asError(err); e == nil && !isLost(err) || e != nil && (e.code() == worker.CodeInvalidArg || e.code() == worker.CodeNotSupported) {
			o.left = 0 // the library does not take such units
		}
		d.debug("extents", "no outline of the allocation", "error", err)
	}
	return o.parts[number]
}
