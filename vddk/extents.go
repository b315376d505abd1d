package vddk

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"sync/atomic"
	"time"

	"github.com/vddkcp/vddkcp/internal/allocation"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

const (
	sectorSize = worker.SectorSize
	// chunk is the size in bytes of the blocks for which the library says whether they are
	// allocated. The library accepts no smaller unit, and in larger units more holes would be
	// reported as data.
	chunkSectors = worker.MinChunk
	chunk        = chunkSectors * sectorSize
	// A window is a range of 32 GiB of the disk, the largest range that one query can ask about.
	// The cache keeps one answer for each window. windowChunks is the number of chunks in a window.
	windowChunks = worker.MaxChunks
	window       = windowChunks * chunk

	cacheBytes = 8 << 20
)

// leastQuery is the number of chunks in 128 MiB. When a query fails, later queries ask about fewer
// chunks, unless the failed query had at most leastQuery chunks.
const leastQuery = 2048

// allocationQueries finds out which blocks of the disk are allocated. It asks the library about
// windows of 32 GiB and keeps the answers. It is safe for concurrent use.
type allocationQueries struct {
	pool   *pool
	size   int64
	hole   source.Extent // what is not allocated, without its range
	chunks uint64        // whole chunks of the disk; the library cannot be asked about the rest
	cache  *allocation.Windows

	// After a write to the disk, the library must not be queried any more. The mutex querying is a
	// read-write lock, and is locked for reading during each query. The method stop locks it for
	// writing while it sets the field wrote, so that no query is in progress at that moment.
	querying sync.RWMutex
	wrote    atomic.Bool

	outline outline
	warned  sync.Once // the user was told that a query had failed

	mu         sync.Mutex
	missing    bool                   // the library has no function for queries
	limit      queryLimit             // chunks of one query
	works      bool                   // a query was answered
	failing    bool                   // the last query failed, and so did its repetitions
	failures   int                    // windows in a row that could not be queried
	pausedTo   time.Time              // no query is made before that time, because queries failed
	inProgress map[int64]*windowQuery // by the number of the window
}

// windowQuery is the query for one window. It is in progress or has ended.
type windowQuery struct {
	done chan struct{}   // closed when the query has ended; nil if the result was known
	got  *allocation.Map // the result; nil if the window could not be queried
	err  error           // why the disk has ended
}

func newAllocationQueries(p *pool, size int64) *allocationQueries {
	q := &allocationQueries{
		pool: p, size: size, hole: source.Extent{Kind: source.Zero, Absent: true},
		chunks: uint64(size / chunk), cache: allocation.NewWindows(cacheBytes),
		missing: !p.opener.queries, limit: newQueryLimit(), inProgress: make(map[int64]*windowQuery),
	}
	if p.opener.params.SingleLink {
		q.hole = source.Extent{Kind: source.Inherited}
	}
	q.outline.init(q)
	if q.missing && q.chunks > 0 {
		p.report.warnOnce(&q.warned, p.life.Name+": all blocks are read, because the library cannot list the allocated ones: it has no VixDiskLib_QueryAllocatedBlocks, which VDDK has since version 6.7")
	}
	return q
}

// The method source returns the value of Stats.ExtentsSource. The value is "query" if the library
// lists the allocated blocks. If the library does not list them, all blocks are read, and the value
// is "full".
func (q *allocationQueries) source() string {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.missing || q.failing {
		return "full"
	}
	return "query"
}

// The method stop waits until no query is in progress, and prevents all later queries. stop is
// called before the first write to the disk. From then on the whole disk is reported as Data.
func (q *allocationQueries) stop() {
	if q.wrote.Load() {
		return
	}
	q.querying.Lock()
	defer q.querying.Unlock()
	q.wrote.Store(true)
}

