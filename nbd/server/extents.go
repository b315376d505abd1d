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
	// A query asks a disk for its extents in a range. queryBytes is the length of
	// this range, in bytes. The length does not depend on the request of the
	// client, because many clients request one extent at a time. A remote disk
	// needs as much time to report one extent as to report a thousand.
	queryBytes = 4 << 30
	// queryAlign is the alignment of the offsets of queries, in bytes. Without it,
	// queries at random offsets would divide the cached extents into many small
	// spans.
	queryAlign = 1 << 20
	// maxRuns limits the number of extents that one query reports: after that many
	// extents, the query stops as soon as it has passed the requested offset. This
	// matters only for disks with many short extents.
	maxRuns = 4096
	// maxCacheBytes is the maximum size, in bytes, of the cached extents of all
	// exports together. In addition, each export may keep the extents of its last
	// query.
	maxCacheBytes = 8 << 20
	// runSize and spanSize are the sizes, in bytes, that the types run and span
	// have in memory.
	runSize  = 16
	spanSize = 64
)

// The struct extents is a cache of the extents of a disk. Ranges that are written to
// are removed from it. It is safe for concurrent use.
type extents struct {
	disk       source.Disk
	cacheBytes *atomic.Int64 // size of the cached extents of all exports
	querying   chan struct{} // full during a query; later callers wait and find the answer in the cache

	mu      sync.Mutex
	spans   []*span // sorted by offset, without overlaps
	changes uint64  // counts the calls of invalidate and clear
	clock   uint64  // counts the uses of spans, for the search of the least recently used one
}

// A span is a range of the disk whose extents are cached.
type span struct {
	off  int64
	runs []run
	used uint64 // extents.clock at the last use
}

func (s *span) end() int64  { return s.runs[len(s.runs)-1].end }
func (s *span) size() int64 { return spanSize + int64(len(s.runs))*runSize }

// A run is a source.Extent in a compact form. The runs of a span follow each other
// without gaps: each run begins where the run before it ends, and the first run begins
// at the beginning of the span.
type run struct {
	end    int64
	depth  int32
	kind   source.Kind
	absent bool
}

func newExtents(d source.Disk, cacheBytes *atomic.Int64) *extents {
	return &extents{disk: d, cacheBytes: cacheBytes, querying: make(chan struct{}, 1)}
}

// extentAt returns an extent that begins at the given offset. It is the extent of the
// disk that contains this offset, without the part before the offset. extentAt takes
// the extent from the cache or queries the disk. If the extent of the disk continues
// after the queried range, the result ends at the end of that range.
func (x *extents) extentAt(ctx context.Context, off int64) (source.Extent, error) {
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

// The method cached returns the result of extentAt for the given offset if the cache
// has an extent there. Otherwise it returns false.
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
	return s.extentAt(off), true
}

// The method search returns the index of the first span in the cache that ends after
// the given offset.
func (x *extents) search(off int64) int {
	return sort.Search(len(x.spans), func(i int) bool { return x.spans[i].end() > off })
}

// extentAt returns an extent that begins at the given offset. It is the extent of the
// span that contains this offset, without the part before the offset. The offset must
// be in the span.
func (s *span) extentAt(off int64) source.Extent {
	r := s.runs[sort.Search(len(s.runs), func(i int) bool { return s.runs[i].end > off })]
	return source.Extent{Off: off, Len: r.end - off, Kind: r.kind, Depth: int(r.depth), Absent: r.absent}
}

// The method query asks the disk for the extents of a range around the given offset,
// and caches them. The range contains only offsets whose extents are not cached yet.
// query returns the result of the method extentAt for the given offset.
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
	return s.extentAt(off), nil
}

// insert adds a span to the cache, and removes the least recently used spans if the cache
// becomes too large. The caller holds x.mu.
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

// remove deletes the spans with the indexes [start, end) from the cache. The caller
// holds x.mu.
func (x *extents) remove(start, end int) {
	for _, s := range x.spans[start:end] {
		x.cacheBytes.Add(-s.size())
	}
	x.spans = slices.Delete(x.spans, start, end)
}

// invalidate removes the extents of the n bytes at the given offset from the cache. It
// must be called after a write to this range and before the reply to the write. If a
// query is in progress at the same time, the result of the query is not cached.
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

// clear removes all extents from the cache.
func (x *extents) clear() {
	x.mu.Lock()
	defer x.mu.Unlock()
	x.changes++
	x.remove(0, len(x.spans))
}
