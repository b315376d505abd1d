package source_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// notebook is a writable disk in memory. When it is opened again, it has lost the
// writes that were not flushed.
type notebook struct {
	mu             sync.Mutex
	written, safe  []byte
	openings       int
	write, flush   func() error // called before each write and flush; nil: no call fails
	writeAt        func(off int64) error
	readOnlyBefore int // number of openings for which the disk is read-only
}

func (n *notebook) open(ctx context.Context) (source.Disk, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.openings++
	copy(n.written, n.safe)
	memory := &sourcetest.Memory{Context: ctx, Bytes: n.written, ID: "notebook"}
	if n.openings <= n.readOnlyBefore {
		return memory, nil
	}
	return &page{memory, n}, nil
}

type page struct {
	*sourcetest.Memory
	n *notebook
}

func (p *page) change(off int64, check func() error, change func()) error {
	p.n.mu.Lock()
	defer p.n.mu.Unlock()
	if p.Closed() {
		return os.ErrClosed
	}
	if p.n.writeAt != nil && off >= 0 {
		if err := p.n.writeAt(off); err != nil {
			return err
		}
	}
	if check != nil {
		if err := check(); err != nil {
			return err
		}
	}
	change()
	return nil
}

func (p *page) inside(off, n int64) error {
	if off < 0 || off+n > p.Size() {
		return source.Permanent(errors.New("past the end"))
	}
	return nil
}

func (p *page) WriteAt(b []byte, off int64) (int, error) {
	if err := p.inside(off, int64(len(b))); err != nil {
		return 0, err
	}
	return len(b), p.change(off, p.n.write, func() { copy(p.n.written[off:], b) })
}

func (p *page) ZeroAt(_ context.Context, off, n int64, flags source.ZeroFlags) error {
	if err := p.inside(off, n); err != nil {
		return err
	}
	if flags.Has(source.FastOnly) {
		return errors.ErrUnsupported
	}
	return p.change(off, p.n.write, func() { clear(p.n.written[off : off+n]) })
}

func (p *page) Trim(_ context.Context, off, n int64) error {
	if err := p.inside(off, n); err != nil {
		return err
	}
	return p.change(off, p.n.write, func() {})
}

func (p *page) Flush(context.Context) error {
	return p.change(-1, p.n.flush, func() { copy(p.n.safe, p.n.written) })
}

func newNotebook() *notebook {
	return &notebook{written: make([]byte, 100_000), safe: make([]byte, 100_000)}
}

func retryNotebook(t *testing.T, n *notebook) (source.Disk, source.Writable) {
	t.Helper()
	d, err := source.Retry(t.Context(), n.open, source.RetryOptions{Retries: 5, Backoff: func(int) time.Duration { return 0 }})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	w, ok := source.Ability[source.Writable](d)
	if !ok {
		t.Fatal("not Writable")
	}
	return d, w
}

// failures returns a hook that returns the errors of the list in order, and then nil.
func failures(list ...error) func() error {
	return func() error {
		if len(list) == 0 {
			return nil
		}
		err := list[0]
		list = list[1:]
		return err
	}
}

func TestRetryWritableSuite(t *testing.T) {
	n := newNotebook()
	// Every call fails at most once. After two failures the disk would be opened again,
	// with other content.
	failed := map[int64]bool{}
	n.writeAt = func(off int64) error {
		if off%3 == 0 && !failed[off] {
			failed[off] = true
			return errBroken
		}
		return nil
	}
	d, _ := retryNotebook(t, n)
	sourcetest.Writable(t, d, make([]byte, 100_000))
	if n.openings != 1 || len(failed) < 20 {
		t.Errorf("%d openings, %d failures", n.openings, len(failed))
	}
}

