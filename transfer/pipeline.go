package transfer

import (
	"context"
	"errors"
	"math"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// maxPieces is the largest number of pieces in progress. It is the only bound for pieces that
// are holes. Pieces with data are also bounded by the number of buffers.
const maxPieces = 1024

// maxFilled is the largest number of buffers that a copy has in addition to those that are being
// filled. More of them do not make a copy faster.
const maxFilled = 8

// pipeline copies to one target with runOrdered. The producer cuts the plan into pieces and
// assigns buffers to them. Workers read, inspect and encode the pieces. They also write them if
// the sink is Parallel, which means that it can be written concurrently. The collector adds the
// pieces to the digests, writes them if no worker did, and counts them.
type pipeline struct {
	o         Options
	cutter    *cutter
	reader    *reader
	inspector inspector
	encoder   *encoder // nil: the sink takes units as they are
	writer    *writer
	sums      []*digest.Sum // only the collector adds content to them
	keeper    *keeper       // nil: the copy takes no checkpoints
	buffers   source.Allocator
	workers   int
	parallel  bool // workers write, in any order
}

// newPipeline returns a pipeline for the copy c, which writes to the sink c.dst. The parameter ctx
// is the context of all calls to this sink.
func newPipeline(ctx context.Context, c *copying) (*pipeline, error) {
	p := &pipeline{o: c.o, reader: c.reader(), sums: c.sums, keeper: c.keeper, workers: c.o.Requests}
	if parallel, ok := sink.Ability[sink.Parallel](c.dst); ok && parallel.MaxParallel() > 1 {
		p.parallel = true
		p.workers = min(p.workers, parallel.MaxParallel())
	}
	unit := c.dst.Unit()
	p.inspector = newInspector(c.o, unit, c.sums, c.keeper != nil)
	if p.encoder = newEncoder(c.dst, c.o.Requests, len(c.sums) > 0); p.encoder != nil {
		p.workers += encoders()
	}
	p.writer = &writer{dst: c.dst, encoder: p.encoder, counters: c.o.Counters, mustShare: c.o.Reflink == ReflinkAlways, ctx: ctx}
	var cloneUnit func(*os.File) int64
	if cloner, ok := sink.Ability[sink.Cloner](c.dst); ok {
		cloneUnit = cloner.CloneUnit
	}
	sharer, err := newSharer(c.src, cloneUnit, c.o.Reflink)
	if err != nil {
		return nil, err
	}
	p.cutter = &cutter{
		plan: c.plan, src: c.src, sharer: sharer, counters: c.o.Counters,
		start: c.start, known: math.MaxInt64,
		unit: unit, request: int64(c.o.RequestSize), zeroed: c.zeroed, zerosWork: c.zerosWork, keepZeros: c.o.KeepZeros, readShared: len(c.sums) > 0,
	}
	if c.plan != nil {
		p.cutter.known = c.plan.Known
		p.cutter.overFrom, p.cutter.overTo = min(c.start, c.plan.cachedTo), min(c.start, c.plan.Known)
	}
	return p, nil
}

// The method run copies everything, and returns when all its goroutines have ended. The error is
// errStopped if Options.Stop ended the copy.
func (p *pipeline) run(ctx context.Context) (err error) {
	return p.runStages(ctx, stages[piece]{produce: p.produce, work: p.work})
}

// runStream is like run, but copies a stream: the producer reads the stream, and the collector
// writes all pieces in order.
func (p *pipeline) runStream(ctx context.Context, s *stream) error {
	// One worker searches for zeros as fast as a stream delivers data. Hashing and encoding need
	// more workers.
	p.workers, p.parallel = max(1, len(p.sums)), false
	if p.encoder != nil {
		p.workers = max(p.workers, cap(p.encoder.memory)/2)
	}
	return p.runStages(ctx, stages[piece]{produce: s.produce, work: p.process})
}

// runStages runs the pipeline. The caller sets the functions s.produce and s.work; runStages sets
// the other functions of s.
func (p *pipeline) runStages(ctx context.Context, s stages[piece]) (err error) {
	s.collect, s.release, s.counters = p.collect, p.release, p.o.Counters
	// There is one buffer for each concurrent read, and the same number again, but not more than
	// maxFilled, for filled buffers that wait to be written.
	var release func() error
	if p.buffers, release, err = reserveBuffers(p.reader.src, p.o.Requests+min(p.o.Requests, maxFilled), p.o.RequestSize); err != nil {
		return err
	}
	defer func() {
		if released := release(); err == nil {
			err = released
		}
	}()
	if p.keeper == nil {
		return runOrdered(ctx, p.o.stop().Done(), p.workers, maxPieces, s)
	}
	s.after = p.keeper.collected
	halted := false
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.keeper.run(p.writer.ctx) })
	g.Go(func() error {
		defer p.keeper.finish()
		err := runOrdered(ctx, p.o.stop().Done(), p.workers, maxPieces, s)
		if halted = errors.Is(err, errStopped); halted {
			return nil // errStopped would hide a later error of the keeper's last checkpoint
		}
		return err
	})
	if err := g.Wait(); err != nil || !halted {
		return err
	}
	return errStopped
}

