package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sync/errgroup"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// CopyStream fills dst with what r gives until its end, makes it durable and
// publishes it. The stream must be of size bytes; with sink.UnknownSize, dst
// must have been created with that and is as long as the stream turns out to
// be. On any error dst is aborted. The result's Size is how many bytes came.
func CopyStream(ctx context.Context, r io.Reader, size int64, dst sink.Disk, o Options) (result Result, err error) {
	defer func() {
		if err != nil && !errors.As(err, new(*MismatchError)) {
			err = aborted(dst, err)
		}
	}()
	zeroed := isZeroed(dst)
	o = o.normal(dst, zeroed)
	if err := o.identifyBacking(ctx); err != nil {
		return result, err
	}
	o.Counters.Enter(progress.Copy)
	if size != sink.UnknownSize {
		o.Counters.AddPlanned(size)
	}
	o.Keep, o.Reopen = nil, nil // what a stream gave is not given again
	p := newPipeline(nil, dst, nil, o, zeroed)
	if err := p.begin(ctx, nil, 0, false); err != nil {
		return result, err
	}
	release, err := p.reserve()
	if err != nil {
		return result, err
	}
	g, gctx := errgroup.WithContext(ctx)
	if o.Interrupt != nil {
		defer context.AfterFunc(gctx, func() { o.Interrupt(context.Cause(gctx)) })()
	}
	g.Go(func() error {
		var err error
		result.Size, err = p.produceStream(gctx, r, size)
		return err
	})
	// One looks for zeros as fast as a stream comes.
	for range max(1, len(p.sums), cap(p.codes)/2) {
		g.Go(func() error { return p.worker(gctx) })
	}
	g.Go(func() error { return p.collect(gctx) })
	err = g.Wait()
	if released := release(); err == nil {
		err = released
	}
	if err != nil {
		return result, err
	}
	if size == sink.UnknownSize {
		sizer, ok := sink.Ability[sink.Sizer](dst)
		if !ok {
			return result, fmt.Errorf("the target must know the size of the stream beforehand: %w", errors.ErrUnsupported)
		}
		if err := sizer.SetSize(result.Size); err != nil {
			return result, err
		}
	}
	if err := o.backingUnchanged(ctx); err != nil {
		return result, err
	}
	return result, p.finish(ctx, &result)
}

// produceStream reads r to its end and sends what it holds off in order.
func (p *pipeline) produceStream(ctx context.Context, r io.Reader, size int64) (off int64, err error) {
	defer close(p.work)
	defer close(p.order)
	for {
		c, err := p.take(ctx)
		if err != nil {
			return off, err
		}
		if err := p.takeBuffer(ctx, c, p.o.RequestSize); err != nil {
			return off, err
		}
		n, err := io.ReadFull(r, c.buf)
		ended := errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF)
		if err != nil && !ended {
			return off, fmt.Errorf("read the stream at %d: %w", off, err)
		}
		switch came := off + int64(n); {
		case size == sink.UnknownSize:
		case came > size:
			return off, fmt.Errorf("the stream is longer than the %d bytes it should have", size)
		case ended && came < size:
			return off, fmt.Errorf("the stream ended after %d of %d bytes", came, size)
		}
		if n > 0 {
			if err := p.o.Limit.Wait(ctx, n); err != nil {
				return off, err
			}
			c.off, c.n, c.kind, c.buf, c.file = off, int64(n), source.Data, c.buf[:n], nil
			// Both channels have room for every piece there is.
			p.order <- c
			p.work <- c
			off += int64(n)
		}
		if ended {
			return off, nil
		}
	}
}
