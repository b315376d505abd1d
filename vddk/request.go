package vddk

import (
	"fmt"
	"iter"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/observer"
)

// request is a read or a write of the bytes [off, off+n) of the disk. n is at least 1.
type request struct {
	write  bool
	p      []byte // n bytes to read into, or to write; nil in a write means zeros
	off, n int64

	// head and tail have the previous content of sectors that a write covers only in part. head is
	// the first sector of the range, or nil if the write begins at a sector border. tail is the
	// last sector of the range, or nil if the write ends at a sector border. If a write neither
	// begins nor ends at a border and lies in one sector, both fields are the same memory.
	head, tail []byte
}

func (r *request) op() string {
	if r.write {
		return "write"
	}
	return "read"
}

// The method aligned reports whether the range of the request begins and ends at sector borders.
func (r *request) aligned() bool { return r.off%sectorSize == 0 && r.n%sectorSize == 0 }

// The method sectors returns the range of the request in bytes, extended to whole sectors.
func (r *request) sectors() (first, end int64) {
	return r.off &^ (sectorSize - 1), (r.off + r.n + sectorSize - 1) &^ (sectorSize - 1)
}

// The method fits reports whether the library can carry out r in one call. A call moves at most
// size bytes.
func (r *request) fits(size int) bool { return r.off%sectorSize+r.n <= int64(size) }

// The method pieces divides r into requests, each of at most the given size in bytes. The borders
// between them are multiples of the sector size.
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

// The method edges is called for a write. If the write covers the first sector of its range only in
// part, edges allocates memory for this sector in the field r.head, and likewise for the last
// sector in r.tail. If the first sector is also the last one, and the write covers neither its
// beginning nor its end, both fields are the same memory.
//
// The results readHead and readTail are this memory, or nil if the sector need not be read. The
// caller reads the previous content of the first sector into readHead, and that of the last sector
// into readTail, and may then call fill. If both fields are the same memory, readTail is nil, so
// that the sector is read only once.
func (r *request) edges() (readHead, readTail []byte) {
	first, end := r.sectors()
	if r.off > first {
		r.head = make([]byte, sectorSize)
		readHead = r.head
	}
	if r.off+r.n < end {
		if r.head != nil && end-sectorSize == first {
			r.tail = r.head
		} else {
			r.tail = make([]byte, sectorSize)
			readTail = r.tail
		}
	}
	return readHead, readTail
}

// The method fill sets b to the new content of all sectors that a write covers, including the
// sectors that it covers only in part.
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

// attempts counts the failed attempts of one request.
type attempts struct {
	pool     *pool
	failures int
	denied   int       // attempts that the host had no memory for, as long as smaller requests are possible
	since    time.Time // when the request was made
}

// The method again is called when an attempt with permit t failed with err. If the request is to be
// made again, the method returns nil, in most cases after a pause. If not, it returns the error for
// the caller of the request.
func (a *attempts) again(t permit, err error) error {
	p := a.pool
	if ended := p.life.ended(); ended != nil {
		return ended
	}
	if e := asError(err); e != nil && e.noMemory() && p.pace.Denied(t.pace) {
		l, _ := p.pace.Next()
		p.report.debug("", fmt.Sprintf("the host has no memory for a request: at most %d requests of %s at a time on each connection", l.Depth, bytesize.Format(int64(l.Size))), "error", err)
		a.denied++
		p.retries.Add(1)
		defer observer.Wait(p.life.Context)()
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
		// The worker process is replaced, because its connection may be the cause of the failures.
		// The method lose is called before Kill, so that the loss is recorded with the time when
		// the request began. If Kill were called first, handle.run might notice the end of the
		// process before lose is called, and record the present time instead.
		t.s.blame(fmt.Errorf("the worker was replaced because requests failed: %w", err))
		p.lose(t.h, t.s, p.explain.rangeOf("requests to", 0, 0), a.since)
		t.s.proc.Kill()
	}
	return nil
}
