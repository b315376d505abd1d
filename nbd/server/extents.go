package server

import (
	"context"
	"slices"
	"sort"
	"sync"
	"sync/atomic"

	"github.com/vddkcp/vddkcp/source"
)

const (
	// ahead is how many bytes of a disk are asked for at once, whatever a
	// client asks: many ask one extent at a time, and a disk far away takes as
	// long for one as for a thousand.
	queryBytes = 4 << 30
	// before is what a question begins at a multiple of, so that random ones
	// don't cut the extents into bits.
	queryAlign = 1 << 20
	// maxRuns bounds what one question brings, for a disk whose extents are
	// short.
	maxRuns = 4096
	// maxMapped bounds what the extents of all exports take, in bytes. Each
	// export may have one question's beyond it.
	maxCacheBytes = 8 << 20
	// runSize and spanSize are what a run and a span take, in bytes.
	runSize  = 16
	spanSize = 64
)

// extents are what is known of a disk's allocation. What was written to is
// forgotten. It is safe for concurrent use.
type extents struct {
	disk       source.Disk
	cacheBytes *atomic.Int64 // what the extents of all exports take
	querying   chan struct{} // full while the disk is being asked: others that wait find the answer

	mu      sync.Mutex
	spans   []*span // ascending, apart
	changes uint64  // counts writes
	clock   uint64  // counts uses
}

// span is a stretch of the disk that is known.
type span struct {
	off  int64
	runs []run
	used uint64 // extents.clock
}

func (s *span) end() int64  { return s.runs[len(s.runs)-1].end }
func (s *span) size() int64 { return spanSize + int64(len(s.runs))*runSize }

// run is a source.Extent that begins where the one before it ends.
type run struct {
	end    int64
	depth  int32
	kind   source.Kind
	absent bool
}

func newExtents(d source.Disk, mapped *atomic.Int64) *extents {
	return &extents{disk: d, cacheBytes: mapped, querying: make(chan struct{}, 1)}
}

// at returns the extent at off with all that follows of the same in what was
// asked at once; the disk is asked where off is not known.
func (x *extents) at(ctx context.Context, off int64) (source.Extent, error) {
	if e, ok := x.cached(off); ok {
		return e, nil
	}
	select {
	case x.querying <- struct{}{}:
	case <-ctx.Done():
		return source.Extent{}, context.Cause(ctx)
	}
	defer func() { <-x.querying }()
	if e, ok := x.cached(off); ok {
		return e, nil
	}
	return x.query(ctx, off)
}

// known returns what is known of off.
func (x *extents) cached(off int64) (source.Extent, bool) {
	x.mu.Lock()
	defer x.mu.Unlock()
	i := x.search(off)
	if i == len(x.spans) || x.spans[i].off > off {
		return source.Extent{}, false
	}
	s := x.spans[i]
	x.clock++
	s.used = x.clock
	return s.at(off), true
}

// search returns the index of the first span that ends after off.
func (x *extents) search(off int64) int {
	return sort.Search(len(x.spans), func(i int) bool { return x.spans[i].end() > off })
}

func (s *span) at(off int64) source.Extent {
	r := s.runs[sort.Search(len(s.runs), func(i int) bool { return s.runs[i].end > off })]
	return source.Extent{Off: off, Len: r.end - off, Kind: r.kind, Depth: int(r.depth), Absent: r.absent}
}

// ask asks the disk for what lies around off and is not known, and keeps it.
func (x *extents) query(ctx context.Context, off int64) (source.Extent, error) {
	from := off &^ (queryAlign - 1)
	end := from + min(queryBytes, x.disk.Size()-from)
	x.mu.Lock()
	i := x.search(off)
	if i > 0 {
		from = max(from, x.spans[i-1].end())
	}
	if i < len(x.spans) {
		end = min(end, x.spans[i].off)
	}
	changes := x.changes
	x.mu.Unlock()

	s := &span{off: from}
	for e, err := range source.Covered(ctx, x.disk, from, end-from) {
		if err != nil {
			return source.Extent{}, err
		}
		s.runs = append(s.runs, run{e.End(), int32(e.Depth), e.Kind, e.Absent})
		if len(s.runs) >= maxRuns && e.End() > off {
			break
		}
	}
	s.runs = slices.Clip(s.runs)
	x.mu.Lock()
	defer x.mu.Unlock()
	if x.changes == changes {
		x.insert(s)
	}
	return s.at(off), nil
}

// keep inserts a span, and lets go of those that were not used for the longest
// time when it gets too much. The caller holds x.mu.
func (x *extents) insert(s *span) {
	x.clock++
	s.used = x.clock
	x.spans = slices.Insert(x.spans, x.search(s.off), s)
	x.cacheBytes.Add(s.size())
	for x.cacheBytes.Load() > maxCacheBytes && len(x.spans) > 1 {
		oldest := 0
		for i := range x.spans {
			if x.spans[i].used < x.spans[oldest].used {
				oldest = i
			}
		}
		x.remove(oldest, oldest+1)
	}
}

// remove forgets spans. The caller holds x.mu.
func (x *extents) remove(from, to int) {
	for _, s := range x.spans[from:to] {
		x.cacheBytes.Add(-s.size())
	}
	x.spans = slices.Delete(x.spans, from, to)
}

// changed forgets what is known of a range, which has been written to: it is
// called after the write and before its reply. An answer that is under way
// then is not kept.
func (x *extents) invalidate(off, n int64) {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.changes++
	from := x.search(off)
	to := from
	for to < len(x.spans) && x.spans[to].off < off+n {
		to++
	}
	x.remove(from, to)
}

// drop forgets everything.
func (x *extents) clear() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.changes++
	x.remove(0, len(x.spans))
}