// TestRetryWritableReopened tests the result of flushes after the disk was opened
// again.
func TestRetryWritableReopened(t *testing.T) {
	lost := "may be lost"
	reopen := []error{errBroken, errBroken} // after the second failure the disk is opened again
	for _, c := range []struct {
		name  string
		steps string // w: write, W: write that makes Retry open the disk again, f: flush, F: flush that fails once
		want  string // result of each flush: . for success, ! for an error
	}{
		{"never opened again", "wf", "."},
		{"nothing was unflushed", "wfWf", ".."},
		{"the first write is made again", "Wf", "."},
		{"unflushed", "wWf", "!"},
		{"for good", "wWfwff", "!!!"},
		{"opened again twice", "wWwWf", "!"},
		{"flushed before and after", "wfWwfwf", "..."},
		{"a flush that fails is never asked again", "wFff", "!!!"},
		{"with nothing to flush it may be", "wfF", ".."},
	} {
		t.Run(c.name, func(t *testing.T) {
			n := newNotebook()
			_, w := retryNotebook(t, n)
			results := ""
			flush := func() {
				if err := w.Flush(t.Context()); err == nil {
					results += "."
				} else if results += "!"; !strings.Contains(err.Error(), lost) && !errors.Is(err, errBroken) {
					t.Errorf("flush: %v", err)
				}
			}
			for i, step := range c.steps {
				switch step {
				case 'W':
					n.write = failures(slices.Clone(reopen)...)
					fallthrough
				case 'w':
					if _, err := w.WriteAt([]byte{byte(i + 1)}, int64(i)); err != nil {
						t.Fatal(err)
					}
				case 'F':
					n.flush = failures(errBroken)
					fallthrough
				case 'f':
					flush()
				}
			}
			if results != c.want {
				t.Errorf("%s: %s, want %s (%d openings)", c.steps, results, c.want, n.openings)
			}
			// The writes that a successful flush covered must not be lost.
			if strings.HasSuffix(results, ".") {
				for i, step := range c.steps {
					if (step == 'w' || step == 'W') && n.safe[i] != byte(i+1) {
						t.Errorf("the write of step %d is lost, and no flush says so", i)
					}
				}
			}
		})
	}
}

func TestRetryWritableErrors(t *testing.T) {
	n := newNotebook()
	d, w := retryNotebook(t, n)
	// Errors that are answers of the disk are returned at once.
	if err := w.ZeroAt(t.Context(), 0, 10, source.MayTrim|source.FastOnly); err != errors.ErrUnsupported {
		t.Errorf("zero, fast only: %v", err)
	}
	full := source.Permanent(errors.New("no room"))
	n.write = failures(full)
	if _, err := w.WriteAt([]byte{1}, 0); !errors.Is(err, full) {
		t.Errorf("write: %v", err)
	}
	n.write = failures(full)
	if err := w.Trim(t.Context(), 0, 1); !errors.Is(err, full) {
		t.Errorf("trim: %v", err)
	}
	n.write = func() error { return errBroken }
	if _, err := w.WriteAt([]byte{1}, 0); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "gave up after 5 retries") {
		t.Errorf("write that always fails: %v", err)
	}
	if n.openings != 5 {
		t.Errorf("%d openings", n.openings)
	}
	d.Close()
	if _, err := w.WriteAt([]byte{1}, 0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("write after Close: %v", err)
	}
	if err := w.Flush(t.Context()); !errors.Is(err, os.ErrClosed) {
		t.Errorf("flush after Close: %v", err)
	}
}

// TestRetryWritableChanges tests a disk that becomes writable, or read-only, when it is
// opened again.
func TestRetryWritableChanges(t *testing.T) {
	n := newNotebook()
	n.readOnlyBefore = 1
	d, err := source.Retry(t.Context(), n.open, source.RetryOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := source.Ability[source.Writable](d); ok {
		t.Error("Writable, and its disk is not")
	}
	d.Close()

	n = newNotebook()
	_, w := retryNotebook(t, n)
	n.readOnlyBefore = 10
	n.write = failures(errBroken, errBroken)
	if _, err := w.WriteAt([]byte{1}, 0); err == nil || !source.IsPermanent(err) {
		t.Errorf("write to a disk that can't be written any more: %v", err)
	}
	if got := fmt.Sprint(n.openings); got != "2" {
		t.Errorf("%s openings", got)
	}
}