// The method extents implements Disk.Extents. The caller has checked that the range lies in the
// disk.
func (q *allocationQueries) extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		for end := off + length; off < end; {
			e, a, err := q.next(ctx, off, end)
			if err != nil {
				yield(source.Extent{}, err)
				return
			}
			if a == nil {
				if !yield(e, nil) {
					return
				}
				off = e.End()
				continue
			}
			// The caller receives the extents of the window one by one. Between two extents, the
			// disk may be closed or ctx may end. Both are therefore checked before each extent.
			for number, to := off/window, e.End(); off < to; {
				if err := q.ended(ctx); err != nil {
					yield(source.Extent{}, err)
					return
				}
				allocated, until := a.Run(uint32((off - number*window) / chunk))
				e := q.hole
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

// The method next returns the first part of the range [off, end), and the allocation map of the
// window in which this part lies. A part with a map ends at the end of that window or before it. If
// it is not known which blocks of the part are allocated, the map is nil, and the whole part is
// Data.
func (q *allocationQueries) next(ctx context.Context, off, end int64) (source.Extent, *allocation.Map, error) {
	if err := q.ended(ctx); err != nil {
		return source.Extent{}, nil, err
	}
	known := int64(q.chunks) * chunk // the library can be asked about what is below
	if off >= known || q.wrote.Load() {
		return source.Extent{Off: off, Len: end - off}, nil, nil
	}
	number := off / window
	a, err := q.window(ctx, number, end)
	if err != nil {
		return source.Extent{}, nil, err
	}
	to := min(end, (number+1)*window)
	if a == nil {
		to = min(to, off+unknownPiece)
	} else {
		to = min(to, known)
	}
	return source.Extent{Off: off, Len: to - off}, a, nil
}

// The method ended returns why no more extents can be listed: the cause of ctx if ctx has ended, or
// the reason why the disk cannot be used any more. It returns nil if more extents can be listed.
func (q *allocationQueries) ended(ctx context.Context) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return q.pool.ended()
}

// The method window returns the allocation map of the window with the given number. It queries the
// library about the window if the map is not known yet. The map is nil if the window could not be
// queried. The caller lists the extents of the disk up to the offset end. If the next window begins
// before that offset, window also starts the query for the next window, in advance.
func (q *allocationQueries) window(ctx context.Context, number, end int64) (*allocation.Map, error) {
	w, err := q.start(number)
	if err != nil {
		return nil, err
	}
	if next := number + 1; next*window < min(end, int64(q.chunks)*chunk) {
		defer q.start(next) // after this query, since a worker answers one at a time
	}
	if w.done != nil {
		select {
		case <-w.done:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-q.pool.life.Context.Done():
			return nil, context.Cause(q.pool.life.Context)
		}
	}
	return w.got, w.err
}

// The method start returns the query for a window, and starts this query if needed. If a query for
// the window is in progress already, start returns that query. If the map of the window is known,
// start makes no query: it returns a query that has ended and has the known map. If queries are not
// possible at present, start returns a query that has ended and has no map.
func (q *allocationQueries) start(number int64) (*windowQuery, error) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if a := q.cache.Get(number); a != nil || q.missing || time.Now().Before(q.pausedTo) {
		return &windowQuery{got: a}, nil
	}
	if w := q.inProgress[number]; w != nil {
		return w, nil
	}
	life := q.pool.life
	if err := q.pool.begin(); err != nil {
		return nil, err
	}
	defer life.End()
	w := &windowQuery{done: make(chan struct{})}
	q.inProgress[number] = w
	// Disk.Close waits for calls of the methods of Disk that are in progress. The query for a
	// window is not counted as such a call, because Disk.Close must not wait for a query whose
	// answer is not needed any more.
	life.background.Go(func() {
		got, err := q.queryWindow(number)
		q.mu.Lock()
		defer q.mu.Unlock()
		if got != nil {
			q.cache.Put(number, got)
		}
		delete(q.inProgress, number)
		w.got, w.err = got, err
		close(w.done)
	})
	return w, nil
}

