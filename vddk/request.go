package vddk

import (
	"fmt"
	"iter"
	"time"
)

// request is a read or a write of the bytes [off, off+n) of the disk, n > 0.
type request struct {
	write  bool
	p      []byte // n bytes to read into, or to write; nil in a write means zeros
	off, n int64

	// head and tail have the previous content of the first and last sector of a write that
	// covers them only in part. They are nil if the sector is covered as a whole, and the same
	// memory if there is only one sector.
	head, tail []byte
}

func (r *request) op() string {
	if r.write {
		return "write"
	}
	return "read"
}

// aligned reports whether the range begins and ends at borders of sectors.
func (r *request) aligned() bool { return r.off%sectorSize == 0 && r.n%sectorSize == 0 }

// sectors returns the range of bytes of all sectors that the request touches.
func (r *request) sectors() (first, end int64) {
	return r.off &^ (sectorSize - 1), (r.off + r.n + sectorSize - 1) &^ (sectorSize - 1)
}

// fits reports whether one call of the library that moves size bytes is enough for r.
func (r *request) fits(size int) bool { return r.off%sectorSize+r.n <= int64(size) }

// pieces cuts r into requests of up to size bytes, at multiples of the sector size.
func (r *request) pieces(size int64) iter.Seq[request] {
	return func(yield func(request) bool) {
		for off, end := r.off, r.off+r.n; off < end; {
			to := min(off-off%sectorSize+size, end)
			piece := request{write: r.write, off: off, n: to - off}
			if r.p != nil {
				piece.p = r.p[off-r.off : to-r.off : to-r.off]
			}
			if !yield(piece) {
				return
			}
			off = to
		}
	}
}

// edges returns memory for the sectors that a write covers only in part. The caller has
// to read them before it calls fill: head is the first sector that the request touches
// and tail the last one. Either is nil if it need not be read.
func (r *request) edges() (head, tail []byte) {
	first, end := r.sectors()
	if r.off > first {
		r.head = make([]byte, sectorSize)
		head = r.head
	}
	if r.off+r.n < end {
		if r.head != nil && end-sectorSize == first {
			r.tail = r.head
		} else {
			r.tail = make([]byte, sectorSize)
			tail = r.tail
		}
	}
	return head, tail
}

// fill sets b to the content of all sectors that a write touches.
func (r *request) fill(b []byte) {
	first, end := r.sectors()
	before, after := r.off-first, end-(r.off+r.n)
	copy(b, r.head[:before])
	if after > 0 {
		copy(b[int64(len(b))-after:], r.tail[sectorSize-after:])
	}
	if r.p == nil {
		clear(b[before : int64(len(b))-after])
	} else {
		copy(b[before:], r.p)
	}
}

// attempts counts the failures of one request.
type attempts struct {
	pool     *pool
	failures int
	denied   int       // attempts that the host had no memory for, as long as smaller requests are possible
	since    time.Time // when the request was made
}

// again decides what follows the failure err of an attempt whose permit t was released.
// It returns nil, after a wait, if the request is to be made again, else the error to
// return to the caller.
func (a *attempts) again(t permit, err error) error {
	p := a.pool
	if ended := p.life.ended(); ended != nil {
		return ended
	}
	if e := asError(err); e != nil && e.noMemory() && p.pace.Denied(t.pace) {
		p.report.debug("", "the host has no memory for a request; asking for less", "error", err)
		a.denied++
		p.retries.Add(1)
		p.life.pause(min(time.Duration(a.denied)*5*time.Millisecond, 100*time.Millisecond))
		return nil
	}
	a.failures++
	if err := p.policy.GiveUp(err, a.failures, p.progress.Idle(a.since)); err != nil {
		return err
	}
	p.retries.Add(1)
	if isLost(err) {
		return nil // acquire waits for another session
	}
	wait, _ := p.policy.Wait(a.failures, p.progress.Idle(a.since))
	if !p.policy.Pause(p.life.closing, err, wait, nil) {
		return p.life.ended()
	}
	if e := asError(err); a.failures > 1 && (e == nil || !e.noMemory()) && p.flusher.expendable() {
		// The worker is replaced, because its connection may be the cause of the failures.
		// lose comes before Kill, because handle.run takes the end of the process for a loss that
		// began only now.
		t.s.blame(fmt.Errorf("the worker was replaced because requests failed: %w", err))
		p.lose(t.h, t.s, p.explain.rangeOf("requests to", 0, 0), a.since)
		t.s.proc.Kill()
	}
	return nil
}
