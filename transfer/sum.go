package transfer

import (
	"context"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// Sum returns the digest of a disk's content, as lower case hexadecimal
// digits. Holes are not read. Memory is bounded: 2 x Requests x RequestSize,
// and what is remembered of the extents. A disk that changes meanwhile is an
// ErrDiskChanged. A disk with Inherited extents is refused: its content is not
// known.
func Sum(ctx context.Context, d source.Disk, a digest.Algorithm, o CompareOptions) (value string, err error) {
	s := &summing{o: o.normal(), side: side{Disk: d}, sum: digest.New(a)}
	// Only whole blocks can be hashed by the readers.
	s.o.RequestSize = (s.o.RequestSize + digest.BlockSize - 1) / digest.BlockSize * digest.BlockSize
	if err := s.ask(ctx); err != nil {
		return "", err
	}
	if err := s.count(ctx); err != nil {
		return "", err
	}
	s.o.Counters.Enter(progress.Verify)
	// Twice what is being read: the rest is hashed and waits for its turn.
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
		work:    s.read,
		collect: s.fold,
		release: (*summedPiece).release,
	})
	if err != nil {
		return "", err
	}
	if err := s.unchanged(ctx); err != nil {
		return "", err
	}
	return s.sum.Value(), nil
}

// summing is a Sum under way.
type summing struct {
	side
	o   CompareOptions
	sum *digest.Sum // the folding goroutine's
}

// summedPiece is an extent's part.
type summedPiece struct {
	source.Extent
	buf    []byte // of Len bytes, when Kind is Data
	free   func()
	blocks digest.Blocks
}

// release frees the buffer, if the piece has one.
func (p *summedPiece) release() {
	if p.free != nil {
		p.free()
		p.buf, p.free = nil, nil
	}
}

// works says whether an extent of that kind costs time.
func (s *summing) works(kind source.Kind) bool {
	return kind == source.Data || s.sum.Algorithm() != digest.Blksum
}

func (s *summing) count(ctx context.Context) error {
	for e, err := range s.extents(ctx) {
		if err != nil {
			return err
		}
		if s.works(e.Kind) {
			s.o.Counters.AddPlanned(e.Len)
		} else {
			s.o.Counters.AddSkipped(e.Len)
		}
	}
	return nil
}

// produce cuts data at multiples of the request's size.
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
				// Here and not by the workers: buffers must not all go to
				// pieces that wait for one that has none.
				if p.buf, p.free, err = s.buffers.Buffer(ctx, int(n)); err != nil {
					return err
				}
			case s.works(e.Kind):
				n = min(n, zeroPiece)
			}
			p.Extent = source.Extent{Off: e.Off, Len: n, Kind: e.Kind}
			e.Off, e.Len = e.Off+n, e.Len-n
			o.send(it, p.Kind != source.Data)
		}
	}
	return nil
}

func (s *summing) read(ctx context.Context, p *summedPiece) error {
	if err := s.o.Limit.Wait(ctx, len(p.buf)); err != nil {
		return err
	}
	if err := readFull(s.Disk, p.buf, p.Off); err != nil {
		return err
	}
	s.o.Counters.AddRead(p.Len)
	s.sum.Algorithm().Hash(p.Off, p.buf, &p.blocks)
	return nil
}

func (s *summing) fold(ctx context.Context, p *summedPiece) error {
	if p.Kind != source.Data {
		if err := s.sum.ZeroContext(ctx, p.Len); err != nil {
			return err
		}
	} else {
		s.sum.Blocks(&p.blocks)
	}
	if s.works(p.Kind) {
		s.o.Counters.AddDone(p.Len)
	}
	return nil
}
