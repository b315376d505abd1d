package transfer

import (
	"context"
	"fmt"
	"iter"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// reader reads the content that is copied. It reads from the source. Where the source has
// Inherited extents, which only its parent image holds, it reads from the backing image of the
// target instead. It is safe for concurrent use.
type reader struct {
	src     source.Disk // marked by guard
	backing source.Disk // nil: none
	mixed   bool        // a range that is read as Data may have parts that only the backing image has
	limit   *Limiter    // nil: none

	counters *progress.Counters
}

// The method fill fills b with the content of the disk that begins at the given offset. Before the
// read it waits until the Limiter allows the read.
func (r *reader) fill(ctx context.Context, b []byte, off int64) error {
	if err := r.limit.wait(ctx, len(b), r.counters); err != nil {
		return err
	}
	r.counters.Begin(progress.WaitSource)
	defer r.counters.End(progress.WaitSource)
	if r.mixed {
		return r.readMixed(ctx, b, off)
	}
	return readFull(r.src, b, off)
}

// readMixed reads a range that may consist of data, zeros, and Inherited extents. It reads the
// Inherited extents from the backing image.
func (r *reader) readMixed(ctx context.Context, buf []byte, off int64) error {
	for e, err := range source.Covered(ctx, r.src, off, int64(len(buf))) {
		if err != nil {
			return fmt.Errorf("cannot query the extents of the source: %w", err)
		}
		b := buf[e.Off-off : e.End()-off]
		switch e.Kind {
		case source.Zero:
			clear(b)
		case source.Inherited:
			if err := r.readBacking(b, e.Off); err != nil {
				return err
			}
		default:
			if err := readFull(r.src, b, e.Off); err != nil {
				return err
			}
		}
	}
	return nil
}

// readBacking reads from the backing image. If the backing image is shorter than the disk, the
// range past the end of the image reads as zeros.
func (r *reader) readBacking(b []byte, off int64) error {
	if r.backing == nil {
		return fmt.Errorf("cannot read bytes [%d, %d): they are in the parent image of the source, which single-link leaves out, and the copy has no backing image to read them from", off, off+int64(len(b)))
	}
	n := max(0, min(int64(len(b)), r.backing.Size()-off))
	clear(b[n:])
	if n == 0 {
		return nil
	}
	if err := readFull(r.backing, b[:n], off); err != nil {
		return fmt.Errorf("cannot read the backing image: %w", err)
	}
	return nil
}

// readFull fills b with the content of the disk d that begins at the given offset. It returns
// errors of ReadAt unchanged, because they already name the range and the cause.
func readFull(d source.Disk, b []byte, off int64) error {
	n, err := d.ReadAt(b, off)
	if n == len(b) {
		return nil // err may be io.EOF at the end of the disk
	}
	if err == nil {
		err = fmt.Errorf("cannot read bytes [%d, %d): the disk returned only %d bytes and no error", off, off+int64(len(b)), n)
	}
	return err
}

// The method whole returns a disk with all the content that is copied. If there is no backing
// image, this disk is the source itself. If there is one, the disk has Data where the source has
// Inherited extents, and reads this data from the backing image. Each read of such a disk first
// queries the extents of the source with the context ctx, so the read fails when ctx has ended. The
// caller must not close the disk.
func (r *reader) whole(ctx context.Context) source.Disk {
	if r.backing == nil {
		return r.src
	}
	return &wholeDisk{r, ctx}
}

// wholeDisk is a source whose Inherited extents are read from the backing image.
type wholeDisk struct {
	r   *reader
	ctx context.Context
}

func (w *wholeDisk) Size() int64  { return w.r.src.Size() }
func (w *wholeDisk) Close() error { return nil }

func (w *wholeDisk) ReadAt(b []byte, off int64) (int, error) {
	if err := w.r.readMixed(w.ctx, b, off); err != nil {
		return 0, err
	}
	return len(b), nil
}

// Extents yields the extents of the source, but yields its Inherited extents as Data.
func (w *wholeDisk) Extents(ctx context.Context, off, length int64) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		for e, err := range w.r.src.Extents(ctx, off, length) {
			if e.Kind == source.Inherited {
				e.Kind = source.Data
			}
			if !yield(e, err) {
				return
			}
		}
	}
}

// Identity returns the identity of the source alone. Changes of the backing image are
// detected by backing.unchanged.
func (w *wholeDisk) Identity(ctx context.Context) (id, proof string, err error) {
	i, ok := source.Ability[source.Identified](w.r.src)
	if !ok {
		return "", "none", nil
	}
	return i.Identity(ctx)
}
