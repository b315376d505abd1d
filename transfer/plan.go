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

// planCache is the most memory, in bytes, that a Plan uses for extents. An extent takes 8 bytes. If
// the extents of a disk do not all fit, the copy queries the rest of them again.
const planCache = 8 << 20

// maxSize is the size in bytes of the largest disk that can be copied, 4 EiB. It is
// far above the limits of all formats, and leaves room to round offsets up without
// overflow.
const maxSize = 1 << 62

// Plan describes the allocation of a disk that is to be copied. It is not safe for
// concurrent use.
type Plan struct {
	Size                  int64 // of the disk, in bytes
	Known                 int64 // the extents below this offset were examined; less than Size only after NewPlanWithin
	Data, Zero, Inherited int64 // bytes of each kind; their sum is Known
	Extents               int64 // number of extents; neighbours of one kind count as one

	// identity is the identity of the source when the plan was made, or "" if it has
	// none. The plan is valid only for this identity.
	identity string

	// The field cache holds the first extents of the disk, each as length<<2 | kind. These
	// extents follow one another without gaps. They begin at offset 0 and end at the offset in
	// the field cachedTo.
	cache    []uint64
	cachedTo int64
}

// Identity returns the identity of the source when the plan was made, or "" if the
// source has none.
func (p *Plan) Identity() string { return p.identity }

// NewPlan queries all extents of src and returns their plan.
func NewPlan(ctx context.Context, src source.Disk) (*Plan, error) {
	return NewPlanWithin(ctx, src, math.MaxInt64, new(progress.Counters))
}

// NewPlanWithin works like NewPlan, for sources that may take long to report all their extents. The
// parameter patience is a time limit. When this time is over, NewPlanWithin stops querying extents.
// The copy then queries the missing extents when it reaches them. NewPlanWithin reports its
// progress to counters, by calls of the method Examined.
func NewPlanWithin(ctx context.Context, src source.Disk, patience time.Duration, counters *progress.Counters) (*Plan, error) {
	begun := time.Now()
	p := &Plan{Size: src.Size()}
	if p.Size > maxSize {
		return nil, fmt.Errorf("the source has %d bytes, more than the maximum of %d bytes", p.Size, int64(maxSize))
	}
	var err error
	if p.identity, err = identityOf(ctx, src); err != nil {
		return nil, err
	}
	last, length := source.Kind(255), int64(0) // the merged extent that is not in the cache yet
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
				return nil, fmt.Errorf("cannot query the extents of the disk: %w", err)
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

// DataFrom returns how many bytes of data (source.Data) are at the given offset or after it. The
// plan keeps only its first extents in memory. DataFrom counts the data of all other extents, even
// if it is before the offset.
func (p *Plan) DataFrom(off int64) int64 {
	data, _ := p.below(off)
	return p.Data - data
}

// The method below returns how many bytes of data, and how many bytes of zeros, are before the
// given offset. It counts only the extents that the plan keeps in memory.
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

// extents yields the extents of the plan. First it yields the extents in memory. For the rest of
// the disk it queries src again.
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
				err = fmt.Errorf("cannot query the extents of the disk: %w", err)
			}
			if !yield(e, err) || err != nil {
				return
			}
		}
	}
}
