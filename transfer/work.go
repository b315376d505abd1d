package transfer

import (
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// planWork adds the work of the copy, and of the checks after it, to the counters. The copy begins
// at Options.Resume.
func (c *copying) planWork() {
	c.zerosWork = !c.zeroed
	start := int64(0)
	if c.o.Resume != nil {
		start = c.o.Resume.Offset
	}
	work := c.workFrom(start)
	c.o.Counters.AddPlanned(work)
	c.o.Counters.AddSkipped(c.plan.Size - work)
	c.planChecks(c.plan.Data+c.plan.Inherited+c.plan.Size-c.plan.Known, c.plan.Size)
}

// planChecks adds the bytes that will be read back after the copy to the counters. The parameter
// data is how much data the target will have at most, as far as that is known, and size is the
// size of the disk, both in bytes.
func (c *copying) planChecks(data, size int64) {
	if c.o.Verify {
		c.o.Counters.AddChecks(data)
	}
	if c.isRereadable() {
		c.o.Counters.AddChecks(rereadBytes(size))
	}
}

// workFrom returns how many bytes count as work in a copy that begins at the given offset. These
// are the bytes after the offset, except holes that need no zeroing, and the bytes that
// [cutter.planned] counts because the plan does not have their extents in memory.
func (c *copying) workFrom(start int64) int64 {
	data, zero := c.plan.below(start)
	work := c.plan.Data - data + c.plan.Size - max(c.plan.Known, start)
	if c.zerosWork {
		work += c.plan.Zero - zero
	}
	return work
}

// replanWork corrects the counters after the target was opened again at the last checkpoint. All
// work after the checkpoint must be done again. There may be more work than was planned: perhaps
// unwritten ranges read as zeros in the lost target, but do not in the reopened target, so that the
// copy must zero them.
func (c *copying) replanWork() {
	c.zerosWork = c.zerosWork || !c.zeroed
	work := c.workFrom(c.start)
	s := c.o.Counters.Snapshot()
	if more := work - (s.Planned - s.Checks); more > 0 {
		c.o.Counters.AddPlanned(more)
		c.o.Counters.AddSkipped(-more)
	}
	c.o.Counters.Restart(work)
}

// account counts what Compare and Sum read. If they check the target of a copy, the bytes to read
// were planned before the copy, as well as that was possible. The account then divides the planned
// bytes evenly over the bytes that are really read.
type account struct {
	counters *progress.Counters
	check    bool  // the reading is a check after a copy
	total    int64 // bytes of Counters.AddChecks that are left for this check

	planned, done, given int64 // bytes to read, bytes that were read, bytes of total that are done
}

// newCheck returns the account of a check whose bytes were planned before the copy, except the last
// bytes of Counters.AddChecks, which are for the check after this one.
func newCheck(counters *progress.Counters, after int64) *account {
	s := counters.Snapshot()
	return &account{counters: counters, check: true, total: max(0, s.Checks-s.Checked-after)}
}

// The method plan adds n bytes that must be read.
func (a *account) plan(n int64) {
	if a.planned += n; !a.check {
		a.counters.AddPlanned(n)
	}
}

// The method skip adds n bytes that need not be read.
func (a *account) skip(n int64) {
	if !a.check {
		a.counters.AddSkipped(n)
	}
}

// The method read adds n bytes that were read from a disk. The bytes that a check reads do not
// count, because a copy counts only what it has read from its source.
func (a *account) read(n int64) {
	if !a.check {
		a.counters.AddRead(n)
	}
}

// The method add adds n bytes of the planned bytes that are done.
func (a *account) add(n int64) {
	if !a.check {
		a.counters.AddDone(n)
		return
	}
	a.done += n
	a.give(int64(float64(a.total)*(float64(a.done)/float64(max(a.planned, 1)))), n)
}

// The method end ends a check that was successful: all of its bytes are done.
func (a *account) end() { a.give(a.total, 0) }

// The method give makes the given number of bytes of a.total done, after read bytes were read.
func (a *account) give(bytes, read int64) {
	bytes = min(max(bytes, a.given), a.total)
	a.counters.AddChecked(bytes-a.given, read)
	a.given = bytes
}

// unread returns how many bytes of a piece will be holes of the target, although the plan has
// counted them as data that will be read back.
func (p *pipeline) unread(c *piece) int64 {
	if c.Kind != source.Data {
		return max(0, c.End()-max(c.Off, p.cutter.known))
	}
	if !c.read || c.file != nil {
		return 0
	}
	n := int64(0)
	for _, r := range c.runs {
		if r.zero {
			n += int64(r.end - r.start)
		}
	}
	return max(0, n-c.idle)
}

// isVerifiable reports whether a target can be read back.
func isVerifiable(dst sink.Disk) bool {
	_, ok := sink.Ability[sink.Verifiable](dst)
	return ok
}