// queryWindow queries a window, in ranges as large as the library accepts. It returns no map if
// the window cannot be queried. It returns an error only if the disk was closed, its context has
// ended, or the disk cannot be opened again.
func (q *allocationQueries) queryWindow(number int64) (*allocation.Map, error) {
	first := uint64(number) * windowChunks
	chunks := min(windowChunks, q.chunks-first)
	var blocks []worker.Block
	// Only the chunks [start, stop) of the window are queried. The outline, a coarse map of the
	// whole disk, shows that the rest of the window has no allocated chunks.
	start, stop := q.outline.bounds(first, chunks)
	var err error
	asked, once := time.Now(), false
	for done := start; done < stop && err == nil; asked = time.Now() {
		var got []worker.Block
		q.mu.Lock()
		n := min(q.limit.chunks, stop-done)
		q.mu.Unlock()
		if got, err = q.queryAgain(first+done, n, once); err == nil {
			if blocks == nil {
				blocks = got // most often this is the answer for the whole window
			} else {
				blocks = append(blocks, got...)
			}
			done += n
			once = false
			q.succeeded(n)
		} else if q.mayShrink(n, err) {
			err, once = nil, true // the smaller range takes the place of repetitions
		}
	}
	var a *allocation.Map
	if err == nil {
		a, err = allocation.New(first*chunkSectors, uint32(chunks), chunkSectors, blocks)
	}
	if err == nil {
		return a, nil
	}
	if errors.Is(err, errWrote) {
		return nil, nil
	}
	if ended := q.pool.ended(); ended != nil {
		return nil, ended
	}
	q.failed(int64(first)*chunk, time.Since(asked), err)
	return nil, nil
}

const (
	// These constants limit how often a failed query is repeated. queryRetries applies if the
	// library has answered a query about this disk before, firstRetries if it has not, and
	// lostRetries if the worker process was lost. A failed read is repeated more often than a
	// failed query. Without the read, the disk cannot be copied. Without the answer to the query,
	// the blocks can still be read, whether they are allocated or not.
	queryRetries = 20
	firstRetries = 3
	lostRetries  = 2
	queryWait    = time.Second // the longest wait before a repetition
	// If a window cannot be queried, no query is made for some time, the pause. firstPause is the
	// length of the first pause. Each further window that cannot be queried doubles the length, up
	// to lastPause. But a pause is at least slowPause times as long as the failed query took,
	// because a library that hangs must not delay the reading of the disk.
	firstPause = 10 * time.Second
	slowPause  = 10
	lastPause  = 5 * time.Minute
	// If a window could not be queried, its bytes are reported as Data in pieces of unknownPiece
	// bytes. After each piece, the window is queried again if the pause is over.
	unknownPiece = 1 << 30
)

// queryAgain makes a query for n chunks; first is the number of the first chunk. If the query
// fails, queryAgain waits for some time, or until a lost worker process is replaced, and repeats
// the query. It does not repeat the query in these cases:
//   - The caller forbids it: the parameter noRepeats is true.
//   - The query before this one failed, and so did its repetitions. Repetitions of this one would
//     probably fail, too.
//   - No query has succeeded since q.limit, the largest size of a query, was doubled. The new size
//     is probably too large, and a smaller query is better than a repetition.
func (q *allocationQueries) queryAgain(first, n uint64, noRepeats bool) (blocks []worker.Block, err error) {
	p := q.pool
	q.mu.Lock()
	noRepeats = noRepeats || q.failing || q.limit.grown
	q.mu.Unlock()
	for k := 1; ; k++ {
		blocks, err = q.query(first, n, 1)
		if err == nil || errors.Is(err, errWrote) || p.ended() != nil || noRepeats || k > q.retries(err) {
			return blocks, err
		}
		if !isLost(err) && !p.life.pause(min(p.policy.Delay(k), queryWait)) {
			return nil, p.life.ended()
		}
		p.retries.Add(1)
		p.report.debug("extents", "a query is made again", "offset", first*chunk, "bytes", n*chunk, "error", err)
	}
}

// The method retries returns how often a query may be repeated if it fails with the error err.
func (q *allocationQueries) retries(err error) int {
	q.mu.Lock()
	retries := firstRetries
	if q.works {
		retries = queryRetries
	}
	q.mu.Unlock()
	if e := asError(err); isLost(err) {
		retries = lostRetries
	} else if e == nil || e.code() == worker.CodeNotSupported || e.code() == worker.CodeInvalidArg {
		return 0 // a repetition would fail in the same way
	}
	if r := q.pool.policy.Retries; r >= 0 {
		retries = min(retries, r)
	}
	return retries
}

