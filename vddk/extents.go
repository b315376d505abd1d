package vddk

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// leastQuery is how small the range of a query gets, in chunks, before the
// query is taken for one that does not work: 128 MiB.
const leastQuery = 2048

// allocationQueries are what a disk knows of its allocation and what it is
// asking for.
type allocationQueries struct {
	chunks uint64 // whole ones: what is behind can't be asked about
	cache  *windows

	mu       sync.Mutex     // before Disk.mu
	missing  bool           // there is no such function
	limit    queryLimit     // chunks of a query
	works    bool           // a query was answered
	failing  bool           // the last query failed, with all that was tried about it
	failures int            // of windows in a row
	pausedTo time.Time      // until then nothing is asked, because queries failed
	asking   map[int64]*ask // by window

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
	q.missing = !supported
	q.limit = newQueryLimit()
	q.asking = make(map[int64]*ask)
	q.outline.init(q.chunks)
}

// source is Stats.ExtentsSource.
func (q *allocationQueries) source() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.missing || q.failing {
		return "full"
	}
	return "query"
}

// Extents asks the library, a window of 32 GiB at a time, the next one while
// the last is used, and keeps the answers. What is in none of the allocated
// blocks is a hole: zeros, or with Params.SingleLink what this link does not
// have. The part of a chunk (64 KiB) at the end of the disk can't be asked about
// and is Data. Where a query fails that was repeated, 1 GiB is Data, with a warning,
// and the rest is asked about again. After the first write all is Data.
func (d *Disk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		if !d.inDisk(off, length) {
			yield(source.Extent{}, fmt.Errorf("%s: extents [%d, %d) of a disk of %d bytes", d.params.File, off, off+length, d.size))
			return
		}
		q := &d.allocation
		hole := source.Extent{Kind: source.Zero, Absent: true}
		if d.params.SingleLink {
			hole = source.Extent{Kind: source.Inherited}
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
				to = min(to, off+unknownPiece)
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
	if a := q.cache.get(number); a != nil || q.missing || time.Now().Before(q.pausedTo) {
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

// queryWindow asks for a window, in the largest ranges that work. It returns nil
// where the window can't be known. An error means that the disk has ended.
func (d *Disk) queryWindow(number int64) (*allocation, error) {
	q := &d.allocation
	first := uint64(number) * windowChunks
	chunks := min(windowChunks, q.chunks-first)
	var blocks []worker.Block
	// Where an outline of the disk shows that there is nothing, nothing is asked.
	from, to := d.outlined(first, chunks)
	var err error
	asked, repeated := time.Now(), false
	for done := from; done < to && err == nil; asked = time.Now() {
		var got []worker.Block
		q.mu.Lock()
		n := min(q.limit.chunks, to-done)
		q.mu.Unlock()
		if got, err = d.queryAgain(first+done, n, repeated); err == nil {
			if blocks == nil {
				blocks = got // most often all
			} else {
				blocks = append(blocks, got...)
			}
			done += n
			repeated = false
			q.worked(n)
		} else if q.smaller(n, err) {
			err, repeated = nil, true // from here on it is the range that is changed
		}
	}
	var a *allocation
	if err == nil {
		a, err = newAllocation(first*chunkSectors, uint32(chunks), chunkSectors, blocks)
	}
	if err == nil {
		return a, nil
	}
	if errors.Is(err, errWrote) {
		return nil, nil
	}
	if ended := d.endedOrDead(); ended != nil {
		return nil, ended
	}
	d.queriesFailed(int64(first)*chunk, time.Since(asked), err)
	return nil, nil
}

func (d *Disk) endedOrDead() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.endedNow()
}

const (
	// queryRetries is how often a query that failed is repeated as it was where
	// others of the disk were answered, firstRetries where none was yet, and
	// lostRetries where it may have cost the worker. A read is repeated without
	// end, but without an answer to a query all can be read.
	queryRetries = 20
	firstRetries = 3
	lostRetries  = 2
	queryWait    = time.Second // at most, before each
	// After a window that could not be known nothing is asked for firstPause, and
	// after each further one for twice as long, or for slowPause times as long as
	// the query took: a library that hangs must not hold up the reading.
	firstPause = 10 * time.Second
	slowPause  = 10
	lastPause  = 5 * time.Minute
	// unknownPiece is how much is taken for data before a window is asked about
	// again that could not be known.
	unknownPiece = 1 << 30
)

// queryAgain is query, repeated as a read is: after a wait, or when the worker that
// was lost has been replaced. Queries that have not worked lately are not repeated,
// and none with once.
func (d *Disk) queryAgain(first, n uint64, once bool) (blocks []worker.Block, err error) {
	q := &d.allocation
	q.mu.Lock()
	once = once || q.failing || q.limit.grown
	q.mu.Unlock()
	for k := 1; ; k++ {
		blocks, err = d.query(first, n, 1)
		if err == nil || errors.Is(err, errWrote) || d.endedOrDead() != nil || once || k > d.queryRetries(err) {
			return blocks, err
		}
		if !isLost(err) && !d.pause(min(d.o.Retry.Delay(k), queryWait)) {
			return nil, d.ended()
		}
		d.retries.Add(1)
		d.debug("extents", "a query is made again", "offset", first*chunk, "bytes", n*chunk, "error", err)
	}
}

// queryRetries returns how often a query that failed with err is repeated.
func (d *Disk) queryRetries(err error) int {
	q := &d.allocation
	q.mu.Lock()
	retries := firstRetries
	if q.works {
		retries = queryRetries
	}
	q.mu.Unlock()
	if e := asError(err); isLost(err) {
		retries = lostRetries
	} else if e == nil || e.code() == worker.CodeNotSupported || e.code() == worker.CodeInvalidArg {
		return 0 // the same would come again
	}
	if r := d.o.Retry.Retries; r >= 0 {
		retries = min(retries, r)
	}
	return retries
}

// queriesFailed notes that the window at off can't be known for now. Took is how
// long the last query took.
func (d *Disk) queriesFailed(off int64, took time.Duration, why error) {
	q := &d.allocation
	q.mu.Lock()
	pause := max(min(firstPause<<min(q.failures, 10), lastPause), slowPause*took)
	q.failures++
	q.failing = true
	q.pausedTo = time.Now().Add(pause)
	q.mu.Unlock()
	d.warnOnce(&d.warnedQuery, fmt.Sprintf("%s: the library does not tell which blocks at %d are allocated, so that all of them are read; it is asked again later: %v",
		d.params.File, off, why))
	d.debug("extents", "the allocation is not known", "offset", off, "pause", pause, "error", why)
}

// worked notes that a query of n chunks was answered.
func (q *allocationQueries) worked(n uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.works, q.failing, q.failures = true, false, 0
	q.limit.worked(n)
}

// smaller reports whether after a query of n chunks that failed with err one of
// fewer chunks is worth a try.
func (q *allocationQueries) smaller(n uint64, err error) bool {
	e := asError(err)
	if e == nil || isLost(err) || e.code() == worker.CodeNotSupported {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return !q.failing && q.limit.failed(n)
}

// queryLimit is how many chunks a query is made for: the library refuses large
// ranges on some hosts. It is halved when a query fails, and doubled after as many
// successes as show that the failure was not about the range.
type queryLimit struct {
	chunks    uint64
	successes int
	needed    int  // successes in a row before more is asked for
	grown     bool // to a range that has not worked yet
}

func newQueryLimit() queryLimit { return queryLimit{chunks: windowChunks, needed: 1} }

func (l *queryLimit) worked(n uint64) {
	if n < l.chunks {
		return
	}
	l.grown = false
	if l.successes++; l.successes >= l.needed && l.chunks < windowChunks {
		l.chunks, l.successes, l.grown = min(2*l.chunks, windowChunks), 0, true
	}
}

// failed reports whether a query of less than n chunks is worth a try.
func (l *queryLimit) failed(n uint64) bool {
	if l.grown {
		l.needed, l.grown = min(4*l.needed, 256), false
	}
	l.successes = 0
	if n <= leastQuery {
		return false
	}
	l.chunks = min(l.chunks, (n+1)/2)
	return true
}

// errWrote says that the disk was written to, and can't be asked any more.
var errWrote = errors.New("the disk was written to")
