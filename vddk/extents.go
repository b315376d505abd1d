package vddk

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"vddkcp/source"
	"vddkcp/vddk/worker"
)

// leastQuery is how small the range of a query gets, in chunks, before the
// query is taken for one that does not work: 128 MiB.
const leastQuery = 2048

// allocationQueries are what a disk knows of its allocation and what it is
// asking for.
type allocationQueries struct {
	chunks uint64 // whole ones: what is behind can't be asked about
	cache  *windows

	mu     sync.Mutex     // before Disk.mu
	off    bool           // queries don't work, or there is no such function
	lost   int            // workers in queries, in a row
	most   uint64         // chunks of a query
	asking map[int64]*ask // by window

	outline outline
}

// ask is a query for a window that is in progress.
type ask struct {
	done chan struct{}
	got  *allocation // once done; nil: not known
	err  error       // the disk has ended
}

func (q *allocationQueries) init(size int64, supported bool) {
	q.chunks = uint64(size / chunk)
	q.cache = newWindows(cacheBytes)
	q.off = !supported
	q.most = windowChunks
	q.asking = make(map[int64]*ask)
	q.outline.init(q.chunks)
}

func (q *allocationQueries) isOff() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.off
}

// source is Stats.ExtentsSource.
func (q *allocationQueries) source() string {
	if q.isOff() {
		return "full"
	}
	return "query"
}

// Extents asks the library, a window of 32 GiB at a time, the next one while
// the last is used, and keeps the answers. What is in none of the allocated
// blocks is a hole: zeros, or with Params.SingleLink what this link does not
// have. The part of a chunk (64 KiB) at the end of the disk can't be asked about
// and is Data. Queries that fail make the rest Data, with one warning, and so
// does the first write.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		if !d.inDisk(off, length) {
			yield(source.Extent{}, fmt.Errorf("%s: extents [%d, %d) of a disk of %d bytes", d.params.File, off, off+length, d.size))
			return
		}
		q := &d.allocation
		hole := source.Extent{Kind: source.Zero, Absent: true}
		if d.params.SingleLink {
			hole = source.Extent{Kind: source.Same}
		}
		end := off + length
		asked := int64(q.chunks) * chunk // what is below can be asked about
		for off < end {
			if err := d.extentsEnded(ctx); err != nil {
				yield(source.Extent{}, err)
				return
			}
			number := off / window
			to := min(end, (number+1)*window)
			if off >= asked || d.wrote.Load() {
				yield(source.Extent{Off: off, Len: end - off}, nil)
				return
			}
			a, err := d.window(ctx, number, end)
			if err != nil {
				yield(source.Extent{}, err)
				return
			}
			if a == nil {
				if !yield(source.Extent{Off: off, Len: to - off}, nil) {
					return
				}
				off = to
				continue
			}
			for to := min(to, asked); off < to; {
				if err := d.extentsEnded(ctx); err != nil {
					yield(source.Extent{}, err)
					return
				}
				allocated, until := a.run(uint32((off - number*window) / chunk))
				e := hole
				if allocated {
					e = source.Extent{}
				}
				e.Off, e.Len = off, min(number*window+int64(until)*chunk, to)-off
				off = e.End()
				if !yield(e, nil) {
					return
				}
			}
		}
	}
}

func (d *Disk) extentsEnded(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.endedNow()
}

// window returns the allocation of a window, or nil where it can't be known.
// The window behind it is asked for in advance when it begins before end.
func (d *Disk) window(ctx context.Context, number, end int64) (*allocation, error) {
	q := &d.allocation
	k, err := d.ask(number)
	if err != nil {
		return nil, err
	}
	if next := number + 1; next*window < min(end, int64(q.chunks)*chunk) {
		defer d.ask(next) // when this one is there: a worker answers one at a time
	}
	if k.done != nil {
		select {
		case <-k.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-d.ctx.Done():
			return nil, context.Cause(d.ctx)
		}
	}
	return k.got, k.err
}

// ask returns the query for a window: one that has been answered, one in
// progress, or a new one.
func (d *Disk) ask(number int64) (*ask, error) {
	q := &d.allocation
	q.mu.Lock()
	defer q.mu.Unlock()
	if a := q.cache.get(number); a != nil || q.off {
		return &ask{got: a}, nil
	}
	if k := q.asking[number]; k != nil {
		return k, nil
	}
	if err := d.begin(); err != nil {
		return nil, err
	}
	// Close does not wait for it as for a call: nobody may want the answer.
	d.background.Add(1)
	d.calls.Done()
	k := &ask{done: make(chan struct{})}
	q.asking[number] = k
	go func() {
		defer d.background.Done()
		got, err := d.queryWindow(number)
		q.mu.Lock()
		defer q.mu.Unlock()
		if got != nil {
			q.cache.put(number, got)
		}
		delete(q.asking, number)
		k.got, k.err = got, err
		close(k.done)
	}()
	return k, nil
}