// The method failed records that the window at the given offset cannot be queried. It also sets the
// end of the pause, during which no query is made. The parameter took is the duration of the failed
// query, and err is its error.
func (q *allocationQueries) failed(off int64, took time.Duration, err error) {
	q.mu.Lock()
	pause := max(min(firstPause<<min(q.failures, 10), lastPause), slowPause*took)
	q.failures++
	q.failing = true
	q.pausedTo = time.Now().Add(pause)
	q.mu.Unlock()
	r := q.pool.report
	r.warnOnce(&q.warned, fmt.Sprintf("%s: all blocks at offset %d are read, because the library could not list the allocated ones; the next blocks are queried later: %v",
		r.disk, off, err))
	r.debug("extents", "the allocation is not known", "offset", off, "pause", pause, "error", err)
}

// The method succeeded records that the library answered a query of n chunks.
func (q *allocationQueries) succeeded(n uint64) {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.works, q.failing, q.failures = true, false, 0
	q.limit.succeeded(n)
}

// mayShrink is called when a query of n chunks failed with err. It reports whether the caller
// should query fewer chunks instead. If so, it has lowered q.limit, the largest number of chunks in
// one query.
func (q *allocationQueries) mayShrink(n uint64, err error) bool {
	e := asError(err)
	if e == nil || isLost(err) || e.code() == worker.CodeNotSupported {
		return false
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	return !q.failing && q.limit.failed(n)
}

// queryLimit is the largest number of chunks in one query. On some hosts the library refuses
// large ranges. Therefore the limit is halved when a query fails. It is doubled after some
// successes in a row, because the failure may have had another cause.
type queryLimit struct {
	chunks    uint64
	successes int  // successes in a row with this limit
	needed    int  // successes in a row before the limit is doubled
	grown     bool // no query has succeeded since the limit was doubled
}

func newQueryLimit() queryLimit { return queryLimit{chunks: windowChunks, needed: 1} }

// The method succeeded records that the library answered a query of n chunks.
func (l *queryLimit) succeeded(n uint64) {
	if n < l.chunks {
		return
	}
	l.grown = false
	if l.successes++; l.successes >= l.needed && l.chunks < windowChunks {
		l.chunks, l.successes, l.grown = min(2*l.chunks, windowChunks), 0, true
	}
}

// The method failed is called when a query of n chunks failed. It reports whether the caller should
// query fewer chunks instead.
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

// errWrote is the error of a query that is made after the first write to the disk.
var errWrote = errors.New("allocated blocks cannot be queried after a write to the disk")

// The method query asks a worker process which blocks are allocated in n chunks; first is the
// number of the first chunk. The offset and the length of each reported block are multiples of the
// given granularity, a number of chunks. While a query is in progress, the same session can also
// read.
func (q *allocationQueries) query(first, n, granularity uint64) ([]worker.Block, error) {
	q.querying.RLock()
	defer q.querying.RUnlock()
	if q.wrote.Load() {
		return nil, errWrote
	}
	h, s, err := q.acquire()
	if err != nil {
		return nil, err
	}
	p := q.pool
	off, bytes := int64(first)*chunk, int64(n)*chunk
	mark := p.opener.log.mark()
	stop := s.deadline(p.o.Timeout)
	blocks, err := s.proc.Query(p.life.Context, first*chunkSectors, n*chunkSectors, granularity*chunkSectors)
	stop()
	p.mu.Lock()
	s.queries--
	p.mu.Unlock()
	if err != nil {
		err = p.explain.explain("query", off, bytes, mark, err)
		if isLost(err) && p.life.ended() == nil {
			err = p.lostDuring(h, s, p.explain.rangeOf("query", off, bytes), time.Now())
		}
		return nil, err
	}
	if p.report.debugs("extents") {
		p.report.debug("extents", "allocated blocks", "offset", off, "bytes", bytes, "blocks", len(blocks))
	}
	return blocks, nil
}

// acquire waits until the disk is open in a worker process. Such a process is a session, and
// session.queries counts its queries in progress. acquire returns the session with the fewest
// queries in progress, and adds 1 to its count. After the query, the caller subtracts 1 from the
// count again.
func (q *allocationQueries) acquire() (*handle, *session, error) {
	p := q.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if err := p.endedLocked(); err != nil {
			return nil, nil, err
		}
		var best *handle
		for _, h := range p.handles {
			if h.usableLocked() && (best == nil || h.session.queries < best.session.queries) {
				best = h
			}
		}
		if best != nil {
			best.session.queries++
			return best, best.session, nil
		}
		p.changed.Wait()
	}
}
