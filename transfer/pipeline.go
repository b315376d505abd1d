package transfer

import (
	"context"
	"errors"
	"math/bits"
	"os"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
)

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
