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
	// window is how much of a disk is asked about at once, and ahead.
	window = 1 << 30
	// queryRetries is how often a query is repeated that failed with an error which
	// may pass, after a wait that begins with queryWait and doubles.
	queryRetries = 4
	queryWait    = 100 * time.Millisecond
	// skipped is what is taken for data where that did not help. The next query is
	// for as much.
	assumedData = 64 << 20
	// maxKnown bounds the runs that are remembered.
	maxKnown = 256 << 10
)

// allocation is what is remembered of a disk's allocation: segments that do
// not overlap, ascending.
type allocation struct {
	segments []*segment
	runs     int
}

// segment is a stretch of a disk whose runs are known.
type segment struct {
	off, end int64
	runs     []run
}

// find returns the segment with off, or where in its window the last before
// off ends.
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

// add remembers a segment, unless another call was faster.
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

// Extents asks the server for base:allocation, in large ranges, the next one
// ahead. A range that the server does not tell of is Data: one that is a hole
// and not known to read as zeros too.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		if !life.InDisk(off, length, d.size) {
			yield(source.Extent{}, fmt.Errorf("%s: extents [%d, %d) are not in its %d bytes", d.server.life.Name, off, off+length, d.size))
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
					d.segment(ctx, next) // whoever needs it finds the error again
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

// segment returns a stretch of the disk's allocation with off in it.
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
		if d.queryFailed.Load() { // perhaps in one place only
			start = max(start, off-off%assumedData)
			end = min(end, start+assumedData)
		}
		fresh, err := d.queryRetrying(ctx, start, end)
		if err != nil {
			return nil, err
		}
		if fresh == nil { // not remembered: whoever comes again asks again
			start = max(start, off-off%assumedData)
			return dataSegment(start, min(end, start+assumedData)), nil
		}
		d.mu.Lock()
		if d.changes == changes { // else it may be from before a write
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

// dataSegment is a segment of which nothing is known.
func dataSegment(off, end int64) *segment {
	return &segment{off, end, []run{{end - off, false}}}
}

// queryRetrying is query with retries of the errors that may be temporary. It
// returns a nil segment where the retries did not help. From then on each query is
// made only once, until one succeeds.
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

// ask returns a segment that begins at off and ends by end.
func (s *server) query(ctx context.Context, off, end int64) (*segment, error) {
	// A cause of the disk's context ends the call by its connection.
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
