package vddk

import (
	"context"
	"fmt"
	"time"
)

// flusher makes the writes of a pool durable. The fields are guarded by pool.mu.
type flusher struct {
	pool    *pool
	written int64 // writes that have succeeded
	flushed int64 // how many of them the last successful flush covered
	err     error // the first failed flush, or loss of unflushed writes; it stays
}

// flush makes everything durable that was written before. The library is asked up to
// three times if workers are lost. After a failed flush, or after the loss of a worker
// with writes that no flush had covered, every flush returns that first error.
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
			s.proc.Kill()
			// lose makes all later flushes fail if there are writes that no flush has covered.
			p.lose(h, s, p.explain.rangeOf("flush", 0, 0), time.Now())
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

// acquire waits for the only session of a writable disk. It also returns the number of
// writes that a flush of that session covers. The session is nil if no flush can
// succeed any more.
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

// failed returns the error of an earlier flush, or of a loss of unflushed writes.
func (f *flusher) failed() error {
	f.pool.mu.Lock()
	defer f.pool.mu.Unlock()
	return f.err
}

// expendable reports whether a worker that still answers may be killed. It may not if there are
// writes that no flush has covered, because they would be lost.
func (f *flusher) expendable() bool {
	f.pool.mu.Lock()
	defer f.pool.mu.Unlock()
	return f.written == f.flushed
}

// lostLocked makes all flushes fail with why if there are writes that no flush has
// covered. It is called when a worker was lost.
func (f *flusher) lostLocked(why error) {
	if f.written > f.flushed {
		f.failLocked(fmt.Errorf("%s: writes that were not flushed are lost: %w: %w", f.pool.life.Name, errIO, why))
	}
}

// failLocked makes err the result of all later flushes, unless an earlier flush has failed.
func (f *flusher) failLocked(err error) {
	if f.err == nil {
		f.err = err
	}
}
