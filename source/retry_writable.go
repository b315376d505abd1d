package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// retryingWritable is a disk of Retry's whose disk is Writable. A write that
// fails is made again, on the disk that was opened again. What was written to
// one and not flushed may have gone with it, which every later Flush says.
type retryingWritable struct {
	Disk // what else Retry's disk is
	r    *retrying

	mu         sync.Mutex
	writes     int64 // that have returned
	flushed    int64 // of them
	generation int   // of the disk that has those since
	lost       error
}

// Unwrap implements Wrapper.
func (w *retryingWritable) Unwrap() Disk { return w.Disk }

// change makes a call that changes the disk, until it succeeds or no retry
// helps.
func (w *retryingWritable) change(ctx context.Context, call func(Writable) error) error {
	r := w.r
	if err := r.begin(); err != nil {
		return err
	}
	defer r.work.Done()
	a := r.attempt(ctx)
	for {
		d, generation, err := r.current(&a)
		if err == nil {
			stop := a.watch(d, generation)
			err = call(writableOf(d))
			stop()
			if err == nil {
				r.progress.Mark()
				w.wrote(generation)
				return nil
			}
			if errors.Is(err, errors.ErrUnsupported) {
				return err
			}
		}
		if err := a.again(generation, err); err != nil {
			return err
		}
	}
}

// writableOf returns d as what it was when it was opened first.
func writableOf(d *openedDisk) Writable {
	if w, ok := Ability[Writable](d.Disk); ok {
		return w
	}
	return notWritable{}
}

// notWritable stands for a disk that could be written and can't any more.
type notWritable struct{}

var errNotWritable = Permanent(errors.New("the disk that was opened again can't be written"))

func (notWritable) WriteAt([]byte, int64) (int, error)                    { return 0, errNotWritable }
func (notWritable) ZeroAt(context.Context, int64, int64, ZeroFlags) error { return errNotWritable }
func (notWritable) Trim(context.Context, int64, int64) error              { return errNotWritable }
func (notWritable) Flush(context.Context) error                           { return errNotWritable }

// wrote counts a write to the disk of a generation.
func (w *retryingWritable) wrote(generation int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.looseLocked(generation)
	w.writes++
	w.generation = generation
}

// looseLocked notes that what was not flushed was written to another disk than
// that of the generation. The caller holds mu.
func (w *retryingWritable) looseLocked(generation int) {
	if w.writes > w.flushed && w.generation != generation && w.lost == nil {
		w.lost = errors.New("the source was opened again, and what was written before and not flushed may be lost")
	}
}

func (w *retryingWritable) WriteAt(p []byte, off int64) (int, error) {
	err := w.change(w.r.ctx, func(d Writable) error {
		n, err := d.WriteAt(p, off)
		if err == nil && n < len(p) {
			err = fmt.Errorf("write at %d: %d of %d bytes: %w", off, n, len(p), io.ErrShortWrite)
		}
		return err
	})
	if err != nil {
		return 0, err
	}
	return len(p), nil
}

func (w *retryingWritable) ZeroAt(ctx context.Context, off, n int64, flags ZeroFlags) error {
	return w.change(ctx, func(d Writable) error { return d.ZeroAt(ctx, off, n, flags) })
}

func (w *retryingWritable) Trim(ctx context.Context, off, n int64) error {
	return w.change(ctx, func(d Writable) error { return d.Trim(ctx, off, n) })
}

// Flush is made again only where there is nothing to flush: an error of it says
// that what was written is not safe, and a second call would not know.
func (w *retryingWritable) Flush(ctx context.Context) error {
	r := w.r
	if err := r.begin(); err != nil {
		return err
	}
	defer r.work.Done()
	a := r.attempt(ctx)
	for {
		d, generation, err := r.current(&a)
		w.mu.Lock()
		if err == nil {
			w.looseLocked(generation)
		}
		writes, dirty, lost := w.writes, w.writes > w.flushed, w.lost
		w.mu.Unlock()
		if lost != nil {
			return lost
		}
		if err == nil {
			stop := a.watch(d, generation)
			err = writableOf(d).Flush(ctx)
			stop()
		}
		w.mu.Lock()
		if err == nil {
			w.flushed = max(w.flushed, writes)
		} else if dirty && generation != 0 && w.lost == nil && !errors.Is(err, os.ErrClosed) {
			w.lost = fmt.Errorf("flush: %w", err)
		}
		lost = w.lost
		w.mu.Unlock()
		if err == nil || lost != nil {
			return lost
		}
		if err := a.again(generation, err); err != nil {
			return err
		}
	}
}

var _ Writable = (*retryingWritable)(nil)
