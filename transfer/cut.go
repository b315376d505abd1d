package transfer

import (
	"context"
	"iter"

	"github.com/vddkcp/vddkcp/source"
)

// produce cuts the plan into pieces and sends them off.
func (p *pipeline) produce(ctx context.Context) error {
	defer close(p.work)
	defer close(p.order)
	size := int64(p.o.RequestSize)
	var start, end int64 // data collected and not sent yet
	flush := func() error {
		if start == end {
			return nil
		}
		err := p.send(ctx, piece{off: start, n: end - start, kind: source.Data})
		start = end
		return err
	}
	// A short hole waits here: it is read along when data follows it within
	// the same request.
	var hole source.Extent
	flushHole := func() error {
		if hole.Len == 0 {
			return nil
		}
		if err := flush(); err != nil {
			return err
		}
		start, end = hole.End(), hole.End()
		err := p.send(ctx, piece{off: hole.Off, n: hole.Len, kind: source.Zero})
		hole = source.Extent{}
		return err
	}
	for e, err := range p.sharer.parts(p.units(ctx)) {
		if err != nil {
			return err
		}
		if e.file != nil {
			if err := flushHole(); err != nil {
				return err
			}
			if err := flush(); err != nil {
				return err
			}
			if err := p.sendShared(ctx, e); err != nil {
				return err
			}
			start, end = e.End(), e.End()
			continue
		}
		if e.Kind != source.Data {
			if err := flushHole(); err != nil {
				return err
			}
			if e.Kind == source.Zero && e.Len <= joinGap && start < end && end%size != 0 && !p.o.KeepZeros {
				hole = e.Extent
				continue
			}
			if err := flush(); err != nil {
				return err
			}
			for off := e.Off; off < e.End(); {
				n := e.End() - off
				if !p.zeroed {
					n = min(n, zeroPiece)
				}
				if err := p.send(ctx, piece{off: off, n: n, kind: e.Kind}); err != nil {
					return err
				}
				off += n
			}
			start, end = e.End(), e.End()
			continue
		}
		if hole.Len > 0 {
			if hole.End()/size == start/size && hole.End()%size != 0 {
				if !p.works(source.Zero) {
					p.widen(hole.Len)
				}
				end, hole = hole.End(), source.Extent{}
			} else if err := flushHole(); err != nil {
				return err
			}
		}
		if start == end {
			start, end = e.Off, e.Off
		}
		// Requests end at multiples of their size, so that no grain or cluster
		// is needed by two of them.
		for end < e.End() {
			end = min(e.End(), end-end%size+size)
			if end%size == 0 {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	if err := flushHole(); err != nil {
		return err
	}
	return flush()
}

// sendShared sends off what the target is to share with the source. For a digest
// it is read all the same.
func (p *pipeline) sendShared(ctx context.Context, e part) error {
	for done := int64(0); done < e.Len; {
		n := min(e.Len-done, maxClone)
		if len(p.sums) > 0 {
			size := int64(p.o.RequestSize)
			n = min(n, size-(e.Off+done)%size)
		}
		if err := p.send(ctx, piece{off: e.Off + done, n: n, kind: source.Data, file: e.file, pos: e.pos + done}); err != nil {
			return err
		}
		done += n
	}
	return nil
}

// planned yields the plan's extents from where the copy begins, and counts as no
// work what is done already, and what is found to be none beyond what the plan
// knew.
func (p *pipeline) planned(ctx context.Context) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		for e, err := range p.plan.extents(ctx, p.src) {
			if late := e.End() - max(e.Off, p.plan.Known); err == nil && late > 0 {
				p.plan.Known = e.End()
				if !p.works(e.Kind) {
					p.widen(-late)
				}
			}
			if done := min(e.End(), p.start) - e.Off; err == nil && done > 0 {
				if over := min(e.End(), p.overTo) - max(e.Off, p.overFrom); over > 0 && p.works(e.Kind) {
					p.widen(-over)
				}
				if e.Off, e.Len = e.Off+done, e.Len-done; e.Len == 0 {
					continue
				}
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// units yields the planned extents with borders that are multiples of the
// sink's unit, but for the disk's end: a unit that is not wholly of one kind
// becomes Data.
func (p *pipeline) units(ctx context.Context) iter.Seq2[source.Extent, error] {
	unit, size := p.dst.Unit(), p.plan.Size
	if unit == 1 {
		return p.planned(ctx)
	}
	up := func(off int64) int64 { return min((off+unit-1)/unit*unit, size) }
	down := func(off int64) int64 {
		if off == size {
			return size
		}
		return off / unit * unit
	}
	return func(yield func(source.Extent, error) bool) {
		sent, work := p.start, int64(0) // all below sent was yielded; work was planned above it
		for e, err := range p.planned(ctx) {
			if err != nil {
				yield(source.Extent{}, err)
				return
			}
			from, to := up(e.Off), down(e.End())
			if p.works(e.Kind) {
				work += min(e.End(), from) - e.Off
			}
			if from > to {
				continue // inside one unit, which a later extent ends
			}
			if sent < from {
				p.widen(from - sent - work)
				if !yield(source.Extent{Off: sent, Len: from - sent}, nil) {
					return
				}
			}
			if from < to && !yield(source.Extent{Off: from, Len: to - from, Kind: e.Kind}, nil) {
				return
			}
			sent, work = to, 0
			if p.works(e.Kind) {
				work = e.End() - to
			}
		}
	}
}

// works says whether a range of that kind is work that was planned.
func (p *pipeline) works(kind source.Kind) bool {
	return kind == source.Data || kind == source.Zero && !p.zeroed
}

// widen counts n bytes as work that the plan took for none.
func (p *pipeline) widen(n int64) {
	p.o.Counters.AddPlanned(n)
	p.o.Counters.AddSkipped(-n)
}
