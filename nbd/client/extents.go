package client

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"slices"
	"time"

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
		if !d.contains(off, length) {
			yield(source.Extent{}, fmt.Errorf("%s: extents [%d, %d) are not in its %d bytes", d.server.name, off, off+length, d.size))
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
	if err := s.begin(ctx); err != nil {
		return nil, fmt.Errorf("%s: extents at %d: %w", s.name, off, err)
	}
	defer s.end()
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
			return nil, fmt.Errorf("%s: extents at %d: %w", s.name, off, context.Cause(ctx))
		}
	}
}

// dataSegment is a segment of which nothing is known.
func dataSegment(off, end int64) *segment {
	return &segment{off, end, []run{{end - off, false}}}
}

// askAgain is ask, repeated where the server's error may pass. It returns nil where
// that did not help; the query after that is made only once, until one is answered.
func (d *Disk) queryRetrying(ctx context.Context, off, end int64) (*segment, error) {
	for n := 0; ; n++ {
		g, err := d.server.query(ctx, off, end)
		if refused := new(serverError); !errors.As(err, &refused) || errors.As(err, new(*lostError)) {
			if err == nil {
				d.queryFailed.Store(false)
			}
			return g, err
		} else if refused.final() {
			return dataSegment(off, end), nil
		}
		if n == queryRetries || d.queryFailed.Load() {
			d.queryFailed.Store(true)
			return nil, nil
		}
		if err := d.server.pause(ctx, d.server.queryWait<<n); err != nil {
			return nil, err
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

// pause waits, unless ctx or the server's context ends.
func (s *server) pause(ctx context.Context, wait time.Duration) error {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: extents: %w", s.name, context.Cause(ctx))
	case <-s.ctx.Done():
		return fmt.Errorf("%s: extents: %w", s.name, context.Cause(s.ctx))
	}
}
