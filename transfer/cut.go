package transfer

import (
	"context"
	"iter"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

const (
	// joinGap is the largest hole between data, in bytes, that is read together with the data.
	// Reading such a hole takes less time than one more request does.
	joinGap = 32 << 10
	// zeroPiece is the length, in bytes, of the largest hole that a sink must zero in one call.
	// Longer holes are zeroed in several calls. In one long call, a copy would show no progress,
	// and could not stop soon.
	zeroPiece = 128 << 20
)

// cutter cuts the plan of a copy, in ascending order, into parts. A part is a range that is copied
// in one way: for example, the whole range is zeroed, or all of it is read and written. The method
// cutter.parts chains the iterators cutter.planned, cutter.units, sharer.parts, cutter.joined and
// cutter.cut.
type cutter struct {
	plan     *Plan
	src      source.Disk
	sharer   *sharer // nil: no blocks can be shared
	counters *progress.Counters

	start      int64 // the copy begins here, in bytes; everything below is done
	known      int64 // the plan has examined the extents below this offset; everything above was planned as work
	unit       int64 // of the sink, in bytes
	request    int64 // the most that is read at once, in bytes
	zeroed     bool  // unwritten ranges of the target already read as zeros
	zerosWork  bool  // holes were planned as work
	keepZeros  bool  // holes are never read together with data, because the copy would write their zeros
	readShared bool  // shared data is read as well, for a digest

	// The bytes from offset overFrom to offset overTo lie below start and are copied already. The
	// counters still include these bytes as planned work, because the plan does not have their
	// extents in memory. The iterator cutter.planned skips the bytes and counts them as done.
	overFrom, overTo int64
}

// The method parts yields the parts of the disk from c.start to the end, ascending and without
// gaps.
func (c *cutter) parts(ctx context.Context) iter.Seq2[part, error] {
	return c.cut(c.joined(c.sharer.parts(c.units(c.planned(ctx)))))
}

// countsAsWork reports whether a range of the given kind counts as work in the counters. Holes
// count as work if they were planned as work.
func (c *cutter) countsAsWork(kind source.Kind) bool {
	return kind == source.Data || kind == source.Zero && c.zerosWork
}

// plannedIn returns how many bytes of an extent were planned as work. These are all bytes that the
// plan has not examined, whatever they turn out to be. Among the others they are the bytes of the
// kinds that count as work.
func (c *cutter) plannedIn(e source.Extent) int64 {
	if c.countsAsWork(e.Kind) {
		return e.Len
	}
	return max(0, e.End()-max(e.Off, c.known))
}

// The method count counts a part as done.
func (c *cutter) count(p part) {
	if c.countsAsWork(p.Kind) {
		c.counters.AddDone(p.Len - p.idle)
	} else {
		c.counters.AddFree(c.plannedIn(p.Extent))
	}
}

// The method planned yields the extents of the plan from c.start on. It counts the bytes between
// c.overFrom and c.overTo as done if they were planned as work.
func (c *cutter) planned(ctx context.Context) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		for e, err := range c.plan.extents(ctx, c.src) {
			if err != nil {
				yield(e, err)
				return
			}
			if done := min(e.End(), c.start) - e.Off; done > 0 {
				if over := min(e.End(), c.overTo) - max(e.Off, c.overFrom); over > 0 && c.countsAsWork(e.Kind) {
					c.counters.AddFree(over)
				}
				if e.Off, e.Len = e.Off+done, e.Len-done; e.Len == 0 {
					continue
				}
			}
			if !yield(e, nil) {
				return
			}
		}
	}
}

