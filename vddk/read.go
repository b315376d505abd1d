package vddk

import (
	"context"
	"time"

	"golang.org/x/sync/errgroup"
)

// maxPieces is how many requests one call has in flight at once.
const maxPieces = 16

// read reads what lies in the disk, in pieces of a request each.
func (d *Disk) read(p []byte, off int64) error {
	if len(p) == 0 {
		return nil
	}
	if l, _ := d.pace.Next(); fits(off, int64(len(p)), l.Size) {
		return d.readPiece(p, off)
	}
	return d.eachRequest(off, int64(len(p)), func(from, to int64) error { return d.readPiece(p[from-off:to-off:to-off], from) })
}

// fits says whether a request of size bytes has the sectors of a range.
func fits(off, n int64, size int) bool { return off%sectorSize+n <= int64(size) }

// eachRequest cuts a range into what fits a request, with borders between that
// are multiples of the sector, and does the parts side by side.
func (d *Disk) eachRequest(off, n int64, do func(from, to int64) error) error {
	l, _ := d.pace.Next()
	var g errgroup.Group
	g.SetLimit(maxPieces)
	for end := off + n; off < end; {
		from, to := off, min(off-off%sectorSize+int64(l.Size), end)
		g.Go(func() error { return do(from, to) })
		off = to
	}
	return g.Wait()
}

// readPiece reads what fits a request, again until it succeeds or that makes no
// sense any more.
func (d *Disk) readPiece(p []byte, off int64) error {
	a := attempts{d: d, since: time.Now()}
	for {
		t, err := d.readOnce(p, off, a.since)
		if err == nil {
			return nil
		}
		if t.s == nil {
			return err // there was no attempt
		}
		if err := a.again(t, err); err != nil {
			return err
		}
		if l, _ := d.pace.Next(); !fits(off, int64(len(p)), l.Size) {
			return d.read(p, off)
		}
	}
}

// readOnce makes one attempt at a read that was asked for at a time. Without a
// session in the seat there was none.
func (d *Disk) readOnce(p []byte, off int64, since time.Time) (seat, error) {
	head := int(off % sectorSize)
	sectors := (head + len(p) + sectorSize - 1) / sectorSize
	var direct []byte
	if head == 0 && len(p)%sectorSize == 0 {
		direct = p
	}
	t, err := d.take(direct)
	if err != nil {
		return seat{}, err
	}
	mark := d.log.mark()
	err = t.s.read(d.ctx, d.timeout(d.o.Timeout, since), t.slot, uint64(off/sectorSize), sectors)
	if err == nil {
		d.anyRead.Store(true)
		if t.spare {
			copy(p, t.memory()[head:])
		}
		if d.sampled && head == 0 && len(p)%sectorSize == 0 {
			d.samples.Add(p, off)
		}
		d.give(t, int64(len(p)), true)
		if d.debugs("datapath") {
			d.debug("datapath", "read", "offset", off, "bytes", len(p), "handle_slot", t.slot, "copied", t.spare)
		}
		return t, nil
	}
	err = d.requestFailed(t, "read", off, int64(sectors)*sectorSize, mark, since, err)
	d.give(t, 0, false)
	return t, err
}

// requestFailed explains the error of a request. Of one whose worker is lost it
// takes note, and waits for the worker's end: nothing may write to the slot
// after that.
func (d *Disk) requestFailed(t seat, op string, off, n, mark int64, since time.Time, err error) error {
	if ended := context.Cause(d.ctx); ended != nil {
		return ended
	}
	err = d.explain(op, off, n, mark, err)
	if isLost(err) {
		t.s.proc.Kill()
		op = d.rangeOf(op, off, n)
		d.lose(t.h, t.s, op, since)
		err = t.s.gone(op)
	}
	return err
}
