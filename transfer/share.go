package transfer

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"os"

	"github.com/vddkcp/vddkcp/source"
)

// Reflink says whether a copy makes the target share blocks of the file system with the file of
// the source, instead of writing the data a second time.
type Reflink uint8

const (
	// ReflinkNever copies everything.
	ReflinkNever Reflink = iota
	// ReflinkAuto shares blocks where that is possible and worthwhile, and copies
	// the rest.
	ReflinkAuto
	// ReflinkAlways shares all data. The copy fails if that is not possible.
	ReflinkAlways
)

const (
	// minClone is the shortest range, in bytes, that ReflinkAuto shares. Sharing a
	// shorter one takes longer than copying it, and fragments the target.
	minClone = 32 << 10
	// maxClone is the longest range, in bytes, that is shared with one call, so that a copy
	// shows progress.
	maxClone = 64 << 20
	// If the source reports that no file holds the data at an offset, the data is copied up to the
	// next multiple of cloneStep bytes. There the source is asked again whether a file holds the
	// data. cloneStep is the usual size of a grain or cluster.
	cloneStep = 64 << 10
)

// ErrNotShared says that Options.Reflink is ReflinkAlways and not all data can be shared.
var ErrNotShared = errors.New("the source and the target cannot share blocks")

// sharer finds the ranges of a source whose blocks a target can share.
type sharer struct {
	src    source.InFile
	unit   func(*os.File) int64 // sink.Cloner's CloneUnit
	units  map[*os.File]int64   // results of unit
	always bool                 // data that cannot be shared is an error
}

// newSharer returns a sharer, or nil if nothing can be shared. The parameter unit is the method
// CloneUnit of the target, which returns the block size for sharing with a file. It is nil if the
// target is no sink.Cloner.
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
		return nil, fmt.Errorf("%w: the target must be a raw file", ErrNotShared)
	default:
		return nil, fmt.Errorf("%w: the source must be a local file on the file system of the target", ErrNotShared)
	}
	return &sharer{src: in, unit: unit, units: map[*os.File]int64{}, always: how == ReflinkAlways}, nil
}

// asParts returns the extents as parts that are not shared.
func asParts(extents iter.Seq2[source.Extent, error]) iter.Seq2[part, error] {
	return func(yield func(part, error) bool) {
		for e, err := range extents {
			if !yield(part{Extent: e}, err) {
				return
			}
		}
	}
}

// The method parts divides the parts with data into parts whose data can be shared and other parts.
// It yields all other parts as they are. A nil sharer shares nothing.
func (s *sharer) parts(parts iter.Seq2[part, error]) iter.Seq2[part, error] {
	return func(yield func(part, error) bool) {
		for e, err := range parts {
			if s == nil || err != nil || e.Kind != source.Data || e.idle > 0 {
				if !yield(e, err) || err != nil {
					return
				}
				continue
			}
			for off := e.Off; off < e.End(); {
				shared, n, err := s.locate(off, e.End())
				if err != nil {
					yield(part{}, err)
					return
				}
				for _, p := range [...]part{copied(off, shared.Off), shared, copied(shared.End(), off+n)} {
					if p.Len > 0 && !yield(p, nil) {
						return
					}
				}
				off += n
			}
		}
	}
}

// The function copied returns the range [off, end) as a part that is read and written.
func copied(off, end int64) part {
	return part{Extent: source.Extent{Off: off, Len: end - off}}
}

// The method locate examines the beginning of the data in [off, end). It returns the part that can
// be shared, and the number of bytes that it has examined. If nothing can be shared, the part has
// length 0 and begins at off. Any error is an ErrNotShared.
func (s *sharer) locate(off, end int64) (shared part, n int64, err error) {
	none := copied(off, off)
	f, pos, n, ok := s.src.InFile(off)
	if !ok {
		if s.always {
			return none, 0, fmt.Errorf("%w: no file holds the data at offset %d of the source as it is, because this data is compressed or was changed", ErrNotShared, off)
		}
		return none, min(cloneStep-off%cloneStep, end-off), nil
	}
	n = min(n, end-off)
	unit := s.unitOf(f)
	aligned := unit > 0 && (pos-off)%unit == 0
	switch {
	case s.always && unit == 0:
		return none, 0, fmt.Errorf("%w: %s and the target are not on the same file system, or this file system cannot share blocks", ErrNotShared, f.Name())
	case s.always && !aligned:
		return none, 0, fmt.Errorf("%w: the data at offset %d of the disk is at offset %d of the file %s; the difference of the two offsets must be a multiple of the block size, %d bytes", ErrNotShared, off, pos, f.Name(), unit)
	case !aligned:
		return none, n, nil
	}
	// Only whole blocks can be shared. The rest of the range, at both ends, is copied.
	from := (off + unit - 1) / unit * unit
	to := (off + n) / unit * unit
	if to <= from || !s.always && to-from < minClone {
		return none, n, nil
	}
	return part{Extent: source.Extent{Off: from, Len: to - from}, file: f, pos: pos + from - off}, n, nil
}

// unitOf returns the block size for sharing with a file: the CloneUnit of the target.
func (s *sharer) unitOf(f *os.File) int64 {
	unit, known := s.units[f]
	if !known {
		unit = s.unit(f)
		s.units[f] = unit
	}
	return unit
}

// Shared returns how many bytes of the plan's data the target can share with the source. The
// parameter unit is the method CloneUnit of the target (see sink.Cloner), or nil if the target
// cannot share blocks. With ReflinkAlways, Shared returns an ErrNotShared if not all data can be
// shared. But partial blocks at both ends of a range are no error: the copy reads and writes them,
// and the result does not count them.
func Shared(ctx context.Context, src source.Disk, plan *Plan, how Reflink, unit func(*os.File) int64) (shared int64, err error) {
	s, err := newSharer(src, unit, how)
	if s == nil || err != nil {
		return 0, err
	}
	for p, err := range s.parts(asParts(plan.extents(ctx, src))) {
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