// The method units moves the borders of extents to borders of the sink's units, such as clusters. A
// unit that contains extents of different kinds becomes Data.
func (c *cutter) units(extents iter.Seq2[source.Extent, error]) iter.Seq2[part, error] {
	if c.unit == 1 {
		return asParts(extents)
	}
	return func(yield func(part, error) bool) {
		sent := c.start  // everything below this offset was yielded
		work := int64(0) // bytes above sent that were planned as work
		for e, err := range extents {
			if err != nil {
				yield(part{Extent: e}, err)
				return
			}
			from, to := c.unitAbove(e.Off), c.unitBelow(e.End())
			work += c.plannedIn(source.Extent{Off: e.Off, Len: min(e.End(), from) - e.Off, Kind: e.Kind})
			if from > to {
				continue // the extent lies inside one unit, which a later extent ends
			}
			if sent < from {
				mixed := part{Extent: source.Extent{Off: sent, Len: from - sent}, idle: from - sent - work}
				if !yield(mixed, nil) {
					return
				}
			}
			if from < to && !yield(part{Extent: source.Extent{Off: from, Len: to - from, Kind: e.Kind}}, nil) {
				return
			}
			sent, work = to, c.plannedIn(source.Extent{Off: to, Len: e.End() - to, Kind: e.Kind})
		}
	}
}

// unitAbove returns the first border of a unit at or above the given offset. The end of the disk
// counts as a border of a unit.
func (c *cutter) unitAbove(off int64) int64 {
	return min((off+c.unit-1)/c.unit*c.unit, c.plan.Size)
}

// unitBelow returns the last border of a unit at or below the given offset. The end of the disk
// counts as a border of a unit.
func (c *cutter) unitBelow(off int64) int64 {
	if off == c.plan.Size {
		return off
	}
	return off / c.unit * c.unit
}

// The method joined turns a short hole into data if the hole lies inside one request, and if the
// parts before and after it are both read and written. The hole is then read together with these
// parts.
func (c *cutter) joined(parts iter.Seq2[part, error]) iter.Seq2[part, error] {
	return func(yield func(part, error) bool) {
		var hole part      // waits for the part after it; of length 0: there is none
		afterData := false // plain data was yielded last
		for p, err := range parts {
			if err != nil {
				yield(p, err)
				return
			}
			if hole.Len > 0 {
				if p.plain() {
					hole.idle = hole.Len - c.plannedIn(hole.Extent)
					hole.Kind = source.Data
				}
				if !yield(hole, nil) {
					return
				}
				hole = part{}
			}
			if afterData && c.joinable(p) {
				hole, afterData = p, false
				continue
			}
			if !yield(p, nil) {
				return
			}
			afterData = p.plain()
		}
		if hole.Len > 0 {
			yield(hole, nil)
		}
	}
}

// joinable reports whether the part p is a hole that is worth reading with the data around it, and
// that begins and ends inside one request.
func (c *cutter) joinable(p part) bool {
	return p.Kind == source.Zero && p.Len <= joinGap && !c.keepZeros &&
		p.Off%c.request != 0 && p.Off/c.request == p.End()/c.request
}

// The method cut treats parts that are read and written differently from other parts. It merges
// them if they are neighbours, and cuts them at multiples of the request size. No grain or cluster
// of the source is then read by two requests. All other parts are cut at the length that cutLimit
// returns.
func (c *cutter) cut(parts iter.Seq2[part, error]) iter.Seq2[part, error] {
	return func(yield func(part, error) bool) {
		var data part // plain data that does not end a request yet
		flush := func() bool {
			p := data
			data = part{}
			return p.Len == 0 || yield(p, nil)
		}
		for p, err := range parts {
			if err != nil {
				yield(p, err)
				return
			}
			plain := p.plain()
			if !plain && !flush() {
				return
			}
			for p.Len > 0 {
				head := p.head(c.cutLimit(p))
				if !plain {
					if !yield(head, nil) {
						return
					}
					continue
				}
				head.Off, head.Len, head.idle = head.Off-data.Len, head.Len+data.Len, head.idle+data.idle
				if data = head; data.End()%c.request == 0 && !flush() {
					return
				}
			}
		}
		flush()
	}
}

// cutLimit returns a limit for the method cut, which takes a piece from the beginning of the part
// p. The limit is the largest length, in bytes, that this piece may have.
func (c *cutter) cutLimit(p part) int64 {
	inRequest := c.request - p.Off%c.request
	switch {
	case p.plain():
		return inRequest
	case p.file != nil && c.readShared:
		return min(inRequest, maxClone)
	case p.file != nil:
		return maxClone
	case c.zeroed:
		return p.Len
	}
	return zeroPiece
}
