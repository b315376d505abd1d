package transfer

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/vddkcp/vddkcp/source"
)

// ErrDiskChanged says that a disk is not what it was when its reading began,
// so that a result would be of neither state.
var ErrDiskChanged = errors.New("the disk changed while it was read")

// side is one of the disks that are compared.
type side struct {
	source.Disk
	name    string // for errors; "" where there is only one
	plan    *Plan
	buffers source.Allocator
}

// failed says which side an error is of.
func (s *side) failed(err error) error {
	if s.name == "" {
		return err
	}
	return fmt.Errorf("%s: %w", s.name, err)
}

// ask plans the reading of a disk whose content is known.
func (s *side) ask(ctx context.Context) (err error) {
	if s.plan, err = NewPlan(ctx, s.Disk); err != nil {
		return s.failed(err)
	}
	if s.plan.Inherited > 0 {
		return s.failed(fmt.Errorf("%d bytes are not in this link of a chain, so their content is not known: open it with its parents", s.plan.Inherited))
	}
	return nil
}

// reserve finds memory for so many reads: the disk's own, or new. Release
// gives the new memory back, when none of it is in use.
func (s *side) reserve(n, size int) (release func() error, err error) {
	if own, ok := source.Ability[source.Allocator](s.Disk); ok {
		s.buffers = own
		return func() error { return nil }, nil
	}
	a, err := newArena(n, size)
	if err != nil {
		return nil, err
	}
	s.buffers = a
	return a.close, nil
}

// unchanged is an error where the disk is not what it was when it was planned.
func (s *side) unchanged(ctx context.Context) error {
	now, err := identityOf(ctx, s.Disk)
	if err != nil {
		return s.failed(err)
	}
	if now != s.plan.identity {
		return s.failed(fmt.Errorf("%w: its identity was %s and is now %s; read a snapshot, or stop what writes to it", ErrDiskChanged, s.plan.identity, now))
	}
	return nil
}

// extents yields the disk's extents as they are read, in place and kind only: a
// short hole between data is Data, since reading it along costs less than
// another request.
func (s *side) extents(ctx context.Context) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		var run, hole source.Extent // what comes next, and a short hole after that, if it is data
		for e, err := range s.plan.extents(ctx, s.Disk) {
			switch {
			case err != nil:
				yield(source.Extent{}, s.failed(err))
				return
			case hole.Len == 0 && run.Len > 0 && e.Kind == run.Kind:
				run.Len += e.Len
			case hole.Len == 0 && run.Len > 0 && e.Kind == source.Zero && e.Len <= joinGap:
				hole = e
			case hole.Len > 0 && e.Kind == source.Data:
				run.Len += hole.Len + e.Len
				hole.Len = 0
			default:
				if run.Len > 0 && !yield(run, nil) {
					return
				}
				run = source.Extent{Off: run.End(), Len: e.End() - run.End(), Kind: e.Kind} // with the hole, if any
				hole.Len = 0
			}
		}
		for _, e := range []source.Extent{run, hole} {
			if e.Len > 0 && !yield(e, nil) {
				return
			}
		}
	}
}
