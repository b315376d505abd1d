package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// CopyStream fills dst with the bytes of the stream r. It makes dst durable and publishes it, which
// gives it its final name. With Options.Hold, it suspends dst instead. The parameter size is the
// number of bytes that the stream must have, or sink.UnknownSize. With sink.UnknownSize, dst must
// have been created with sink.UnknownSize too, and becomes as long as the stream. After an error
// dst is aborted, unless the error is a *MismatchError.
//
// Result.Size is the number of bytes read. CopyStream ignores Options.Resume, Keep, Reopen and
// Reflink, because a stream cannot be read again.
func CopyStream(ctx context.Context, r io.Reader, size int64, dst sink.Disk, o Options) (result Result, err error) {
	defer func() {
		if err != nil && !errors.As(err, new(*MismatchError)) {
			err = abort(dst, err)
		}
	}()
	o.Resume, o.Keep, o.Reopen, o.Reflink = nil, nil, nil, ReflinkNever
	c, err := newCopying(ctx, nil, dst, nil, o)
	if err != nil {
		return result, err
	}
	c.o.Counters.Enter(progress.Copy)
	defer c.o.Counters.Background(progress.WaitSource)()
	if size != sink.UnknownSize {
		c.o.Counters.AddPlanned(size)
		c.planChecks(size, size)
	}
	if err := c.begin(dst, nil, false); err != nil {
		return result, err
	}
	p, err := newPipeline(ctx, c)
	if err != nil {
		return result, err
	}
	s := &stream{r: r, size: size, p: p, interrupt: c.o.Interrupt}
	err = p.runStream(ctx, s)
	result.Size = s.off
	if err != nil {
		return result, err
	}
	if size == sink.UnknownSize {
		sizer, ok := sink.Ability[sink.Sizer](dst)
		if !ok {
			return result, fmt.Errorf("the size of the stream is unknown, but a target of this kind can be created only with a known size: %w", errors.ErrUnsupported)
		}
		if err := sizer.SetSize(result.Size); err != nil {
			return result, err
		}
		c.o.Counters.AddPlanned(result.Size)
		c.planChecks(result.Size, result.Size)
	}
	if err := c.backing.unchanged(ctx); err != nil {
		return result, err
	}
	return result, c.finish(ctx, &result)
}

// stream reads the stream of CopyStream and sends it to a pipeline.
type stream struct {
	r         io.Reader
	size      int64 // expected, in bytes, or sink.UnknownSize
	off       int64 // bytes read and sent
	p         *pipeline
	interrupt func(cause error) // Options.Interrupt
}

// The method produce reads the stream to its end and sends its bytes as pieces to the pipeline.
func (s *stream) produce(ctx context.Context, o *ordered[piece]) error {
	if s.interrupt != nil {
		defer context.AfterFunc(ctx, func() { s.interrupt(context.Cause(ctx)) })()
	}
	for {
		it, err := o.acquire(ctx)
		if err != nil {
			return err
		}
		c := &it.value
		if err := s.p.acquireBuffer(ctx, c, s.p.o.RequestSize); err != nil {
			return err
		}
		counters := s.p.o.Counters
		counters.Begin(progress.WaitSource)
		n, ended, err := s.read(c.buf)
		counters.End(progress.WaitSource)
		if err != nil {
			return err
		}
		if n > 0 {
			if err := s.p.o.Limit.wait(ctx, n, counters); err != nil {
				return err
			}
			c.part = part{Extent: source.Extent{Off: s.off, Len: int64(n)}}
			c.buf, c.read = c.buf[:n], true
			o.send(it, false)
			s.off += int64(n)
		}
		if ended {
			return nil
		}
	}
}

// The method read fills b, or reads to the end of the stream. It returns an error if the stream has
// another size than expected.
func (s *stream) read(b []byte) (n int, ended bool, err error) {
	n, err = io.ReadFull(s.r, b)
	ended = errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
	if err != nil && !ended {
		return n, false, fmt.Errorf("cannot read the stream at byte %d: %w", s.off, err)
	}
	switch end := s.off + int64(n); {
	case s.size == sink.UnknownSize:
	case end > s.size:
		return n, ended, fmt.Errorf("the stream has more than the expected %d bytes", s.size)
	case ended && end < s.size:
		return n, ended, fmt.Errorf("the stream ended after %d of the expected %d bytes", end, s.size)
	}
	return n, ended, nil
}
