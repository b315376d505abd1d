package transfer

import (
	"context"
	"fmt"
	"iter"
	"math"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// planCache bounds what a Plan remembers of the extents, at 8 bytes each: a
// checkerboard of 64 TiB has 512 M of them. What lies beyond is asked again.
const planCache = 8 << 20

// maxSize is the largest disk that is copied, in bytes: 4 EiB, far above what
// any format or file system holds, so that offsets have room to be rounded up.
const maxSize = 1 << 62

// Plan is what a copy of a disk has to move.
type Plan struct {
	Size                  int64 // of the disk, bytes
	Known                 int64 // what lies below was asked; Size, but for NewPlanWithin's
	Data, Zero, Inherited int64 // bytes of each kind; their sum is Known
	Extents               int64 // how many, neighbours of one kind counted as one

	// identity is what the source was when it was asked, empty where it can't
	// tell: what the plan knows holds for nothing else.
	identity string

	// The first extents, as they touch each other: length<<2 | kind.
	cache    []uint64
	cachedTo int64
}

// Identity is that of the source when the plan was made, "" where it has none.
func (p *Plan) Identity() string { return p.identity }

// NewPlan asks src for its extents, all of them, and adds them up.
func NewPlan(ctx context.Context, src source.Disk) (*Plan, error) {
	return NewPlanWithin(ctx, src, math.MaxInt64, new(progress.Counters))
}

// NewPlanWithin is NewPlan for sources that may need long to tell all of their
// extents. After so much time it leaves the rest to the copy, which asks while
// it reads. The counters get how much of the disk was examined.
func NewPlanWithin(ctx context.Context, src source.Disk, patience time.Duration, counters *progress.Counters) (*Plan, error) {
	begun := time.Now()
	p := &Plan{Size: src.Size()}
	if p.Size > maxSize {
		return nil, fmt.Errorf("the source claims %d bytes, more than the %d that can be copied", p.Size, int64(maxSize))
	}
	var err error
	if p.identity, err = identityOf(ctx, src); err != nil {
		return nil, err
	}
	last, length := source.Kind(255), int64(0)
	remember := func() {
		if length > 0 && len(p.cache) < planCache/8 {
			p.cache = append(p.cache, uint64(length)<<2|uint64(last))
			p.cachedTo += length
		}
	}
windows:
	for off, n := range source.Windows(p.Size) {
		for e, err := range source.Covered(ctx, src, off, n) {
			if err != nil {
				return nil, fmt.Errorf("query extents: %w", err)
			}
			switch e.Kind {
			case source.Zero:
				p.Zero += e.Len
			case source.Inherited:
				p.Inherited += e.Len
			default:
				p.Data += e.Len
			}
			p.Known = e.End()
			counters.Examined(p.Known, p.Size)
			if e.Kind == last {
				length += e.Len
			} else {
				remember()
				p.Extents++
				last, length = e.Kind, e.Len
			}
			if time.Since(begun) > patience {
				break windows
			}
		}
	}
	remember()
	return p, nil
}

// DataFrom is how many bytes of Data lie at or above off. Data below off that the
// plan has not kept in memory are counted too.
func (p *Plan) DataFrom(off int64) int64 {
	data, _ := p.below(off)
	return p.Data - data
}

// below returns how many bytes of Data and of Zero lie below off. Extents that the
// plan has not kept in memory are not counted.
func (p *Plan) below(off int64) (data, zero int64) {
	at := int64(0)
	for _, c := range p.cache {
		n := int64(c >> 2)
		if at >= off {
			break
		}
		switch source.Kind(c & 3) {
		case source.Data:
			data += min(at+n, off) - at
		case source.Zero:
			zero += min(at+n, off) - at
		}
		at += n
	}
	return data, zero
}

// extents yields the planned extents: from memory, and what was too many to
// remember from src.
func (p *Plan) extents(ctx context.Context, src source.Disk) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		off := int64(0)
		for _, c := range p.cache {
			e := source.Extent{Off: off, Len: int64(c >> 2), Kind: source.Kind(c & 3)}
			if !yield(e, nil) {
				return
			}
			off = e.End()
		}
		if off == p.Size {
			return
		}
		for e, err := range source.Covered(ctx, src, off, p.Size-off) {
			if err != nil {
				err = fmt.Errorf("query extents: %w", err)
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}
