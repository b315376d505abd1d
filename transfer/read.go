package transfer

import (
	"context"
	"fmt"
	"iter"

	"github.com/vddkcp/vddkcp/source"
)

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

// whole returns the source with what only the backing has: a disk whose content is
// known. It lives under ctx.
func (p *pipeline) whole(ctx context.Context) source.Disk {
	if p.o.Backing == nil {
		return p.src
	}
	return &wholeDisk{p, ctx}
}

type wholeDisk struct {
	p   *pipeline
	ctx context.Context
}

func (w *wholeDisk) Size() int64 { return w.p.src.Size() }

func (w *wholeDisk) Close() error { return nil }

func (w *wholeDisk) ReadAt(b []byte, off int64) (int, error) {
	if err := w.p.readMixed(w.ctx, b, off); err != nil {
		return 0, err
	}
	return len(b), nil
}

func (w *wholeDisk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		for e, err := range w.p.src.Extents(ctx, off, length) {
			if e.Kind == source.Inherited {
				e.Kind = source.Data
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// Identity is that of the source: whether the backing changed is looked at besides.
func (w *wholeDisk) Identity(ctx context.Context) (id, proof string, err error) {
	i, ok := source.Ability[source.Identified](w.p.src)
	if !ok {
		return "", "none", nil
	}
	return i.Identity(ctx)
}
