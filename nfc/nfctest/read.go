package nfctest

import (
	"errors"
	"io"
	"sync/atomic"
)

// Compression types.
const (
	plain     = 0
	withZlib  = 1
	withSkipZ = 3
	maxType   = 3
)

const (
	ioSize       = 44
	fragmentHead = headSize + ioSize
)

// read is a read request.
type read struct {
	disk        *Disk
	op          uint32
	compression uint32
	offset      int64
	length      int64 // of the request
	answered    int64 // the part of it that is answered
	fragment    int64 // the longest data of a fragment
	left        atomic.Int32
}

// parts returns the number of fragments.
func (q *read) parts() int { return int((q.answered + q.fragment - 1) / q.fragment) }

// onIO checks a request of type IO and begins to answer it.
func (c *conn) onIO(f frame) error {
	offset, length := int64(le.Uint64(f.p[16:])), int64(le.Uint64(f.p[24:]))
	if direction := le.Uint32(f.p[8:]); direction != 1 {
		c.waiting.Add(1)
		c.violation("an IO request has the direction %d, and the host only knows reads", direction)
		if err := c.in.discard(int64(le.Uint32(f.p[36:]))); err != nil {
			return err
		}
		c.refuse(nil, f, codeRefused, "writes are not supported")
		return nil
	}
	info := Read{c.n, offset, length, le.Uint32(f.p[12:])}
	if c.h.options.RecordReads {
		c.h.mu.Lock()
		c.h.stats.Reads = append(c.h.stats.Reads, info)
		c.h.mu.Unlock()
	}
	if !c.checkRead(f, info) {
		c.waiting.Add(1)
		c.refuse(nil, f, codeInvalid, "invalid argument")
		return nil
	}
	q := &read{disk: c.disk, op: f.op, compression: info.Compression, offset: offset, length: length, answered: length, fragment: int64(c.buffer)}
	if n := c.h.options.Fragment; n > 0 {
		q.fragment = min(q.fragment, int64(n))
	}
	if limit := c.h.traits.maxRead; limit > 0 {
		q.answered = min(length, limit)
	}
	q.left.Store(int32(q.parts()))
	if n := int(c.inFlight.Add(1)); n > c.mostInFlight {
		c.mostInFlight = n
		c.h.mu.Lock()
		c.h.stats.InFlight = max(c.h.stats.InFlight, n)
		c.h.mu.Unlock()
	}
	rule := c.fault(StepRead, info)
	if c.h.options.Shuffle && rule == nil {
		jobs := make([]job, q.parts())
		for i := range jobs {
			jobs[i] = job{read: q, part: i}
		}
		c.queue.add(jobs...)
		return nil
	}
	c.queue.add(job{rule: rule, read: q, part: allParts})
	return nil
}

// checkRead records violations of a read. It returns false if the read can't be answered.
func (c *conn) checkRead(f frame, r Read) bool {
	for _, at := range []int{32, 36} {
		if int64(le.Uint32(f.p[at:])) != r.Length {
			c.violation("a read has the lengths %d, %d and %d", r.Length, le.Uint32(f.p[32:]), le.Uint32(f.p[36:]))
			return false
		}
	}
	if le.Uint32(f.p[40:]) != 0 {
		c.violation("a read has %d as its last number", le.Uint32(f.p[40:]))
	}
	switch {
	case !c.checkHandle(f):
	case r.Compression > maxType:
		c.violation("a read has the unknown compression %d", r.Compression)
	case r.Length <= 0 || r.Offset < 0 || r.Offset > c.capacity()-r.Length:
		c.violation("a read of %d bytes at %d is not inside the disk of %d bytes", r.Length, r.Offset, c.capacity())
	case r.Offset%sectorSize != 0 || r.Length%sectorSize != 0:
		c.violation("a read of %d bytes at %d is not whole sectors", r.Length, r.Offset)
	default:
		if r.Length > maxRead {
			c.violation("a read has %d bytes, more than 1 MiB", r.Length)
		}
		return true
	}
	return false
}

// worker sends answers. Its buffers are used again for each fragment.
type worker struct {
	c    *conn
	in   []byte // room for the head, then the data of a fragment
	out  []byte // room for the head, then the compressed data
	runs []run
	zlib packer
}

func (w *worker) run() {
	for {
		j, ok := w.c.queue.pop()
		if !ok {
			return
		}
		w.do(j)
	}
}

// do sends an answer.
func (w *worker) do(j job) {
	c := w.c
	if j.rule != nil && j.rule.Hold && !j.held {
		j.held = true
		c.workers.Go(func() {
			if c.await(j.rule) == nil {
				c.queue.push(j)
			}
		})
		return
	}
	switch {
	case j.answer != nil:
		c.waiting.Add(-1)
		c.strike(j.rule, c.out, alter(j.rule, j.answer, 0))
	case j.rule != nil:
		w.misread(j.rule, j.read)
	case j.part != allParts:
		w.part(j.read, j.part)
	default:
		for i := range j.read.parts() {
			w.part(j.read, i)
		}
	}
}

// part sends a fragment.
func (w *worker) part(q *read, i int) {
	place := int64(i) * q.fragment
	b, err := w.build(q, place, min(q.fragment, q.answered-place))
	if err != nil {
		b = newError(q.op, codeInvalid, err.Error())
	}
	w.sent(q)
	w.c.send(b)
}

// sent counts a fragment that is about to be sent. It is called before, because the client may
// send its next request before the host knows that all bytes were sent.
func (w *worker) sent(q *read) {
	if q.left.Add(-1) == 0 {
		w.c.inFlight.Add(-1)
	}
}

// build returns the fragment with n bytes at a place of the request. It is valid until the next
// call.
func (w *worker) build(q *read, place, n int64) ([]byte, error) {
	size := int(fragmentHead + n)
	if cap(w.in) < size {
		w.in = make([]byte, size)
	}
	b := w.in[:size]
	data := b[fragmentHead:]
	if err := readFull(q.disk, data, q.offset+place); err != nil {
		return nil, err
	}
	kind := uint32(plain)
	switch q.compression {
	case withSkipZ:
		if size := w.findRuns(data); size < len(data) {
			b, kind = w.skipZ(data), withSkipZ
		}
	case withZlib:
		if p := w.pack(data); p != nil {
			b, kind = p, withZlib
		}
	}
	putHead(b, q, kind, place, n)
	return b, nil
}

// putHead fills in the head of a fragment.
func putHead(b []byte, q *read, kind uint32, place, n int64) {
	le.PutUint32(b, magic)
	le.PutUint32(b[4:], frameIO)
	le.PutUint32(b[8:], ioSize)
	le.PutUint32(b[12:], q.op)
	le.PutUint64(b[16:], 0)
	le.PutUint32(b[24:], 1)
	le.PutUint32(b[28:], kind)
	le.PutUint64(b[32:], uint64(q.offset))
	le.PutUint32(b[40:], uint32(q.length))
	le.PutUint32(b[44:], uint32(place))
	le.PutUint32(b[48:], uint32(n))
	le.PutUint32(b[52:], uint32(len(b)-fragmentHead))
	le.PutUint32(b[56:], 0)
}

// readFull fills p with the content of a disk at an offset. Zeros follow the end of the content.
func readFull(d *Disk, p []byte, off int64) error {
	n := int(max(0, min(int64(len(p)), d.Size-off)))
	if n > 0 {
		m, err := d.Content.ReadAt(p[:n], off)
		if m < n && err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		n = m
	}
	clear(p[n:])
	return nil
}