// The method produce sends the parts of the plan, as pieces, to the workers and the collector. It
// blocks while too many pieces or buffers are in use.
func (p *pipeline) produce(ctx context.Context, o *ordered[piece]) error {
	for part, err := range p.cutter.parts(ctx) {
		if err != nil {
			return err
		}
		it, err := o.acquire(ctx)
		if err != nil {
			return err
		}
		c := &it.value
		c.part = part
		c.read = part.plain() || part.file != nil && len(p.sums) > 0
		if c.read {
			if err := p.acquireBuffer(ctx, c, int(part.Len)); err != nil {
				return err
			}
		}
		o.send(it, !c.read && !p.parallel)
	}
	return nil
}

// acquireBuffer assigns a buffer of n bytes to a piece. If the sink takes encoded units, it also
// assigns memory for them. It blocks until the buffer and the memory are free.
func (p *pipeline) acquireBuffer(ctx context.Context, c *piece, n int) (err error) {
	if c.buf, c.free, err = p.buffers.Buffer(ctx, n); err != nil {
		return err
	}
	if p.encoder == nil {
		return nil
	}
	return p.encoder.acquireMemory(ctx, c)
}

// The method work fills the buffer of a piece, if it has one, and processes the piece.
func (p *pipeline) work(ctx context.Context, c *piece) error {
	if c.read {
		if err := p.reader.fill(ctx, c.buf, c.Off); err != nil {
			return err
		}
	}
	return p.process(ctx, c)
}

// The method process inspects and encodes a piece, if its buffer is filled. If the workers write to
// the sink, process also writes the piece.
func (p *pipeline) process(ctx context.Context, c *piece) error {
	if c.read {
		if err := p.encode(c); err != nil {
			return err
		}
	}
	if p.parallel {
		p.o.Counters.Begin(progress.WaitTarget)
		defer p.o.Counters.End(progress.WaitTarget)
		return p.write(ctx, c)
	}
	return nil
}

// The method encode inspects a piece. If the sink takes encoded units, encode also encodes the
// piece.
func (p *pipeline) encode(c *piece) error {
	p.o.Counters.Begin(progress.WaitEncoders)
	defer p.o.Counters.End(progress.WaitEncoders)
	p.inspector.inspect(c)
	if p.encoder != nil && c.file == nil {
		return p.encoder.encode(c)
	}
	return nil
}

// The method collect adds a piece to the digests, writes it unless a worker did, and counts it.
func (p *pipeline) collect(ctx context.Context, c *piece) error {
	for i, s := range p.sums {
		if i == 0 {
			p.o.Counters.Collecting(progress.WaitEncoders)
		}
		if err := p.addToSum(ctx, s, i, c); err != nil {
			return err
		}
	}
	if !p.parallel {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		p.o.Counters.Collecting(progress.WaitTarget)
		if err := p.write(ctx, c); err != nil {
			return err
		}
	}
	p.cutter.count(c.part)
	if p.o.Verify {
		p.o.Counters.AddUnchecked(p.unread(c))
	}
	return nil
}

// The method addToSum adds a piece to s, one of the digests of the copy. The parameter i is the
// index of this digest.
func (p *pipeline) addToSum(ctx context.Context, s *digest.Sum, i int, c *piece) error {
	switch {
	case c.read:
		s.Blocks(&c.hashed[i])
		return nil
	case c.Kind == source.Inherited:
		return p.addBacking(ctx, s, c.Off, c.Len)
	}
	return s.ZeroContext(ctx, c.Len)
}

// addBacking adds n bytes of the backing image, which begin at the given offset, to the digest s.
func (p *pipeline) addBacking(ctx context.Context, s *digest.Sum, off, n int64) error {
	buf := make([]byte, min(n, int64(p.o.RequestSize)))
	for end := off + n; off < end; {
		if err := context.Cause(ctx); err != nil {
			return err
		}
		b := buf[:min(int64(len(buf)), end-off)]
		if err := p.reader.readBacking(b, off); err != nil {
			return err
		}
		s.Data(b)
		off += int64(len(b))
	}
	return nil
}

// write writes a piece or, if the piece has a file, lets the target share the blocks of that file.
// If the blocks cannot be shared, write copies their content or, with ReflinkAlways, returns an
// error.
func (p *pipeline) write(ctx context.Context, c *piece) error {
	if c.file == nil {
		return p.writer.write(c)
	}
	shared, err := p.writer.share(c)
	if shared || err != nil {
		return err
	}
	c.file = nil
	if c.buf != nil {
		p.inspector.scan(c)
		return p.writeScanned(c)
	}
	buf := make([]byte, min(c.Len, int64(p.o.RequestSize)))
	for rest := c.part; rest.Len > 0; {
		bit := piece{part: rest.head(int64(len(buf)))}
		bit.buf = buf[:bit.Len]
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := p.reader.fill(ctx, bit.buf, bit.Off); err != nil {
			return err
		}
		p.inspector.inspect(&bit)
		if err := p.writeScanned(&bit); err != nil {
			return err
		}
	}
	return nil
}

// The method writeScanned writes a piece that has been searched for zeros but not encoded yet.
func (p *pipeline) writeScanned(c *piece) error {
	if p.encoder != nil {
		if err := p.encoder.encode(c); err != nil {
			return err
		}
	}
	return p.writer.write(c)
}

// The method release frees the memory of a piece, so that the piece can be reused.
func (p *pipeline) release(c *piece) {
	c.releaseBuffer()
	if p.encoder != nil {
		p.encoder.releaseMemory(c)
	}
}
