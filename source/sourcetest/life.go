package sourcetest

import (
	"context"
	"errors"
	"io"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/vddkcp/vddkcp/source"
)

func testContext(t *testing.T, c Config) {
	ctx, cancel := context.WithCancelCause(t.Context())
	d := c.Open(ctx, t)
	defer d.Close()
	if c.size() > 0 {
		if err := c.readAt(d, 0, 1); err != nil {
			t.Fatal(err)
		}
	}
	// Several goroutines, the readers, read the disk until a read fails. The error of the
	// failed read must be the cause with which the context is canceled below. The variable why
	// has this cause.
	why := errors.New("the operator said stop")
	var readers, running sync.WaitGroup
	for g := range 4 {
		running.Add(1)
		readers.Go(func() {
			r := c.random(uint64(g))
			for i := 0; ; i++ {
				if i == 1 || c.size() == 0 {
					running.Done()
				}
				if c.size() == 0 {
					return
				}
				off := r.Int64N(c.size())
				if err := c.readAt(d, off, int(min(64<<10, c.size()-off))); err != nil {
					if !errors.Is(err, why) {
						t.Errorf("a read while the context ends: %v, want its cause", err)
					}
					if i == 0 {
						running.Done()
					}
					return
				}
			}
		})
	}
	running.Wait()
	cancel(why)
	within(t, "reading after the context's end", readers.Wait)
	within(t, "ReadAt after the context's end", func() {
		if _, err := d.ReadAt(make([]byte, 1), 0); !errors.Is(err, why) && c.size() > 0 {
			t.Errorf("ReadAt after the context's end: %v, want its cause", err)
		}
	})
	within(t, "Extents after the context's end", func() {
		if err := c.extentsError(d, t.Context()); !errors.Is(err, why) && c.size() > 0 {
			t.Errorf("Extents after the context's end: %v, want its cause", err)
		}
	})
	within(t, "Close after the context's end", func() { d.Close() })
}

// extentsError iterates over the extents of the whole disk and returns the first error
// that is yielded.
func (c Config) extentsError(d source.Disk, ctx context.Context) error {
	for _, err := range d.Extents(ctx, 0, c.size()) {
		if err != nil {
			return err
		}
	}
	return nil
}

func testContextOfExtents(t *testing.T, c Config) {
	if c.size() == 0 {
		t.Skip("an empty disk")
	}
	d := c.open(t)
	why := errors.New("only this iteration")
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	// The context is canceled after the first extent. The iteration may yield more
	// extents nevertheless, and these must be correct. It may also yield an error,
	// which must be the cause with which the context was canceled.
	next, ended := int64(0), error(nil)
	for e, err := range d.Extents(ctx, 0, c.size()) {
		if ended != nil {
			t.Fatalf("%+v, %v after the error", e, err)
		}
		if ended = err; err != nil {
			continue
		}
		if e.Off != next {
			t.Fatalf("%+v, want one at %d", e, next)
		}
		next = e.End()
		cancel(why)
	}
	if ended == nil && next != c.size() || ended != nil && !errors.Is(ended, why) {
		t.Errorf("the context ended during Extents: at %d of %d, %v", next, c.size(), ended)
	}
	if err := c.extentsError(d, ctx); !errors.Is(err, why) {
		t.Errorf("Extents with a context that has ended: %v, want its cause", err)
	}
	if err := c.readAt(d, 0, 1); err != nil { // the disk itself has not ended
		t.Error(err)
	}
	c.extents(t, d, 0, c.size())
}

func testClose(t *testing.T, c Config) {
	d := c.Open(t.Context(), t)
	if err := d.Close(); err != nil {
		t.Errorf("Close: %v", err)
	}
	c.closed(t, d)
	_ = d.Close() // a second Close may return an error
	c.closed(t, d)
}

// The method closed checks that calls of a closed disk fail.
func (c Config) closed(t *testing.T, d source.Disk) {
	t.Helper()
	if c.size() == 0 {
		return
	}
	if n, err := d.ReadAt(make([]byte, 1), 0); err == nil || err == io.EOF {
		t.Errorf("ReadAt after Close: %d, %v, want an error", n, err)
	}
	if err := c.extentsError(d, t.Context()); err == nil {
		t.Errorf("Extents after Close: no error")
	}
}

func testCloseBesideCalls(t *testing.T, c Config) {
	if c.size() == 0 {
		t.Skip("an empty disk")
	}
	d := c.Open(t.Context(), t)
	var wg, running sync.WaitGroup
	var closed atomic.Bool
	for g := range 8 {
		running.Add(1)
		wg.Go(func() {
			r := c.random(uint64(g))
			p := make([]byte, min(64<<10, c.size()))
			for i := 0; ; i++ {
				off := r.Int64N(c.size() - int64(len(p)) + 1)
				late := closed.Load()
				var err error
				if g == 0 {
					err = c.extentsError(d, t.Context())
				} else if _, err = d.ReadAt(p, off); err == nil || err == io.EOF {
					// A read that succeeds while Close runs must return all of the
					// requested bytes.
					if err = differ(p, c.Content[off:off+int64(len(p))], off); err != nil {
						t.Errorf("a read beside Close: %v", err)
					}
				}
				if i == 0 {
					running.Done()
				}
				if err == nil && late {
					t.Error("a call that began after Close succeeded")
				}
				if err != nil || late {
					return
				}
			}
		})
	}
	running.Wait()
	within(t, "Close beside reads", func() {
		if err := d.Close(); err != nil {
			t.Errorf("Close beside reads: %v", err)
		}
	})
	closed.Store(true)
	within(t, "reading a closed disk", wg.Wait)
	c.closed(t, d)
}
