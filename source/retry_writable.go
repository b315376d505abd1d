package source

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
)

// retryingWritable is the disk that Retry returns if the opened disk is Writable. A
// failed write is repeated. If the disk was opened again for this, earlier writes that
// were not flushed may be lost, and every later Flush returns an error.
type retryingWritable struct {
	Disk // r with its other abilities
	r    *retrying

	mu         sync.Mutex
	writes     int64 // number of writes that have returned
	flushed    int64 // number of writes that were flushed
	generation int   // of the disk that received the writes since the last flush
	lost       error // why writes may be lost, or nil
}

// Unwrap implements Wrapper.
func (w *retryingWritable) Unwrap() Disk { return w.Disk }

// The method change calls the given function, which changes the disk. It repeats the call
// until the function succeeds or a retry is useless.
func (w *retryingWritable) change(ctx context.Context, call func(Writable) error) error {
	r := w.r
	if err := r.begin(); err != nil {
		return err
	}
	defer r.work.Done()
	a := r.newAttempts(ctx)
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
		if err := a.prepareRetry(generation, err); err != nil {
			return err
		}
	}
}

// writableOf returns the ability Writable of d. If d does not have this ability, all
// methods of the result return an error: the disk was writable when it was first
// opened, and has become read-only.
func writableOf(d *openedDisk) Writable {
	if w, ok := Ability[Writable](d.Disk); ok {
		return w
	}
	return notWritable{}
}

// notWritable stands for a disk that was writable when it was first opened, and is
// read-only since it was opened again.
type notWritable struct{}

var errNotWritable = Permanent(errors.New("the disk was opened again and is now read-only"))

func (notWritable) WriteAt([]byte, int64) (int, error)                    { return 0, errNotWritable }
func (notWritable) ZeroAt(context.Context, int64, int64, ZeroFlags) error { return errNotWritable }
func (notWritable) Trim(context.Context, int64, int64) error              { return errNotWritable }
func (notWritable) Flush(context.Context) error                           { return errNotWritable }

// The method wrote counts a successful write. The parameter generation is that of the
// opened disk that the write used.
func (w *retryingWritable) wrote(generation int) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLossLocked(generation)
	w.writes++
	w.generation = generation
}

// noteLossLocked sets the field lost if data may be lost: there are writes that were not
// flushed, and the disk was opened again after these writes. The parameter generation is
// that of the disk that is open now. The caller holds mu.
func (w *retryingWritable) noteLossLocked(generation int) {
	if w.writes > w.flushed && w.generation != generation && w.lost == nil {
		w.lost = errors.New("the source was opened again: data that was written and not flushed before may be lost")
	}
}

func (w *retryingWritable) WriteAt(p []byte, off int64) (int, error) {
	err := w.change(w.r.ctx, func(d Writable) error {
		n, err := d.WriteAt(p, off)
		if err == nil && n < len(p) {
			err = fmt.Errorf("write at offset %d: only %d of %d bytes were written: %w", off, n, len(p), io.ErrShortWrite)
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

// Flush implements Writable. If writes were made since the last flush, a failed flush
// is not repeated: data may have been lost, and a second flush could succeed without
// detecting the loss. If no writes were made since the last flush, a failed flush is
// repeated like other calls.
func (w *retryingWritable) Flush(ctx context.Context) error {
	r := w.r
	if err := r.begin(); err != nil {
		return err
	}
	defer r.work.Done()
	a := r.newAttempts(ctx)
	for {
		d, generation, err := r.current(&a)
		w.mu.Lock()
		if err == nil {
			w.noteLossLocked(generation)
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
		if err := a.prepareRetry(generation, err); err != nil {
			return err
		}
	}
}

var _ Writable = (*retryingWritable)(nil)
