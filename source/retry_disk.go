package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"iter"
	"os"
)

// Ended implements Ender.
func (r *retrying) Ended() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dead
}

// endedLocked returns an error if no call can succeed any more: the disk was closed, it
// cannot be opened again, its context has ended, or the context of the call has ended
// (ctx). If endedLocked returns nil, the disk can be called. The caller holds mu.
func (r *retrying) endedLocked(ctx context.Context) error {
	switch {
	case r.ctx.Err() != nil:
		return context.Cause(r.ctx)
	case r.closed:
		return os.ErrClosed
	case ctx.Err() != nil:
		return context.Cause(ctx)
	}
	return r.dead
}

// The method begin must be called at the start of a call of the disk. If it returns nil,
// the caller must call work.Done at the end of that call, for which Close waits.
func (r *retrying) begin() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.endedLocked(r.ctx); err != nil {
		return err
	}
	r.work.Add(1)
	return nil
}

// Size implements Disk.
func (r *retrying) Size() int64 { return r.first.Size() }

// ReadAt implements Disk.
func (r *retrying) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("cannot read at the negative offset %d", off)
	}
	if err := r.begin(); err != nil {
		return 0, err
	}
	defer r.work.Done()
	a := r.newAttempts(r.ctx)
	for {
		d, generation, err := r.current(&a)
		if err == nil {
			var n int
			stop := a.watch(d, generation)
			n, err = readFull(d.Disk, p, off)
			stop()
			if err == nil || err == io.EOF {
				r.progress.Mark()
				if r.samples != nil {
					r.samples.Add(p[:n], off)
				}
				return n, err
			}
		}
		if err := a.prepareRetry(generation, err); err != nil {
			return 0, err
		}
	}
}

// readFull calls d.ReadAt. If this returns fewer bytes than requested although the
// range does not reach the end of the disk, readFull returns an error.
func readFull(d Disk, p []byte, off int64) (int, error) {
	n, err := d.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return n, err
	}
	if want := min(int64(len(p)), max(d.Size()-off, 0)); int64(n) != want {
		return n, fmt.Errorf("read [%d, %d) of a disk of %d bytes: the disk returned %d bytes, want %d: %w", off, off+int64(len(p)), d.Size(), n, want, io.ErrUnexpectedEOF)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Extents implements Disk. If the method Extents of the opened disk fails, it is called
// again for the rest of the range: from the end of the last extent that was yielded.
func (r *retrying) Extents(ctx context.Context, off, length int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		end := off + length
		if off < 0 || length < 0 || end < off || end > r.Size() {
			yield(Extent{}, fmt.Errorf("extents of [%d, %d): the range is outside the disk of %d bytes", off, end, r.Size()))
			return
		}
		a := r.newAttempts(ctx)
		for {
			d, generation, err := r.current(&a)
			if err == nil {
				stop := a.watch(d, generation)
				for e, extentsErr := range d.Extents(ctx, off, end-off) {
					stop()
					if err = extentsErr; err != nil {
						break
					}
					if !yield(e, nil) {
						return
					}
					off = e.End()
					a.Advance()
					stop = a.watch(d, generation)
				}
				stop()
			}
			if err == nil {
				return
			}
			if err := a.prepareRetry(generation, err); err != nil {
				yield(Extent{}, err)
				return
			}
		}
	}
}

// Identity returns the identity of the disk as it is now. For a disk that is not
// Identified, the identity is empty and the proof is "none".
func (r *retrying) Identity(ctx context.Context) (id, proof string, err error) {
	a := r.newAttempts(ctx)
	for {
		d, generation, err := r.current(&a)
		if err == nil {
			i, ok := Ability[Identified](d.Disk)
			if !ok {
				return "", "none", nil
			}
			stop := a.watch(d, generation)
			id, proof, err = i.Identity(ctx)
			stop()
			if err == nil {
				return id, proof, nil
			}
		}
		if err := a.prepareRetry(generation, err); err != nil {
			return "", "", err
		}
	}
}

// ReadUncached implements Uncached.
func (r *retrying) ReadUncached() {
	r.mu.Lock()
	r.uncached = true
	d := r.disk
	r.mu.Unlock()
	if d == nil {
		return // reopen makes the next disk read uncached
	}
	if u, ok := Ability[Uncached](d.Disk); ok {
		u.ReadUncached()
	}
}

// InFile implements the ability InFile. After the disk was opened again, ok is always
// false.
func (r *retrying) InFile(off int64) (f *os.File, pos, n int64, ok bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.closed || r.disk != r.first {
		return nil, 0, 0, false
	}
	i, ok := Ability[InFile](r.first.Disk)
	if !ok {
		return nil, 0, 0, false
	}
	f, pos, n, ok = i.InFile(off)
	r.inFile = r.inFile || ok
	return f, pos, n, ok
}

// Stats returns the statistics of the opened disk if it has the ability Counted. It
// adds the numbers of retries and reopenings that Retry itself has made.
func (r *retrying) Stats() Stats {
	var s Stats
	r.mu.Lock()
	d := r.disk
	if d == nil {
		d = r.first
	}
	r.mu.Unlock()
	if c, ok := Ability[Counted](d.Disk); ok {
		s = c.Stats()
	}
	s.Retries += r.retries.Load()
	s.Reopenings += r.reopenings.Load()
	return s
}

// Close interrupts calls that wait, and the goroutine that opens the disk again. It
// waits until all calls have returned.
func (r *retrying) Close() error {
	r.mu.Lock()
	if r.closed {
		r.mu.Unlock()
		return os.ErrClosed
	}
	r.closed = true
	r.mu.Unlock()
	r.end(os.ErrClosed)
	r.work.Wait()
	var err error
	if r.disk != nil {
		err = r.disk.Close()
	}
	if r.outage.abandoned != nil {
		r.outage.abandoned.Close() // the disk failed already, so that this error is not of interest
	}
	if r.disk != r.first && r.inFile {
		err = errors.Join(err, r.first.Close())
	}
	return err
}

// retryingInfo adds the ability Described to the disk that Retry returns.
type retryingInfo struct{ info Info }

func (i retryingInfo) Info() Info { return i.info }

// retryingBuffer adds the ability Allocator to the disk that Retry returns.
type retryingBuffer struct{ r *retrying }

// Buffer implements Allocator. A call of Buffer may wait until another caller frees a
// buffer, and that caller may do so only after Close. Therefore Close does not wait for
// calls of Buffer. Close closes the opened disk, whose method Buffer then returns an
// error, and this ends the wait.
func (b retryingBuffer) Buffer(ctx context.Context, n int) ([]byte, func(), error) {
	a := b.r.newAttempts(ctx)
	for {
		d, generation, err := b.r.current(&a)
		if err == nil {
			allocator, ok := Ability[Allocator](d.Disk)
			if !ok {
				return make([]byte, n), func() {}, nil
			}
			var p []byte
			var free func()
			if p, free, err = allocator.Buffer(ctx, n); err == nil {
				return p, free, nil
			}
			if a.Failures() == 0 {
				// The call may have waited a long time for another caller to free a
				// buffer. This time must not count as time without progress.
				a.Advance()
			}
		}
		if err := a.prepareRetry(generation, err); err != nil {
			return nil, nil, err
		}
	}
}
