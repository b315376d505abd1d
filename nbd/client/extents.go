package client

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

	"github.com/vddkcp/vddkcp/internal/life"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/nbd"
	"github.com/vddkcp/vddkcp/source"
)

const (
	// window is the maximum length, in bytes, of the range for whose extents the
	// client asks in one query. While the caller uses the extents of one such range,
	// the client queries the next range.
	window = 1 << 30
	// queryRetries is how often a failed query for extents is retried if its error may
	// be temporary. The delay before the first retry is queryWait. The delay doubles
	// with each further retry.
	queryRetries = 4
	queryWait    = 100 * time.Millisecond
	// assumedData is a length in bytes. If a query for extents and all its retries have
	// failed, a range of at most this length counts as data. From then on the client
	// only queries ranges of at most this length, until a query succeeds.
	assumedData = 64 << 20
	// maxKnown is the maximum number of extents in the cache of a disk.
	maxKnown = 256 << 10
)

// An allocation is a cache of the extents of a disk.
type allocation struct {
	segments []*segment // sorted, without overlaps
	runs     int        // number of runs in all segments
}

// A segment is a range of a disk whose extents are known.
type segment struct {
	off, end int64
	runs     []run
}

// find returns the cached segment that contains the given offset. If there is none, it
// returns nil and the offset at which a query for the missing extents should begin. The
// query should begin at the last multiple of 1 GiB (the constant window) that is not
// after the given offset. If the cache already has extents after this multiple, the
// query should begin at the end of the last cached segment before the given offset.
func (a *allocation) find(off int64) (*segment, int64) {
	i, found := slices.BinarySearchFunc(a.segments, off, func(s *segment, off int64) int {
		switch {
		case s.end <= off:
			return -1
		case s.off > off:
			return 1
		}
		return 0
	})
	if found {
		return a.segments[i], 0
	}
	start := off - off%window
	if i > 0 {
		start = max(start, a.segments[i-1].end)
	}
	return nil, start
}

// add caches a segment, unless a concurrent call has already cached a part of the
// segment. If the cache is full, it is emptied first.
func (a *allocation) add(s *segment) {
	i, _ := slices.BinarySearchFunc(a.segments, s.off, func(e *segment, off int64) int {
		if e.end <= off {
			return -1
		}
		return 1
	})
	if i < len(a.segments) && a.segments[i].off < s.end {
		return
	}
	if a.runs+len(s.runs) > maxKnown {
		a.segments, a.runs, i = nil, 0, 0
	}
	a.segments = slices.Insert(a.segments, i, s)
	a.runs += len(s.runs)
}

// Extents implements source.Disk with the metadata context base:allocation. It queries
// the server for ranges of 1 GiB, and for the next range in advance. An extent is Zero
// only if the server says that it reads as zeros. All other extents are Data, including
// holes that may read as anything.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		if !life.InDisk(off, length, d.size) {
			yield(source.Extent{}, fmt.Errorf("%s: cannot list the extents of bytes [%d, %d): the disk has %d bytes", d.server.life.Name, off, off+length, d.size))
			return
		}
		var ahead chan struct{}
		ctx, cancel := context.WithCancelCause(ctx)
		defer func() {
			cancel(context.Canceled)
			if ahead != nil {
				<-ahead
			}
		}()
		for end, asked := off+length, int64(-1); off < end; {
			s, err := d.segment(ctx, off)
			if err != nil {
				yield(source.Extent{}, err)
				return
			}
			if start := s.off - s.off%window; end-start > window && start+window != asked {
				next := start + window
				if ahead != nil {
					<-ahead
				}
				asked, ahead = next, make(chan struct{})
				go func(done chan struct{}) {
					defer close(done)
					d.segment(ctx, next) // an error is found again when the segment is needed
				}(ahead)
			}
			at := s.off
			for _, r := range s.runs {
				at += r.n
				if at <= off {
					continue
				}
				e := source.Extent{Off: off, Len: min(at, end) - off}
				if r.zero {
					e.Kind = source.Zero
				}
				if !yield(e, nil) {
					return
				}
				if off = e.End(); off == end {
					return
				}
			}
		}
	}
}

