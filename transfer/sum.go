package transfer

import (
	"context"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// Sum returns the digest of the content of a disk, in lower-case hexadecimal digits. Holes are
// not read. Sum needs 2 x Requests x RequestSize bytes of memory for buffers, and about 8 MiB
// for the extents. The error is an ErrDiskChanged if the disk changed while it was read. A disk
// with Inherited extents is an error, because the content of such extents is in a parent image that
// Sum does not have.
func Sum(ctx context.Context, d source.Disk, a digest.Algorithm, o CompareOptions) (value string, err error) {
	s := &summing{o: o.normal(), sum: digest.New(a)}
	s.side = side{Disk: d, counters: s.o.Counters}
	if s.o.account.check { // the disk is the target of a copy
		s.wait = progress.WaitTarget
	}
	// A blksum consists of hashes of 64 KiB blocks. Workers can hash only whole blocks, so
	// requests consist of whole blocks.
	s.o.RequestSize = (s.o.RequestSize + digest.BlockSize - 1) / digest.BlockSize * digest.BlockSize
	if err := s.makePlan(ctx); err != nil {
		return "", err
	}
	if err := s.count(ctx); err != nil {
		return "", err
	}
	s.o.Counters.Enter(progress.Verify)
	// There are two buffers for each concurrent read: one that is being filled, and one
	// that is hashed and waits to be collected.
	release, err := s.reserve(2*s.o.Requests, s.o.RequestSize)
	if err != nil {
		return "", err
	}
	defer func() {
		if released := release(); err == nil {
			err = released
		}
	}()
	err = runOrdered(ctx, nil, s.o.Requests, maxPieces, stages[summedPiece]{
		produce: s.produce,
		work:    s.hash,
		collect: s.fold,
		release: (*summedPiece).releaseBuffer,

		counters: s.o.Counters,
	})
	if err != nil {
		return "", err
	}
	if err := s.unchanged(ctx); err != nil {
		return "", err
	}
	return s.sum.Value(), nil
}

// The type summing holds the state of one call of Sum.
type summing struct {
	side
	o   CompareOptions
	sum *digest.Sum // used only by the collector while the stages run
}

// summedPiece is a range within one extent, with its buffer and its hashes.
type summedPiece struct {
	source.Extent
	buffer               // of Len bytes if Kind is Data, else empty
	blocks digest.Blocks // hashes of buf
}

// countsAsWork reports whether an extent of the given kind is counted as work. For a blksum
// zeros are no work, because they take hardly any time.
func (s *summing) countsAsWork(kind source.Kind) bool {
	return kind == source.Data || s.sum.Algorithm() != digest.Blksum
}

// The method count adds the bytes of every extent to the planned or to the skipped bytes of the
// counters.
func (s *summing) count(ctx context.Context) error {
	for e, err := range s.extents(ctx) {
		if err != nil {
			return err
		}
		if s.countsAsWork(e.Kind) {
			s.o.account.plan(e.Len)
		} else {
			s.o.account.skip(e.Len)
		}
	}
	return nil
}

// The method produce sends the extents of the disk as pieces. Data is cut at multiples of the
// request's size.
func (s *summing) produce(ctx context.Context, o *ordered[summedPiece]) error {
	size := int64(s.o.RequestSize)
	for e, err := range s.extents(ctx) {
		if err != nil {
			return err
		}
		for e.Len > 0 {
			it, err := o.acquire(ctx)
			if err != nil {
				return err
			}
			p, n := &it.value, e.Len
			switch {
			case e.Kind == source.Data:
				n = min(n, size-e.Off%size)
				// The producer acquires the buffers, in the order of the pieces. If the
				// workers acquired them, later pieces could have all buffers, and an earlier
				// piece would wait forever for one.
				if p.buf, p.free, err = s.buffers.Buffer(ctx, int(n)); err != nil {
					return err
				}
			case s.countsAsWork(e.Kind):
				n = min(n, zeroPiece)
			}
			p.Extent = source.Extent{Off: e.Off, Len: n, Kind: e.Kind}
			e.Off, e.Len = e.Off+n, e.Len-n
			o.send(it, p.Kind != source.Data)
		}
	}
	return nil
}

// The method hash reads and hashes a piece of data.
func (s *summing) hash(ctx context.Context, p *summedPiece) error {
	if err := s.o.Limit.wait(ctx, len(p.buf), s.counters); err != nil {
		return err
	}
	if err := s.read(p.buf, p.Off); err != nil {
		return err
	}
	s.o.account.read(p.Len)
	s.counters.Begin(progress.WaitEncoders)
	defer s.counters.End(progress.WaitEncoders)
	s.sum.Algorithm().Hash(p.Off, p.buf, &p.blocks)
	return nil
}

// The method fold adds a piece to the digest.
func (s *summing) fold(ctx context.Context, p *summedPiece) error {
	s.counters.Collecting(progress.WaitEncoders)
	if p.Kind != source.Data {
		if err := s.sum.ZeroContext(ctx, p.Len); err != nil {
			return err
		}
	} else {
		s.sum.Blocks(&p.blocks)
	}
	if s.countsAsWork(p.Kind) {
		s.o.account.add(p.Len)
	}
	return nil
}