// queryWindow asks for a window, in the largest ranges that work. An error
// means that the disk has ended.
func (d *Disk) queryWindow(number int64) (*allocation, error) {
	q := &d.allocation
	first := uint64(number) * windowChunks
	chunks := min(windowChunks, q.chunks-first)
	var blocks []worker.Block
	// Where an outline of the disk shows that there is nothing, nothing is asked.
	from, to := d.outlined(first, chunks)
	for done := from; done < to; {
		q.mu.Lock()
		n, off := min(q.most, to-done), q.off
		q.mu.Unlock()
		if off {
			return nil, nil
		}
		got, err := d.query(first+done, n, 1)
		if err == errWrote {
			return nil, nil
		}
		if err == nil {
			if blocks == nil {
				blocks = got // most often all
			} else {
				blocks = append(blocks, got...)
			}
			done += n
			continue
		}
		if ended := d.ended(); ended != nil {
			return nil, ended
		}
		if retry, err := d.queryFailed(n, err); !retry {
			return nil, err
		}
	}
	a, err := newAllocation(first*chunkSectors, uint32(chunks), chunkSectors, blocks)
	if err != nil {
		d.queriesOff(err)
		return nil, nil
	}
	return a, nil
}

// queryFailed decides on a query of n chunks that failed: whether to ask again,
// maybe for less.
func (d *Disk) queryFailed(n uint64, err error) (retry bool, dead error) {
	d.mu.Lock()
	dead = d.dead
	d.mu.Unlock()
	if dead != nil {
		return false, dead
	}
	if d.allocation.askAgain(n, err) {
		return true, nil
	}
	d.queriesOff(err)
	return false, nil
}

func (q *allocationQueries) askAgain(n uint64, err error) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	if isLost(err) {
		// It may have been the query that cost the worker.
		q.lost++
		return q.lost < 2
	}
	e := asError(err)
	if e == nil || e.code() == worker.CodeNotSupported || n <= leastQuery {
		return false
	}
	q.most = min(q.most, (n+1)/2)
	return true
}

func (d *Disk) queriesOff(why error) {
	d.allocation.mu.Lock()
	d.allocation.off = true
	d.allocation.mu.Unlock()
	d.warnNoQueries(why)
}

func (d *Disk) warnNoQueries(why error) {
	d.warnOnce(&d.warnedQuery, fmt.Sprintf("%s: the library does not tell which blocks are allocated, so that all the rest is read: %v", d.params.File, why))
}

// errWrote says that the disk was written to, and can't be asked any more.
var errWrote = errors.New("the disk was written to")

// query asks one worker for the allocated blocks of n chunks, in units of so
// many.
func (d *Disk) query(first, n, unit uint64) ([]worker.Block, error) {
	d.querying.RLock()
	defer d.querying.RUnlock()
	if d.wrote.Load() {
		return nil, errWrote
	}
	h, s, err := d.sessionForQuery()
	if err != nil {
		return nil, err
	}
	mark := d.log.mark()
	stop := s.deadline(d.o.Timeout)
	blocks, err := s.proc.Query(d.ctx, first*chunkSectors, n*chunkSectors, unit*chunkSectors)
	stop()
	d.mu.Lock()
	s.queries--
	d.mu.Unlock()
	if err != nil {
		err = d.explain("query", int64(first)*chunk, int64(n)*chunk, mark, err)
		if isLost(err) && d.ended() == nil {
			s.proc.Kill()
			op := d.rangeOf("query", int64(first)*chunk, int64(n)*chunk)
			d.lose(h, s, op, time.Now())
			err = s.gone(op)
		}
		return nil, err
	}
	d.allocation.mu.Lock()
	d.allocation.lost = 0
	d.allocation.mu.Unlock()
	if d.debugs("extents") {
		d.debug("extents", "allocated blocks", "offset", first*chunk, "bytes", n*chunk, "blocks", len(blocks))
	}
	return blocks, nil
}

// sessionForQuery returns the session with the fewest queries.
func (d *Disk) sessionForQuery() (*handle, *session, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for {
		if err := d.endedNow(); err != nil {
			return nil, nil, err
		}
		var best *handle
		for _, h := range d.handles {
			if h.session != nil && !h.retiring && (best == nil || h.session.queries < best.session.queries) {
				best = h
			}
		}
		if best != nil {
			best.session.queries++
			return best, best.session, nil
		}
		d.changed.Wait()
	}
}
