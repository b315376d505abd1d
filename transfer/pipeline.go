package transfer

import (
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"iter"
	"math/bits"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
)

const (
	// A hole up to this size between data of one request is read along with
	// it: that costs less than another request.
	joinGap = 32 << 10
	// Pieces that need no buffer are cut here where the sink has to work for
	// them, so that progress shows and the context's end is seen.
	zeroPiece = 128 << 20
	// How many pieces may be under way. Those with a buffer are bounded by
	// the buffers; this bounds the holes between them.
	maxPieces = 1024
)

// piece is a range on its way through the pipeline.
type piece struct {
	off, n int64
	kind   source.Kind
	read   bool     // goes through a buffer
	buf    []byte   // of n bytes, when they are read; nil again once all of it is encoded
	free   func()   // of buf
	file   *os.File // whose bytes from pos on the target is to share; nil: they are written
	pos    int64
	runs   []run           // of buf, once done
	coded  encoded         // the units of the runs that are not zeros, where the sink takes them encoded
	hashed []digest.Blocks // of buf, one for each of the pipeline's sums
	crc    uint32          // of buf, for checkpoints
	done   chan struct{}   // of capacity 1; gets one value when a worker is finished with the piece
}

type pipeline struct {
	src      source.Disk
	dst      sink.Disk
	plan     *Plan
	o        Options
	zeroed   bool  // holes need no work
	mixed    bool  // a piece may hold parts that only the backing has
	block    int64 // zeros are looked for in blocks of this size
	sharer   *sharer
	sums     []*digest.Sum // of what was collected
	keeper   *keeper       // nil: no checkpoints
	origin   []byte        // the target's state before the first write; nil: another run made that
	start    int64         // below is done already
	at       int64         // below is collected
	halted   bool          // the producer saw that the copy is to stop
	begun    bool          // begin succeeded, so that the pipeline can take checkpoints
	finished bool          // the sink's Finish has returned

	// The counters have planned the work in [overFrom, overTo), which this run does
	// not do. The producer subtracts that work when it skips the range.
	overFrom, overTo int64

	// sinkContext is that of calls to the sink. It outlives the failure of one
	// goroutine, since a sink whose call was cut short takes no last checkpoint.
	sinkContext context.Context

	encoder   sink.Encoder       // nil: units are written as they are
	encodings chan sink.Encoding // not in use
	codes     chan []byte        // memory for encoded units, not in use
	buffers   source.Allocator
	parallel  bool
	all       []*piece
	pieces    chan *piece // those not in use
	work      chan *piece // to the workers
	order     chan *piece // the same and all others, ascending, to collect
}

func newPipeline(src source.Disk, dst sink.Disk, plan *Plan, o Options, zeroed bool) *pipeline {
	p := &pipeline{
		src: guard(src), dst: dst, plan: plan, o: o, zeroed: zeroed,
		block:  max(dst.Unit(), 1<<(bits.Len64(uint64(min(o.Sparse, defaultSparse)))-1)),
		pieces: make(chan *piece, maxPieces),
		work:   make(chan *piece, maxPieces),
		order:  make(chan *piece, maxPieces),
	}
	if plan != nil {
		p.mixed = dst.Unit() > 1 && (plan.Inherited > 0 || plan.Known < plan.Size)
	}
	if p.encoder = encoderOf(dst); p.encoder != nil {
		p.prepareEncoding()
	}
	for range maxPieces {
		c := &piece{done: make(chan struct{}, 1)}
		p.all = append(p.all, c)
		p.pieces <- c
	}
	return p
}

// run copies everything, and returns when all its goroutines have ended.
func (p *pipeline) run(ctx context.Context) (err error) {
	workers := p.o.Requests
	if par, ok := sink.Ability[sink.Parallel](p.dst); ok && par.MaxParallel() > 1 {
		p.parallel = true
		workers = min(workers, par.MaxParallel())
	}
	if p.encoder != nil {
		workers += encoders()
	}
	var unit func(*os.File) int64
	if c, ok := sink.Ability[sink.Cloner](p.dst); ok {
		unit = c.CloneUnit
	}
	if p.sharer, err = newSharer(p.src, unit, p.o.Reflink); err != nil {
		return err
	}
	if alloc, ok := source.Ability[source.Allocator](p.src); ok {
		p.buffers = alloc
	}
	release, err := p.reserve()
	if err != nil {
		return err
	}
	defer func() {
		if released := release(); err == nil {
			err = released
		}
	}()
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error {
		err := p.produce(ctx)
		if p.halted = errors.Is(err, errStopped); p.halted {
			return nil // what is on its way is finished
		}
		return err
	})
	for range workers {
		g.Go(func() error { return p.worker(ctx) })
	}
	if p.keeper != nil {
		g.Go(func() error { return p.keeper.run(p.sinkContext) })
	}
	g.Go(func() error {
		if p.keeper != nil {
			defer close(p.keeper.due)
		}
		return p.collect(ctx)
	})
	if err := g.Wait(); err != nil || !p.halted {
		return err
	}
	return errStopped
}

