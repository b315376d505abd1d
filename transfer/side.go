package transfer

import (
	"context"
	"errors"
	"fmt"
	"iter"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// ErrDiskChanged says that a disk changed while Compare or Sum read it, so that the
// result would describe neither the old nor the new state.
var ErrDiskChanged = errors.New("the disk changed while it was read")

// A side is one of the disks that Compare or Sum reads, with its plan.
type side struct {
	source.Disk
	name    string        // "source" or "target", for errors; "" for Sum
	wait    progress.Wait // what a copy waits for while the disk is read
	plan    *Plan
	buffers source.Allocator

	counters *progress.Counters
}

// The method read fills b with the content of the disk that begins at the given offset.
func (s *side) read(b []byte, off int64) error {
	s.counters.Begin(s.wait)
	defer s.counters.End(s.wait)
	return readFull(s.Disk, b, off)
}

// addName adds the name of the disk, "source" or "target", to an error of Compare.
func (s *side) addName(err error) error {
	if s.name == "" {
		return err
	}
	return fmt.Errorf("%s: %w", s.name, err)
}

// makePlan plans the reading of the disk. A disk with Inherited extents is an error, because
// their content is in a parent image.
func (s *side) makePlan(ctx context.Context) (err error) {
	if s.plan, err = NewPlan(ctx, s.Disk); err != nil {
		return s.addName(err)
	}
	if s.plan.Inherited > 0 {
		return s.addName(fmt.Errorf("%d bytes of the disk are in a parent image, which single-link leaves out: open the disk without single-link to include them", s.plan.Inherited))
	}
	return nil
}

// The method reserve provides the given number of buffers for reading the disk, of bufferSize bytes
// each. The caller frees them by calling the result, the function release.
func (s *side) reserve(number, bufferSize int) (release func() error, err error) {
	s.buffers, release, err = reserveBuffers(s.Disk, number, bufferSize)
	return release, err
}

// The method unchanged returns an ErrDiskChanged if the disk has changed since its plan was made.
func (s *side) unchanged(ctx context.Context) error {
	now, err := identityOf(ctx, s.Disk)
	if err != nil {
		return s.addName(err)
	}
	if now != s.plan.identity {
		return s.addName(fmt.Errorf("%w: its identity was %s and is now %s; read a snapshot, or stop the programs that write to the disk", ErrDiskChanged, s.plan.identity, now))
	}
	return nil
}

// extents yields the extents of the disk in the form in which Compare and Sum read them. A hole of
// at most joinGap bytes between data becomes Data. Reading such a hole together with the data costs
// less than reading the data on both sides of the hole with two requests.
func (s *side) extents(ctx context.Context) iter.Seq2[source.Extent, error] {
	return func(yield func(source.Extent, error) bool) {
		var run, hole source.Extent // the extent to yield next, and a short hole after it if it is data
		for e, err := range s.plan.extents(ctx, s.Disk) {
			switch {
			case err != nil:
				yield(source.Extent{}, s.addName(err))
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
				run = source.Extent{Off: run.End(), Len: e.End() - run.End(), Kind: e.Kind} // including the hole
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
