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

// endedLocked returns why no call can be made any more, or not under ctx. The
// caller holds mu.
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

// begin makes Close wait until work.Done.
func (r *retrying) begin() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.endedLocked(r.ctx); err != nil {
		return err
	}
	r.work.Add(1)
	return nil
}

func (r *retrying) Size() int64 { return r.first.Size() }

func (r *retrying) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, fmt.Errorf("read at negative offset %d", off)
	}
	if err := r.begin(); err != nil {
		return 0, err
	}
	defer r.work.Done()
	a := r.attempt(r.ctx)
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
		if err := a.again(generation, err); err != nil {
			return 0, err
		}
	}
}

// readFull reads from d and takes an end that is not d's for an error.
func readFull(d Disk, p []byte, off int64) (int, error) {
	n, err := d.ReadAt(p, off)
	if err != nil && err != io.EOF {
		return n, err
	}
	if want := min(int64(len(p)), max(d.Size()-off, 0)); int64(n) != want {
		return n, fmt.Errorf("read [%d, %d) of a disk of %d bytes: got %d bytes, want %d: %w", off, off+int64(len(p)), d.Size(), n, want, io.ErrUnexpectedEOF)
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// Extents goes on behind the last extent that was yielded.
func (r *retrying) Extents(ctx context.Context, off, length int64) iter.Seq2[Extent, error] {
	return func(yield func(Extent, error) bool) {
		end := off + length
		if off < 0 || length < 0 || end < off || end > r.Size() {
			yield(Extent{}, fmt.Errorf("extents [%d, %d) of a disk of %d bytes", off, end, r.Size()))
			return
		}
		a := r.attempt(ctx)
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
			if err := a.again(generation, err); err != nil {
				yield(Extent{}, err)
				return
			}
		}
	}
}

// Identity is that of the disk now. A disk that is not Identified has an empty
// one that proves nothing.
func (r *retrying) Identity(ctx context.Context) (id, proof string, err error) {
	a := r.attempt(ctx)
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
		if err := a.again(generation, err); err != nil {
			return "", "", err
		}
	}
}

func (r *retrying) ReadUncached() {
	r.mu.Lock()
	r.uncached = true
	d := r.disk
	r.mu.Unlock()
	if d == nil {
		return // reopen passes it on to the disk that it opens
	}
	if u, ok := Ability[Uncached](d.Disk); ok {
		u.ReadUncached()
	}
}

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

// Stats are the disk's own, where it counts, and the retries.
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

// Close ends waits and a reopening in progress, and waits for calls.
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
		r.outage.abandoned.Close() // an error of a disk that failed says nothing new
	}
	if r.disk != r.first && r.inFile {
		err = errors.Join(err, r.first.Close())
	}
	return err
}

type retryingInfo struct{ info Info }

func (i retryingInfo) Info() Info { return i.info }

type retryingBuffer struct{ r *retrying }

// Buffer is not among what Close waits for: it may wait for buffers that are
// freed only later. The disk below ends it.
func (b retryingBuffer) Buffer(ctx context.Context, n int) ([]byte, func(), error) {
	a := b.r.attempt(ctx)
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
				// Until now it may have waited for a buffer to be freed.
				a.Advance()
			}
		}
		if err := a.again(generation, err); err != nil {
			return nil, nil, err
		}
	}
}