// errStopped says that a copy was asked to stop, and did so in order.
var errStopped = errors.New("stopped")

// reserve makes buffers where the source has none, and returns what frees all
// that is in use when every goroutine has ended.
func (p *pipeline) reserve() (release func() error, err error) {
	closeOwn := func() error { return nil }
	if p.buffers == nil {
		// Twice what is being read: the rest is read already and waits for its
		// turn to be written.
		own, err := newArena(2*p.o.Requests, p.o.RequestSize)
		if err != nil {
			return nil, err
		}
		p.buffers, closeOwn = own, own.close
	}
	return func() error {
		for _, c := range p.all {
			if c.free != nil {
				c.free()
			}
		}
		return closeOwn()
	}, nil
}

// produce cuts the plan into pieces and sends them off.
func (p *pipeline) produce(ctx context.Context) error {
	defer close(p.work)
	defer close(p.order)
	size := int64(p.o.RequestSize)
	var start, end int64 // data collected and not sent yet
	flush := func() error {
		if start == end {
			return nil
		}
		err := p.send(ctx, piece{off: start, n: end - start, kind: source.Data})
		start = end
		return err
	}
	// A short hole waits here: it is read along when data follows it within
	// the same request.
	var hole source.Extent
	flushHole := func() error {
		if hole.Len == 0 {
			return nil
		}
		if err := flush(); err != nil {
			return err
		}
		start, end = hole.End(), hole.End()
		err := p.send(ctx, piece{off: hole.Off, n: hole.Len, kind: source.Zero})
		hole = source.Extent{}
		return err
	}
	for e, err := range p.sharer.parts(p.units(ctx)) {
		if err != nil {
			return err
		}
		if e.file != nil {
			if err := flushHole(); err != nil {
				return err
			}
			if err := flush(); err != nil {
				return err
			}
			if err := p.sendShared(ctx, e); err != nil {
				return err
			}
			start, end = e.End(), e.End()
			continue
		}
		if e.Kind != source.Data {
			if err := flushHole(); err != nil {
				return err
			}
			if e.Kind == source.Zero && e.Len <= joinGap && start < end && end%size != 0 && !p.o.KeepZeros {
				hole = e.Extent
				continue
			}
			if err := flush(); err != nil {
				return err
			}
			for off := e.Off; off < e.End(); {
				n := e.End() - off
				if !p.zeroed {
					n = min(n, zeroPiece)
				}
				if err := p.send(ctx, piece{off: off, n: n, kind: e.Kind}); err != nil {
					return err
				}
				off += n
			}
			start, end = e.End(), e.End()
			continue
		}
		if hole.Len > 0 {
			if hole.End()/size == start/size && hole.End()%size != 0 {
				if !p.works(source.Zero) {
					p.widen(hole.Len)
				}
				end, hole = hole.End(), source.Extent{}
			} else if err := flushHole(); err != nil {
				return err
			}
		}
		if start == end {
			start, end = e.Off, e.Off
		}
		// Requests end at multiples of their size, so that no grain or cluster
		// is needed by two of them.
		for end < e.End() {
			end = min(e.End(), end-end%size+size)
			if end%size == 0 {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
	if err := flushHole(); err != nil {
		return err
	}
	return flush()
}

// sendShared sends off what the target is to share with the source. For a digest
// it is read all the same.
func (p *pipeline) sendShared(ctx context.Context, e part) error {
	for done := int64(0); done < e.Len; {
		n := min(e.Len-done, maxClone)
		if len(p.sums) > 0 {
			size := int64(p.o.RequestSize)
			n = min(n, size-(e.Off+done)%size)
		}
		if err := p.send(ctx, piece{off: e.Off + done, n: n, kind: source.Data, file: e.file, pos: e.pos + done}); err != nil {
			return err
		}
		done += n
	}
	return nil
}

// take returns a piece that is not in use, when there is one.
func (p *pipeline) take(ctx context.Context) (*piece, error) {
	if p.o.stop().Err() != nil {
		return nil, errStopped
	}
	select {
	case c := <-p.pieces:
		return c, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// send gives a piece like this to those who finish it. It blocks while too much
// is in flight.
func (p *pipeline) send(ctx context.Context, like piece) error {
	c, err := p.take(ctx)
	if err != nil {
		return err
	}
	c.off, c.n, c.kind, c.file, c.pos = like.off, like.n, like.kind, like.file, like.pos
	if c.kind == source.Data && (c.file == nil || len(p.sums) > 0) {
		if err := p.takeBuffer(ctx, c, int(c.n)); err != nil {
			return err
		}
	}
	// Both channels have room for every piece there is. Once it is collected the
	// piece is another's.
	worked := p.worked(c)
	p.order <- c
	if worked {
		p.work <- c
	}
	return nil
}

// takeBuffer gives a piece the memory that it goes through.
func (p *pipeline) takeBuffer(ctx context.Context, c *piece, n int) (err error) {
	if c.buf, c.free, err = p.buffers.Buffer(ctx, n); err != nil {
		return err
	}
	c.read = true
	return p.takeCode(ctx, c)
}

// worked says whether a piece goes through a worker, or is the collector's alone.
func (p *pipeline) worked(c *piece) bool { return p.parallel || c.read }

func (p *pipeline) worker(ctx context.Context) error {
	for c := range p.work {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if c.read {
			if err := p.fill(ctx, c); err != nil {
				return err
			}
			p.look(c)
			if p.encoder != nil && c.file == nil {
				if err := p.encode(c); err != nil {
					return err
				}
			}
		}
		if p.parallel {
			if err := p.write(ctx, c); err != nil {
				return err
			}
		}
		c.done <- struct{}{}
	}
	return nil
}

// fill reads a piece's bytes, where they are not there already.
func (p *pipeline) fill(ctx context.Context, c *piece) error {
	if p.src == nil {
		return nil // a stream's
	}
	if err := p.o.Limit.Wait(ctx, len(c.buf)); err != nil {
		return err
	}
	if p.mixed {
		return p.readMixed(ctx, c.buf, c.off)
	}
	return readFull(p.src, c.buf, c.off)
}

// look finds out what is to be known of a piece that was read.
func (p *pipeline) look(c *piece) {
	p.o.Counters.AddRead(c.n)
	if c.file == nil {
		p.scan(c)
	}
	for i, s := range p.sums {
		s.Algorithm().Hash(c.off, c.buf, &c.hashed[i])
	}
	if p.keeper != nil {
		c.crc = crc32.Checksum(c.buf, castagnoli)
	}
}

// scan finds the zeros in a piece.
func (p *pipeline) scan(c *piece) {
	if p.o.KeepZeros {
		c.runs = append(c.runs[:0], run{0, len(c.buf), false})
		return
	}
	c.runs = scan(c.runs[:0], c.buf, c.off, p.block, p.o.Sparse)
}

// readMixed reads what may have parts that only the backing has: a sink sees whole
// units.
func (p *pipeline) readMixed(ctx context.Context, buf []byte, off int64) error {
	for e, err := range source.Covered(ctx, p.src, off, int64(len(buf))) {
		if err != nil {
			return fmt.Errorf("query extents: %w", err)
		}
		b := buf[e.Off-off : e.End()-off]
		switch e.Kind {
		case source.Zero:
			clear(b)
		case source.Inherited:
			if err := p.readBacking(b, e.Off); err != nil {
				return err
			}
		default:
			if err := readFull(p.src, b, e.Off); err != nil {
				return err
			}
		}
	}
	return nil
}

// readBacking reads from the backing, which may be shorter than the disk: what
// lies past its end is zeros.
func (p *pipeline) readBacking(b []byte, off int64) error {
	backing := p.o.Backing
	if backing == nil {
		return fmt.Errorf("[%d, %d) is not in this image, and no backing is given", off, off+int64(len(b)))
	}
	n := max(0, min(int64(len(b)), backing.Size()-off))
	clear(b[n:])
	if n == 0 {
		return nil
	}
	if err := readFull(backing, b[:n], off); err != nil {
		return fmt.Errorf("backing: %w", err)
	}
	return nil
}

// readFull fills b. Sources and sinks say themselves what failed and where.
func readFull(d source.Disk, b []byte, off int64) error {
	n, err := d.ReadAt(b, off)
	if n == len(b) {
		return nil // with io.EOF at the very end
	}
	if err == nil {
		err = fmt.Errorf("read [%d, %d): %d bytes came, and no error", off, off+int64(len(b)), n)
	}
	return err
}

// write gives a finished piece to the sink.
func (p *pipeline) write(ctx context.Context, c *piece) error {
	if c.kind != source.Data {
		return p.writeEmpty(c.off, c.n, c.kind)
	}
	if c.file != nil {
		return p.share(ctx, c)
	}
	placed := 0
	for _, r := range c.runs {
		off := c.off + int64(r.start)
		if r.zero {
			if err := p.writeEmpty(off, int64(r.end-r.start), source.Zero); err != nil {
				return err
			}
			continue
		}
		if p.encoder != nil {
			n, err := p.place(c, r, placed)
			if err != nil {
				return err
			}
			placed += n
			continue
		}
		if _, err := p.dst.WriteAt(c.buf[r.start:r.end], off); err != nil {
			return err
		}
		p.o.Counters.AddWritten(int64(r.end - r.start))
	}
	return nil
}

func (p *pipeline) writeEmpty(off, n int64, kind source.Kind) error {
	if kind == source.Inherited {
		return p.dst.SameAt(p.sinkContext, off, n)
	}
	if err := p.dst.ZeroAt(p.sinkContext, off, n); err != nil {
		return err
	}
	p.o.Counters.AddZeroed(n)
	return nil
}

// collect takes the pieces in order: it writes them where the sink wants that,
// and lets their memory go.
func (p *pipeline) collect(ctx context.Context) error {
	for c := range p.order {
		if p.worked(c) {
			select {
			case <-c.done:
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		if err := p.fold(ctx, c); err != nil {
			return err
		}
		if !p.parallel {
			if err := context.Cause(ctx); err != nil {
				return err
			}
			if err := p.write(ctx, c); err != nil {
				return err
			}
		}
		if p.works(c.kind) {
			p.o.Counters.AddDone(c.n)
		}
		p.at = c.off + c.n
		if p.keeper != nil {
			if err := p.keeper.collected(c); err != nil {
				return err
			}
		}
		if c.free != nil {
			c.free()
			c.buf, c.free = nil, nil
		}
		p.recycle(c)
		c.read = false
		p.pieces <- c
	}
	return context.Cause(ctx)
}

// fold adds a piece to the digests.
func (p *pipeline) fold(ctx context.Context, c *piece) error {
	for i, s := range p.sums {
		var err error
		switch {
		case c.read:
			s.Blocks(&c.hashed[i])
		case c.kind == source.Inherited:
			err = p.foldBacking(ctx, s, c)
		default:
			err = s.ZeroContext(ctx, c.n)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// foldBacking adds to a digest what the target leaves to its backing.
func (p *pipeline) foldBacking(ctx context.Context, s *digest.Sum, c *piece) error {
	buf := make([]byte, min(c.n, int64(p.o.RequestSize)))
	for done := int64(0); done < c.n; {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		b := buf[:min(int64(len(buf)), c.n-done)]
		if err := p.readBacking(b, c.off+done); err != nil {
			return err
		}
		s.Data(b)
		done += int64(len(b))
	}
	return nil
}

// works says whether a range of that kind is work that was planned.
func (p *pipeline) works(kind source.Kind) bool {
	return kind == source.Data || kind == source.Zero && !p.zeroed
}

// widen counts n bytes as work that the plan took for none.
func (p *pipeline) widen(n int64) {
	p.o.Counters.AddPlanned(n)
	p.o.Counters.AddSkipped(-n)
}

// planned yields the plan's extents from where the copy begins, and counts as no
// work what is done already, and what is found to be none beyond what the plan
// knew.
func (p *pipeline) planned(ctx context.Context) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		for e, err := range p.plan.extents(ctx, p.src) {
			if late := e.End() - max(e.Off, p.plan.Known); err == nil && late > 0 {
				p.plan.Known = e.End()
				if !p.works(e.Kind) {
					p.widen(-late)
				}
			}
			if done := min(e.End(), p.start) - e.Off; err == nil && done > 0 {
				if over := min(e.End(), p.overTo) - max(e.Off, p.overFrom); over > 0 && p.works(e.Kind) {
					p.widen(-over)
				}
				if e.Off, e.Len = e.Off+done, e.Len-done; e.Len == 0 {
					continue
				}
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// units yields the planned extents with borders that are multiples of the
// sink's unit, but for the disk's end: a unit that is not wholly of one kind
// becomes Data.
func (p *pipeline) units(ctx context.Context) iter.Seq2[source.Extent, error] {
	unit, size := p.dst.Unit(), p.plan.Size
	if unit == 1 {
		return p.planned(ctx)
	}
	up := func(off int64) int64 { return min((off+unit-1)/unit*unit, size) }
	down := func(off int64) int64 {
		if off == size {
			return size
		}
		return off / unit * unit
	}
	return func(yield func(source.Extent, error) bool) {
		sent, work := p.start, int64(0) // all below sent was yielded; work was planned above it
		for e, err := range p.planned(ctx) {
			if err != nil {
				yield(source.Extent{}, err)
				return
			}
			from, to := up(e.Off), down(e.End())
			if p.works(e.Kind) {
				work += min(e.End(), from) - e.Off
			}
			if from > to {
				continue // inside one unit, which a later extent ends
			}
			if sent < from {
				p.widen(from - sent - work)
				if !yield(source.Extent{Off: sent, Len: from - sent}, nil) {
					return
				}
			}
			if from < to && !yield(source.Extent{Off: from, Len: to - from, Kind: e.Kind}, nil) {
				return
			}
			sent, work = to, 0
			if p.works(e.Kind) {
				work = e.End() - to
			}
		}
	}
}
