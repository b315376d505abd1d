package transfer

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"

	"github.com/vddkcp/vddkcp/source"
)

// Reflink says whether data is shared with the source's file instead of copied,
// where the file system can do that.
type Reflink uint8

const (
	ReflinkNever  Reflink = iota
	ReflinkAuto           // where it can be, and pays
	ReflinkAlways         // or the copy fails
)

const (
	// Sharing less than this takes longer than copying it, and leaves the
	// target in pieces.
	minClone = 32 << 10
	// Ranges are shared in pieces, so that progress shows.
	maxClone = 64 << 20
	// Where the source can't tell, it is asked again so far on: the size of a
	// grain, as a rule.
	cloneStep = 64 << 10
)

// ErrNotShared says that blocks were to be shared and can't be.
var ErrNotShared = errors.New("the blocks can't be shared")

// sharer finds out what of a source can be shared with a target.
type sharer struct {
	src    source.InFile
	unit   func(*os.File) int64
	units  map[*os.File]int64 // those that were asked
	always bool
}

// newSharer returns nil where nothing can be shared.
func newSharer(src source.Disk, unit func(*os.File) int64, how Reflink) (*sharer, error) {
	if how == ReflinkNever {
		return nil, nil
	}
	in, ok := source.Ability[source.InFile](src)
	switch {
	case ok && unit != nil:
	case how != ReflinkAlways:
		return nil, nil
	case ok:
		return nil, fmt.Errorf("%w: the target is none that can share them, want a raw file", ErrNotShared)
	default:
		return nil, fmt.Errorf("%w: the source is no local file, want one beside the target", ErrNotShared)
	}
	return &sharer{src: in, unit: unit, units: map[*os.File]int64{}, always: how == ReflinkAlways}, nil
}

// split cuts the data in [off, end) into what can be shared and what is copied.
// An error is only ErrNotShared.
func (s *sharer) split(off, end int64, yield func(part) error) error {
	for off < end {
		f, pos, n, ok := s.src.InFile(off)
		if !ok {
			if s.always {
				return fmt.Errorf("%w: the data at offset %d is not stored as it is (compressed), or was changed", ErrNotShared, off)
			}
			n = cloneStep - off%cloneStep
		}
		n = min(n, end-off)
		unit := int64(0)
		if ok {
			unit = s.unitOf(f)
			switch {
			case s.always && unit == 0:
				return fmt.Errorf("%w: %s and the target are not on one file system that can", ErrNotShared, f.Name())
			case s.always && (pos-off)%unit != 0:
				return fmt.Errorf("%w: the data at offset %d is at %d in %s, and both must have the same place in blocks of %d bytes", ErrNotShared, off, pos, f.Name(), unit)
			case unit > 0 && (pos-off)%unit != 0:
				unit = 0
			}
		}
		plain := part{Extent: source.Extent{Off: off, Len: n}}
		if unit == 0 {
			if err := yield(plain); err != nil {
				return err
			}
			off += n
			continue
		}
		// What is no whole block at either end is copied.
		from := (off + unit - 1) / unit * unit
		to := (off + n) / unit * unit
		if to <= from || !s.always && to-from < minClone {
			if err := yield(plain); err != nil {
				return err
			}
			off += n
			continue
		}
		for _, p := range []part{
			{Extent: source.Extent{Off: off, Len: from - off}},
			{Extent: source.Extent{Off: from, Len: to - from}, file: f, pos: pos + from - off},
			{Extent: source.Extent{Off: to, Len: off + n - to}},
		} {
			if p.Len > 0 {
				if err := yield(p); err != nil {
					return err
				}
			}
		}
		off += n
	}
	return nil
}

func (s *sharer) unitOf(f *os.File) int64 {
	unit, asked := s.units[f]
	if !asked {
		unit = s.unit(f)
		s.units[f] = unit
	}
	return unit
}

// errStop ends a split whose consumer wants no more.
var errStop = errors.New("stop")

// parts yields the extents with what can be shared apart from what can't. A nil
// sharer yields them as they are.
func (s *sharer) parts(extents iter.Seq2[source.Extent, error]) iter.Seq2[part, error] {
	return func(yield func(part, error) bool) {
		for e, err := range extents {
			if s == nil || err != nil || e.Kind != source.Data {
				if !yield(part{Extent: e}, err) || err != nil {
					return
				}
				continue
			}
			err := s.split(e.Off, e.End(), func(p part) error {
				if !yield(p, nil) {
					return errStop
				}
				return nil
			})
			if err == errStop {
				return
			}
			if err != nil {
				yield(part{}, err)
				return
			}
		}
	}
}

// Shared returns how many of the bytes that plan has to copy can share their
// blocks with the source. Unit is sink.Cloner's CloneUnit of the target, nil
// where that can't share anything. With ReflinkAlways it is ErrNotShared when
// not all can, but for less than a block at the end of a range.
func Shared(ctx context.Context, src source.Disk, plan *Plan, how Reflink, unit func(*os.File) int64) (shared int64, err error) {
	s, err := newSharer(src, unit, how)
	if s == nil || err != nil {
		return 0, err
	}
	for p, err := range s.parts(plan.extents(ctx, src)) {
		if err != nil {
			return 0, err
		}
		if p.file != nil {
			shared += p.Len
		}
		if ctx.Err() != nil {
			return 0, context.Cause(ctx)
		}
	}
	return shared, nil
}
