package transfer

import (
	"context"
	"fmt"
	"iter"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// CompareOptions tune Compare and Sum. The zero value is the default.
type CompareOptions struct {
	RequestSize int                // bytes read at once from a disk; 0: 1 MiB
	Requests    int                // requests in flight; 0: 4. Compare's read one disk after the other
	Limit       *Limiter           // bounds what is read of both disks together; nil: none
	Counters    *progress.Counters // filled meanwhile, in bytes of the disk; nil: not

	// Strict compares the allocation too: what is data in one disk and a hole
	// in the other is a difference, whatever it reads as. For Compare only.
	Strict bool
	// TargetMayBeLonger is for block devices and NBD servers, which have no
	// size of the disk's choice: what lies past the source's end is not looked
	// at. For Compare only.
	TargetMayBeLonger bool
}

func (o CompareOptions) normal() CompareOptions {
	if o.RequestSize == 0 {
		o.RequestSize = defaultRequest
	}
	if o.Requests == 0 {
		o.Requests = defaultRequests
	}
	if o.Counters == nil {
		o.Counters = new(progress.Counters)
	}
	return o
}

// Compare compares two disks and returns nil where they are the same. It reads
// only what one of them has data for, and goes on after the first difference,
// for the counts. Memory is bounded: 2 x Requests x RequestSize, and what is
// remembered of the extents.
//
// Errors begin with the side that failed, "source: " or "target: ". A disk that
// changes meanwhile is an ErrDiskChanged. Disks with Inherited extents are refused:
// their content is not known.
func Compare(ctx context.Context, src, dst source.Disk, o CompareOptions) (*Difference, error) {
	c := &comparison{o: o.normal(), size: src.Size()}
	diff := &Difference{SourceSize: src.Size(), TargetSize: dst.Size()}
	if diff.SourceSize > diff.TargetSize || diff.SourceSize < diff.TargetSize && !o.TargetMayBeLonger {
		diff.SizesDiffer = true
		return diff, nil
	}
	for i, d := range []source.Disk{src, dst} {
		c.sides[i] = side{Disk: d, name: [...]string{"source", "target"}[i]}
	}
	g, planning := errgroup.WithContext(ctx)
	for i := range c.sides {
		g.Go(func() error { return c.sides[i].ask(planning) })
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if err := c.plan(ctx, diff); err != nil {
		return nil, err
	}
	c.o.Counters.Enter(progress.Verify)
	found, err := c.run(ctx)
	if err != nil {
		return nil, err
	}
	for i := range c.sides {
		if err := c.sides[i].unchanged(ctx); err != nil {
			return nil, err
		}
	}
	if found.ranges == 0 && diff.Allocation.Ranges == 0 {
		return nil, nil
	}
	diff.First, diff.Source, diff.Target, diff.Ranges, diff.Bytes = found.first, found.a, found.b, found.ranges, found.bytes
	return diff, nil
}

// comparison is a Compare under way.
type comparison struct {
	o     CompareOptions
	size  int64 // to compare, from the start of both disks
	sides [2]side
}

// pair is a range of both disks, in bytes, and whether it must be read of each
// to be known, or is zeros.
type pair struct {
	off, n int64
	data   [2]bool
}

func (p pair) end() int64   { return p.off + p.n }
func (p pair) equal() bool  { return !p.data[0] && !p.data[1] } // without reading
func (p pair) differ() bool { return p.data[0] != p.data[1] }   // in allocation

// pairs yields, ascending and touching, what the extents of both sides make of
// the disk. Extents may be any cover of the sides; what differs in nothing but
// its place is merged.
func (c *comparison) pairs(extents [2]iter.Seq2[source.Extent, error]) iter.Seq2[pair, error] {
	return func(yield func(pair, error) bool) {
		var next [2]func() (source.Extent, error, bool)
		for i := range next {
			pull, stop := iter.Pull2(extents[i])
			defer stop()
			next[i] = pull
		}
		var now [2]source.Extent
		var held pair
		for off := int64(0); off < c.size; {
			p := pair{off: off, n: c.size - off}
			for i := range now {
				if now[i].End() == off {
					e, err, ok := next[i]()
					if err == nil && !ok {
						err = c.sides[i].failed(fmt.Errorf("extents end at %d of %d", off, c.size))
					}
					if err != nil {
						yield(pair{}, err)
						return
					}
					now[i] = e
				}
				p.data[i] = now[i].Kind != source.Zero
				p.n = min(p.n, now[i].End()-off)
			}
			off = p.end()
			if held.n > 0 && held.data == p.data {
				held.n += p.n
				continue
			}
			if held.n > 0 && !yield(held, nil) {
				return
			}
			held = p
		}
		if held.n > 0 {
			yield(held, nil)
		}
	}
}

// reads is what must be read.
func (c *comparison) reads(ctx context.Context) iter.Seq2[pair, error] {
	return c.pairs([2]iter.Seq2[source.Extent, error]{c.sides[0].extents(ctx), c.sides[1].extents(ctx)})
}

// plan counts the work, and with Strict compares the allocation.
func (c *comparison) plan(ctx context.Context, diff *Difference) error {
	for p, err := range c.reads(ctx) {
		if err != nil {
			return err
		}
		if p.equal() {
			c.o.Counters.AddSkipped(p.n)
		} else {
			c.o.Counters.AddPlanned(p.n)
		}
	}
	if !c.o.Strict {
		return nil
	}
	a := &diff.Allocation
	var last pair
	for p, err := range c.pairs([2]iter.Seq2[source.Extent, error]{
		c.sides[0].plan.extents(ctx, c.sides[0].Disk),
		c.sides[1].plan.extents(ctx, c.sides[1].Disk),
	}) {
		if err != nil {
			return err
		}
		if p.differ() {
			if a.Ranges == 0 {
				a.First, a.Source, a.Target = p.off, kindOf(p.data[0]), kindOf(p.data[1])
			}
			if !last.differ() {
				a.Ranges++
			}
			a.Bytes += p.n
		}
		last = p
	}
	return nil
}

func kindOf(data bool) source.Kind {
	if data {
		return source.Data
	}
	return source.Zero
}

// comparedPiece is a part of a pair, at most a request long.
type comparedPiece struct {
	pair
	found tally
}

// run reads and compares what must be read.
func (c *comparison) run(ctx context.Context) (found tally, err error) {
	for i := range c.sides {
		var release func() error
		if release, err = c.sides[i].reserve(c.o.Requests, c.o.RequestSize); err != nil {
			return tally{}, err
		}
		defer func() {
			if released := release(); err == nil {
				err = released
			}
		}()
	}
	// One slow read holds up the rest when so many are behind it.
	err = runOrdered(ctx, nil, c.o.Requests, 8*c.o.Requests, stages[comparedPiece]{
		produce: c.produce,
		work:    c.compare,
		collect: func(_ context.Context, p *comparedPiece) error {
			c.o.Counters.AddDone(p.n)
			found.join(&p.found)
			return nil
		},
	})
	return found, err
}

// produce cuts what must be read at multiples of the request's size, so that
// no grain or cluster is needed by two requests.
func (c *comparison) produce(ctx context.Context, o *ordered[comparedPiece]) error {
	size := int64(c.o.RequestSize)
	for r, err := range c.reads(ctx) {
		if err != nil {
			return err
		}
		for !r.equal() && r.n > 0 {
			it, err := o.acquire(ctx)
			if err != nil {
				return err
			}
			p := pair{r.off, min(r.n, size-r.off%size), r.data}
			r.off, r.n = p.end(), r.n-p.n
			it.value.pair = p
			o.send(it, false)
		}
	}
	return nil
}

// compare reads a piece of both disks, but for what is zeros, and compares.
func (c *comparison) compare(ctx context.Context, p *comparedPiece) error {
	var content [2][]byte
	for i := range c.sides {
		if !p.data[i] {
			continue // nil is zeros
		}
		s := &c.sides[i]
		b, free, err := s.buffers.Buffer(ctx, int(p.n))
		if err != nil {
			return s.failed(err)
		}
		defer free()
		if err := c.o.Limit.Wait(ctx, len(b)); err != nil {
			return err
		}
		if err := readFull(s.Disk, b, p.off); err != nil {
			return s.failed(err)
		}
		c.o.Counters.AddRead(p.n)
		content[i] = b
	}
	p.found = tally{}
	p.found.add(content[0], content[1], p.off, int(p.n))
	return nil
}
