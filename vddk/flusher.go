package vddk

import (
	"context"
	"fmt"
	"time"
)

// flusher makes the writes of a pool of connections durable. Its fields are guarded by pool.mu.
type flusher struct {
	pool    *pool
	written int64 // writes that have succeeded
	flushed int64 // how many of them the last successful flush covered
	err     error // the first failed flush, or loss of unflushed writes; it stays
}

// The method flush makes all earlier writes durable, with a call of the library. If a worker
// process is lost during the call, flush repeats the call, up to two times.
//
// After a failed flush, writes may be missing on the disk. The same is true when a worker is lost
// with writes that no flush had made durable. From then on, every flush fails with the error of the
// first such event.
func (f *flusher) flush() error {
	p := f.pool
	for lost := 0; ; {
		h, s, written, err := f.acquire()
		if s == nil {
			return err
		}
		mark := p.opener.log.mark()
		stop := s.deadline(p.o.Timeout)
		err = s.proc.Flush(p.life.Context)
		stop()
		if p.life.Context.Err() != nil {
			return context.Cause(p.life.Context)
		}
		if err == nil {
			p.mu.Lock()
			defer p.mu.Unlock()
			f.flushed = max(f.flushed, written)
			return nil
		}
		err = p.explain.explain("flush", 0, 0, mark, err)
		if isLost(err) {
			// The worker process was lost during this flush. If it had writes that no flush had
			// made durable, lostDuring makes all later flushes fail.
			err = p.lostDuring(h, s, p.explain.rangeOf("flush", 0, 0), time.Now())
			if lost++; lost < 3 {
				continue
			}
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		f.failLocked(fmt.Errorf("%w: %w", errIO, err))
		return f.err
	}
}

// A writable disk has only one session. acquire waits for this session and returns it. It also
// returns the number of writes that have succeeded so far: a flush of the session makes them
// durable. The session is nil if no flush can succeed any more.
func (f *flusher) acquire() (*handle, *session, int64, error) {
	p := f.pool
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		if f.err != nil {
			return nil, nil, 0, f.err
		}
		if err := p.endedForCallsLocked(false); err != nil {
			return nil, nil, 0, err
		}
		if h := p.leastBusyLocked(); h != nil {
			return h, h.session, f.written, nil
		}
		if err := p.endedForCallsLocked(true); err != nil {
			return nil, nil, 0, err
		}
		p.changed.Wait()
	}
}

// The method failed returns the error that all flushes return after a failed flush or a loss of
// writes. It is nil if nothing has failed.
func (f *flusher) failed() error {
	f.pool.mu.Lock()
	defer f.pool.mu.Unlock()
	return f.err
}

// expendable reports whether a worker process that still answers may be killed. It must not be
// killed while it has writes that no flush has made durable, because they would be lost.
func (f *flusher) expendable() bool {
	f.pool.mu.Lock()
	defer f.pool.mu.Unlock()
	return f.written == f.flushed
}

// lostLocked is called when a worker process was lost, with the reason of the loss. If the worker
// had writes that no flush had made durable, all later flushes fail from now on.
func (f *flusher) lostLocked(why error) {
	if f.written > f.flushed {
		f.failLocked(fmt.Errorf("%s: writes that were not flushed are lost: %w: %w", f.pool.life.Name, errIO, why))
	}
}

// failLocked makes all later flushes return err. If they already return an earlier error, nothing
// changes.
func (f *flusher) failLocked(err error) {
	if f.err == nil {
		f.err = err
	}
}
