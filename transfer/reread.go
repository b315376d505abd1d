package transfer

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

const (
	// rereadPlaces is the number of places that are read again after a copy.
	rereadPlaces = 256
	// rereadSize is the length of a place in bytes. Places begin at multiples of it.
	rereadSize = 64 << 10
)

// RereadError says that the target differs from what the source returned when places of it were
// read again (see source.Rereadable).
type RereadError struct {
	Places, Differing int // numbers of places that were read again, and of those that differ
	Difference        Difference
}

func (e *RereadError) Error() string {
	verb := "differ"
	if e.Differing == 1 {
		verb = "differs"
	}
	return fmt.Sprintf("the check after the copy has found a difference: %d of %d places of the source, read again over a new connection, %s from the target: %v", e.Differing, e.Places, verb, &e.Difference)
}

// Hint tells the user what to do about the error.
func (e *RereadError) Hint() string {
	return "do not use this copy: the source was read wrongly, or it has changed; the target was kept for inspection; if it is a file, its name is DST.partial; copy again with --via vddk and --force, and report the error with the file of --nfc-trace"
}

// ExitStatus tells report.Of the exit status for disks that differ.
func (*RereadError) ExitStatus() int { return exit.Difference }

// isRereadable reports whether places of the source are read again after the copy.
func (c *copying) isRereadable() bool {
	if c.src == nil {
		return false
	}
	_, again := source.Ability[source.Rereadable](c.src)
	again = again || c.o.Reread
	return again && isVerifiable(c.dst)
}

// The method reread reads places of the source again and compares them with the target. It returns
// the number of places. If they differ, it suspends the target, which keeps it for inspection. The
// error is then a *RereadError.
func (c *copying) reread(ctx context.Context) (places int, err error) {
	var failed *RereadError
	err = untilStopped(ctx, c.o.stop(), func(ctx context.Context) (err error) {
		if places, failed, err = c.comparePlaces(ctx); err != nil {
			return fmt.Errorf("cannot read places of the source again, in order to check the copy: %w", err)
		}
		return nil
	})
	if err != nil || failed == nil {
		return places, err
	}
	if err := c.dst.Suspend(); err != nil {
		return places, fmt.Errorf("%w (and closing the target failed: %w)", failed, err)
	}
	return places, failed
}

// openAgain opens the source for reading places of it again. A source that is not a
// source.Rereadable is read through the disk that is open already: an earlier run has read the
// doubtful source, and this run continues its copy from another one (see Options.Reread).
func (c *copying) openAgain(ctx context.Context) (src source.Disk, done func(), err error) {
	again, ok := source.Ability[source.Rereadable](c.src)
	if !ok {
		return c.src, func() {}, nil
	}
	if src, err = again.OpenAgain(ctx); err != nil {
		return nil, nil, ofSource(err)
	}
	return src, func() { src.Close() }, nil
}

// comparePlaces reads places of the source again and compares them with the target. The result
// differs is nil if they are equal.
func (c *copying) comparePlaces(ctx context.Context) (places int, differs *RereadError, err error) {
	back, _ := sink.Ability[sink.Verifiable](c.dst)
	target, err := back.Reopen(ctx)
	if err != nil {
		return 0, nil, fmt.Errorf("cannot open the target: %w", err)
	}
	defer target.Close()
	offsets, err := choosePlaces(ctx, target, c.plan.Size)
	if err != nil {
		return 0, nil, err
	}
	src, done, err := c.openAgain(ctx)
	if err != nil {
		return 0, nil, err
	}
	defer done()
	var found tally
	differing, unread := 0, rereadBytes(c.plan.Size)
	want, got := make([]byte, rereadSize), make([]byte, rereadSize)
	for _, off := range offsets {
		n := int(min(rereadSize, c.plan.Size-off))
		if err := c.o.Limit.wait(ctx, n, c.o.Counters); err != nil {
			return places, nil, err
		}
		again := side{Disk: src, wait: progress.WaitSource, counters: c.o.Counters}
		if err := again.read(want[:n], off); err != nil {
			return places, nil, ofSource(err)
		}
		if err := readFull(target, got[:n], off); err != nil {
			return places, nil, fmt.Errorf("target: %w", err)
		}
		if !bytes.Equal(want[:n], got[:n]) {
			found.add(want[:n], got[:n], off, n)
			differing++
		}
		places++
		c.o.Counters.AddChecked(int64(n), int64(n))
		unread -= int64(n)
	}
	c.o.Counters.AddChecked(unread, 0) // the last place of the disk may be a short one
	if found.ranges == 0 {
		return places, nil, nil
	}
	return places, &RereadError{Places: places, Differing: differing, Difference: Difference{
		SourceSize: c.plan.Size, TargetSize: target.Size(),
		First: found.first, Source: found.a, Target: found.b, Ranges: found.ranges, Bytes: found.bytes,
	}}, nil
}

// choosePlaces returns the offsets of the places to read again, in ascending order: one at random
// in each of equal parts of the disk. In every second part that has data in the target, it is a
// place with data, because data that belongs elsewhere is noticed only there. The other places can
// also find data that the copy has taken for a hole. A disk that is not larger than all places is
// read whole.
func choosePlaces(ctx context.Context, target source.Disk, size int64) ([]int64, error) {
	units := (size + rereadSize - 1) / rereadSize
	if units <= rereadPlaces {
		offsets := make([]int64, units)
		for i := range offsets {
			offsets[i] = int64(i) * rereadSize
		}
		return offsets, nil
	}
	offsets := make([]int64, rereadPlaces)
	seen := make([]int64, rereadPlaces) // units with data in each part
	part := func(unit int64) int64 { return unit * rereadPlaces / units }
	for i := range offsets {
		from, to := partBorders(int64(i), units)
		offsets[i] = (from + rand.Int64N(to-from)) * rereadSize
	}
	for e, err := range source.Covered(ctx, target, 0, size) {
		if err != nil {
			return nil, fmt.Errorf("target: %w", err)
		}
		if e.Kind != source.Data {
			continue
		}
		for unit := e.Off / rereadSize; unit < (e.End()+rereadSize-1)/rereadSize; {
			p := part(unit)
			_, to := partBorders(p, units)
			end := min(to, (e.End()+rereadSize-1)/rereadSize)
			n := end - unit
			// Each unit with data of the part is chosen with the same probability.
			if seen[p] += n; p%2 == 0 && rand.Int64N(seen[p]) < n {
				offsets[p] = (unit + rand.Int64N(n)) * rereadSize
			}
			unit = end
		}
	}
	return offsets, nil
}

// rereadBytes returns the most bytes that are read again after a copy of a disk of the given size.
func rereadBytes(size int64) int64 { return min(size, rereadPlaces*rereadSize) }

// partBorders returns the first unit of a part of the disk, and the first one after the part.
func partBorders(part, units int64) (from, to int64) {
	from = (part*units + rereadPlaces - 1) / rereadPlaces
	to = ((part+1)*units + rereadPlaces - 1) / rereadPlaces
	return from, to
}

// isKept reports whether the target of a copy that failed with err was suspended already, so that
// it can be inspected.
func isKept(err error) bool {
	return errors.As(err, new(*MismatchError)) || errors.As(err, new(*RereadError))
}
