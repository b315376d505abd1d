package transfer

import (
	"context"
	"errors"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
)

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

// share makes a piece of the target share its blocks with the source's file.
func (p *pipeline) share(ctx context.Context, c *piece) error {
	cloner, _ := sink.Ability[sink.Cloner](p.dst)
	err := cloner.CloneFrom(c.file, c.pos, c.off, c.n)
	if err == nil {
		p.o.Counters.AddCloned(c.n)
		return nil
	}
	if p.o.Reflink == ReflinkAlways || !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	// The file system promised it and does not do it for this range.
	c.file = nil
	if c.buf != nil {
		p.scan(c)
		return p.writeHere(ctx, c)
	}
	return p.copyHere(ctx, c)
}

// writeHere writes a piece that was read and scanned, and not encoded by a
// worker.
func (p *pipeline) writeHere(ctx context.Context, c *piece) error {
	if p.encoder != nil {
		if err := p.encode(c); err != nil {
			return err
		}
	}
	return p.write(ctx, c)
}

// copyHere reads and writes a piece that has no buffer, bit by bit.
func (p *pipeline) copyHere(ctx context.Context, c *piece) error {
	buf := make([]byte, min(c.n, int64(p.o.RequestSize)))
	for done := int64(0); done < c.n; {
		bit := piece{off: c.off + done, n: min(c.n-done, int64(len(buf))), kind: source.Data}
		bit.buf = buf[:bit.n]
		if err := context.Cause(ctx); err != nil {
			return err
		}
		if err := p.fill(ctx, &bit); err != nil {
			return err
		}
		p.look(&bit)
		if err := p.writeHere(ctx, &bit); err != nil {
			return err
		}
		done += bit.n
	}
	return nil
}
