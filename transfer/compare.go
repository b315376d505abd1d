package transfer

import (
	"context"
	"fmt"
	"iter"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// CompareOptions tune Compare and Sum. The zero value has the default of every option.
type CompareOptions struct {
	// RequestSize is how many bytes are read at once; 0 means 1 MiB.
	RequestSize int
	// Requests is how many requests are in progress at a time; 0 means 4. A request of
	// Compare reads the same range of both disks, first from the source and then from the target.
	Requests int
	// Limit limits the rate of reading, for both disks together; nil means no limit.
	Limit *Limiter
	// Counters are updated during the comparison. They may be nil.
	Counters *progress.Counters

	// Strict also compares the allocation: a range that is data in one disk and a hole in the other
	// is a difference even if it reads as zeros in both. Sum ignores the option Strict.
	Strict bool
	// If TargetMayBeLonger is set, content of the target after the end of the source is ignored.
	// The option is for block devices and NBD exports, whose size the copy did not choose. Sum
	// ignores it.
	TargetMayBeLonger bool

	account *account // updates Counters; nil: the reading is no check after a copy
}

// The method normal returns the options with their defaults filled in.
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
	if o.account == nil {
		o.account = &account{counters: o.Counters}
	}
	return o
}

// Compare compares two disks and returns nil if they are equal. It reads only ranges in which
// at least one of the disks has data. After the first difference it continues, to count all
// differences. It needs 2 x Requests x RequestSize bytes of memory for buffers, and about 8 MiB
// for the extents of each disk.
//
// The text of an error begins with the disk that failed, "source: " or "target: ". The error is
// an ErrDiskChanged if a disk changed during the comparison. A disk with Inherited extents is an
// error, because the content of such extents is in a parent image that Compare does not have.
func Compare(ctx context.Context, src, dst source.Disk, o CompareOptions) (*Difference, error) {
	c := &comparison{o: o.normal(), size: src.Size()}
	diff := &Difference{SourceSize: src.Size(), TargetSize: dst.Size()}
	if diff.SourceSize > diff.TargetSize || diff.SourceSize < diff.TargetSize && !o.TargetMayBeLonger {
		diff.SizesDiffer = true
		return diff, nil
	}
	for i, d := range []source.Disk{src, dst} {
		c.sides[i] = side{Disk: d, name: [...]string{"source", "target"}[i], wait: [...]progress.Wait{progress.WaitSource, progress.WaitTarget}[i], counters: c.o.Counters}
	}
	g, planning := errgroup.WithContext(ctx)
	for i := range c.sides {
		g.Go(func() error { return c.sides[i].makePlan(planning) })
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

// comparison holds the state of one call of Compare.
type comparison struct {
	o     CompareOptions
	size  int64   // bytes to compare, from the start of both disks
	sides [2]side // source and target
}

// pair is a range of both disks in which each disk has either only data or only zeros.
type pair struct {
	off, n int64   // bytes
	data   [2]bool // whether each disk has data, which must be read, or reads as zeros
}

// The method end returns the offset of the first byte after the range.
func (p pair) end() int64 { return p.off + p.n }

// The method equal reports whether both disks have only zeros in the range. If they do, the range
// need not be read.
func (p pair) equal() bool { return !p.data[0] && !p.data[1] }

// The method differ reports whether, in the range, one disk has data and the other disk has a hole.
func (p pair) differ() bool { return p.data[0] != p.data[1] }

// The method pairs divides both disks at the borders of all their extents, and yields the resulting
// ranges, ascending and without gaps. The extents of each disk must cover all bytes that are
// compared. Neighbouring ranges with the same values in pair.data are merged.
func (c *comparison) pairs(extents [2]iter.Seq2[source.Extent, error]) iter.Seq2[pair, error] {
	return func(yield func(pair, error) bool) {
		var next [2]func() (source.Extent, error, bool)
		for i := range next {
			pull, stop := iter.Pull2(extents[i])
			defer stop()
			next[i] = pull
		}
		var now [2]source.Extent
		var merged pair // not yielded yet
		for off := int64(0); off < c.size; {
			p := pair{off: off, n: c.size - off}
			for i := range now {
				if now[i].End() == off {
					e, err, ok := next[i]()
					if err == nil && !ok {
						err = c.sides[i].addName(fmt.Errorf("the disk reported extents only up to byte %d, but %d bytes must be compared", off, c.size))
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
			if merged.n > 0 && merged.data == p.data {
				merged.n += p.n
				continue
			}
			if merged.n > 0 && !yield(merged, nil) {
				return
			}
			merged = p
		}
		if merged.n > 0 {
			yield(merged, nil)
		}
	}
}

// The method reads divides both disks as the method pairs does, except that a short hole between
// data counts as data. Such a hole is read together with the data around it, because that costs
// less than another request.
func (c *comparison) reads(ctx context.Context) iter.Seq2[pair, error] {
	return c.pairs([2]iter.Seq2[source.Extent, error]{c.sides[0].extents(ctx), c.sides[1].extents(ctx)})
}

// The method plan adds the bytes that will be read to the counter of planned bytes, and all other
// bytes to the counter of skipped bytes. With CompareOptions.Strict it also compares the allocation
// of the disks.
func (c *comparison) plan(ctx context.Context, diff *Difference) error {
	for p, err := range c.reads(ctx) {
		if err != nil {
			return err
		}
		if p.equal() {
			c.o.account.skip(p.n)
		} else {
			c.o.account.plan(p.n)
		}
	}
	if !c.o.Strict {
		return nil
	}
	return c.compareAllocation(ctx, &diff.Allocation)
}

// compareAllocation compares the extents of the disks. It counts the ranges in which only one disk
// has data, and stores the counts in the parameter result.
func (c *comparison) compareAllocation(ctx context.Context, result *AllocationDifference) error {
	var last pair
	for p, err := range c.pairs([2]iter.Seq2[source.Extent, error]{
		c.sides[0].plan.extents(ctx, c.sides[0].Disk),
		c.sides[1].plan.extents(ctx, c.sides[1].Disk),
	}) {
		if err != nil {
			return err
		}
		if p.differ() {
			if result.Ranges == 0 {
				result.First, result.Source, result.Target = p.off, kindOf(p.data[0]), kindOf(p.data[1])
			}
			if !last.differ() {
				result.Ranges++
			}
			result.Bytes += p.n
		}
		last = p
	}
	return nil
}

// kindOf returns source.Data if data is true, else source.Zero.
func kindOf(data bool) source.Kind {
	if data {
		return source.Data
	}
	return source.Zero
}

// comparedPiece is a range that is read with one request to each disk, and the
// differences found in it.
type comparedPiece struct {
	pair
	found tally
}

// The method run reads all pairs in which at least one disk has data, and compares their content.
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
	// There are eight pieces for each worker, because the pieces are collected in their order.
	// While the read of one worker is slow, the other workers can continue with later pieces.
	err = runOrdered(ctx, nil, c.o.Requests, 8*c.o.Requests, stages[comparedPiece]{
		produce: c.produce,
		work:    c.compare,
		collect: func(_ context.Context, p *comparedPiece) error {
			c.o.account.add(p.n)
			found.join(&p.found)
			return nil
		},
	})
	return found, err
}

// The method produce sends to the workers all pairs that must be read. It cuts the pairs at
// multiples of the request size, so that no grain or cluster of a disk is read by two requests.
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

// The method compare reads the range of a piece from both disks and compares the content. A disk
// that has a hole in this range is not read, because its content is zeros.
func (c *comparison) compare(ctx context.Context, p *comparedPiece) error {
	var content [2][]byte // nil: zeros
	for i := range c.sides {
		if !p.data[i] {
			continue
		}
		s := &c.sides[i]
		b, free, err := s.buffers.Buffer(ctx, int(p.n))
		if err != nil {
			return s.addName(err)
		}
		defer free()
		if err := c.o.Limit.wait(ctx, len(b), c.o.Counters); err != nil {
			return err
		}
		if err := s.read(b, p.off); err != nil {
			return s.addName(err)
		}
		c.o.account.read(p.n)
		content[i] = b
	}
	c.o.Counters.Begin(progress.WaitEncoders)
	defer c.o.Counters.End(progress.WaitEncoders)
	p.found = tally{}
	p.found.add(content[0], content[1], p.off, int(p.n))
	return nil
}