// The method segment returns a segment that contains the given offset. It takes the
// segment from the cache or asks the server. If the server cannot tell the extents, the
// segment consists of one data extent.
func (d *Disk) segment(ctx context.Context, off int64) (*segment, error) {
	s := d.server
	if err := s.life.Begin(ctx); err != nil {
		return nil, fmt.Errorf("%s: extents at %d: %w", s.life.Name, off, err)
	}
	defer s.life.End()
	if !s.contexts {
		return &segment{0, s.size, []run{{s.size, false}}}, nil
	}
	for {
		d.mu.Lock()
		known, start := d.known.find(off)
		changes := d.changes
		d.mu.Unlock()
		if known != nil {
			return known, nil
		}
		end := start + min(window-start%window, s.size-start)
		if d.queryFailed.Load() { // a shorter query may avoid the range that failed
			start = max(start, off-off%assumedData)
			end = min(end, start+assumedData)
		}
		fresh, err := d.queryRetrying(ctx, start, end)
		if err != nil {
			return nil, err
		}
		if fresh == nil { // the result is not cached, so that a later call queries again
			start = max(start, off-off%assumedData)
			return dataSegment(start, min(end, start+assumedData)), nil
		}
		d.mu.Lock()
		if d.changes == changes { // otherwise a write may have changed the extents
			d.known.add(fresh)
		}
		d.mu.Unlock()
		if fresh.off <= off && off < fresh.end {
			return fresh, nil
		}
		if ctx.Err() != nil {
			return nil, fmt.Errorf("%s: extents at %d: %w", s.life.Name, off, context.Cause(ctx))
		}
	}
}

// dataSegment returns a segment for the range [off, end) that consists of one data extent.
func dataSegment(off, end int64) *segment {
	return &segment{off, end, []run{{end - off, false}}}
}

// queryRetrying asks the server for the extents of [off, end), and retries the query
// after errors that may be temporary. If the server refuses the query for good, the
// returned segment consists of one data extent. If all retries fail, queryRetrying
// returns a nil segment without an error. After that, failed queries are not retried
// until a query has succeeded.
func (d *Disk) queryRetrying(ctx context.Context, off, end int64) (*segment, error) {
	life, wait := &d.server.life, d.server.queryWait
	policy := retry.Policy{Retries: queryRetries, Backoff: func(n int) time.Duration { return wait << (n - 1) }}
	for failures := 1; ; failures++ {
		g, err := d.server.query(ctx, off, end)
		if refused := new(serverError); !errors.As(err, &refused) || errors.As(err, new(*lostError)) {
			if err == nil {
				d.queryFailed.Store(false)
			}
			return g, err
		} else if refused.final() {
			return dataSegment(off, end), nil
		}
		if d.queryFailed.Load() || policy.GiveUp(err, failures, 0) != nil {
			d.queryFailed.Store(true)
			return nil, nil
		}
		if !policy.Pause(ctx, err, policy.Delay(failures), life.Context.Done()) {
			return nil, fmt.Errorf("%s: extents: %w", life.Name, life.Cause(ctx))
		}
	}
}

// The method query asks the server for the extents of [off, end). The returned segment
// begins at off and may end before end.
func (s *server) query(ctx context.Context, off, end int64) (*segment, error) {
	// When ctx ends, s.do returns, although the server may still reply to the
	// request. When the context of the disk ends, the connections are closed, so
	// that the request fails.
	k := &call{cmd: nbd.CmdBlockStatus, off: off, n: end - off}
	if err := s.do(ctx, s.pick(), k); err != nil {
		return nil, s.wrap(k, err)
	}
	g := &segment{off: off, end: off}
	for _, r := range k.status.runs {
		r.n = min(r.n, end-g.end)
		if r.n == 0 {
			break
		}
		g.runs = append(g.runs, r)
		g.end += r.n
	}
	return g, nil
}
