package transfer

import (
	"context"
	"errors"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// writer passes pieces to the sink. If the sink is Parallel, the writer is safe for concurrent
// use.
type writer struct {
	dst       sink.Disk
	encoder   *encoder // nil: the sink takes units as they are
	counters  *progress.Counters
	mustShare bool // a piece that cannot be shared is an error and not copied

	// ctx is the context of all calls to the sink. It does not end when another goroutine of the
	// pipeline fails. If it ended then, a call to the sink could be interrupted, and after an
	// interrupted call the sink would not accept a last checkpoint.
	ctx context.Context
}

// The method write writes a piece to the sink, as data or zeros. The piece must not be one whose
// blocks are shared with the source.
func (w *writer) write(c *piece) error {
	if c.Kind != source.Data {
		return w.writeEmpty(c.Off, c.Len, c.Kind)
	}
	units := 0 // of c.coded, written so far
	for _, r := range c.runs {
		off := c.Off + int64(r.start)
		switch {
		case r.zero:
			if err := w.writeEmpty(off, int64(r.end-r.start), source.Zero); err != nil {
				return err
			}
		case w.encoder != nil:
			n, err := w.place(c, r, units)
			if err != nil {
				return err
			}
			units += n
		default:
			if _, err := w.dst.WriteAt(c.buf[r.start:r.end], off); err != nil {
				return err
			}
			w.counters.AddWritten(int64(r.end - r.start))
		}
	}
	return nil
}

// writeEmpty handles a range without data. It zeros the range or, if kind is Inherited, leaves
// the content of the range to the backing image.
func (w *writer) writeEmpty(off, n int64, kind source.Kind) error {
	if kind == source.Inherited {
		return w.dst.SameAt(w.ctx, off, n)
	}
	if err := w.dst.ZeroAt(w.ctx, off, n); err != nil {
		return err
	}
	w.counters.AddZeroed(n)
	return nil
}

// The method place passes the encoded units of one run of the piece c to the sink. The run is r,
// one of the runs in c.runs that count as data. The slice c.coded.units has the units of all these
// runs, and firstUnit is the index of the first unit of r. The result is the number of units of r.
func (w *writer) place(c *piece, r run, firstUnit int) (units int, err error) {
	for i, u := range c.coded.units[firstUnit:] {
		if u.start >= r.end {
			break
		}
		off, n := c.Off+int64(u.start), int64(u.end-u.start)
		code := c.coded.code(firstUnit + i)
		units++
		if !u.plain && len(code) == 0 { // the Encoder found the unit equal to the backing
			if err := w.dst.SameAt(w.ctx, off, n); err != nil {
				return units, err
			}
			continue
		}
		if u.plain {
			code = c.buf[u.start:u.end]
		}
		if err := w.encoder.sink.Place(off, code, u.plain); err != nil {
			return units, err
		}
		w.counters.AddWritten(n)
	}
	return units, nil
}

// The method share makes the target share the blocks of a piece with the file of the source. It
// returns false if the piece must be copied instead.
func (w *writer) share(c *piece) (shared bool, err error) {
	cloner, _ := sink.Ability[sink.Cloner](w.dst)
	err = cloner.CloneFrom(c.file, c.pos, c.Off, c.Len)
	if err == nil {
		w.counters.AddCloned(c.Len)
		return true, nil
	}
	if w.mustShare || !errors.Is(err, errors.ErrUnsupported) {
		return false, err
	}
	return false, nil // the file system announced sharing and refuses this range
}
