package source_test

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

// TestRetryProgress tests that a read which succeeds counts as progress for another
// read that fails.
func TestRetryProgress(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &opener{content: content(1000), each: func(_ int, m *sourcetest.Memory) error {
			m.OnRead = func(off int64, _ int) error {
				if off == 0 {
					return errBroken
				}
				return nil
			}
			return nil
		}}
		d, err := source.Retry(t.Context(), o.open, source.RetryOptions{Retries: -1, Timeout: time.Minute, Backoff: func(int) time.Duration { return time.Second }})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		time.Sleep(time.Hour) // time without calls does not count
		start := time.Now()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := d.ReadAt(make([]byte, 10), 0); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "gave up after 1m0s") {
				t.Error(err)
			}
		})
		for range 10 {
			time.Sleep(30 * time.Second)
			if _, err := d.ReadAt(make([]byte, 10), 10); err != nil {
				t.Error(err)
			}
		}
		wg.Wait()
		if took := time.Since(start).Round(5 * time.Second); took != 6*time.Minute {
			t.Errorf("gave up after %v, want a minute after the five with progress", took)
		}
	})
}

// TestRetryEnds tests that the end of a context, and Close, interrupt a wait at once.
func TestRetryEnds(t *testing.T) {
	why := errors.New("the operator said stop")
	for _, c := range []struct {
		name string
		open bool // the call waits for a reopening that hangs
		end  func(cancelDisk, cancelExtents context.CancelCauseFunc, d source.Disk)
		read error
		list error
	}{
		{name: "context", end: func(disk, _ context.CancelCauseFunc, _ source.Disk) { disk(why) }, read: why, list: why},
		{name: "Close", end: func(_, _ context.CancelCauseFunc, d source.Disk) { d.Close() }, read: os.ErrClosed, list: os.ErrClosed},
		{name: "context while opening", open: true, end: func(disk, _ context.CancelCauseFunc, _ source.Disk) { disk(why) }, read: why, list: why},
		{name: "Close while opening", open: true, end: func(_, _ context.CancelCauseFunc, d source.Disk) { d.Close() }, read: os.ErrClosed, list: os.ErrClosed},
		{name: "context of Extents", end: func(_, extents context.CancelCauseFunc, _ source.Disk) { extents(why) }, list: why},
		{name: "context of Extents while opening", open: true, end: func(_, extents context.CancelCauseFunc, _ source.Disk) { extents(why) }, list: why},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ctx, cancel := context.WithCancelCause(t.Context())
				defer cancel(nil)
				extentsCtx, cancelExtents := context.WithCancelCause(t.Context())
				defer cancelExtents(nil)
				o := &opener{content: make([]byte, 1000), each: func(n int, m *sourcetest.Memory) error {
					m.OnRead = once(1 << 30)
					m.OnExtent = func(source.Extent) error { return errBroken }
					if n > 1 && c.open {
						<-m.Context.Done()
						return context.Cause(m.Context)
					}
					return nil
				}}
				d, err := source.Retry(ctx, o.open, source.RetryOptions{Retries: -1, Backoff: func(n int) time.Duration {
					if c.open && n < 3 {
						return time.Second
					}
					return 100 * time.Second
				}})
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				var wg sync.WaitGroup
				wg.Go(func() {
					if c.read == nil {
						return
					}
					if _, err := d.ReadAt(make([]byte, 10), 0); !errors.Is(err, c.read) {
						t.Errorf("ReadAt: %v, want %v", err, c.read)
					}
				})
				wg.Go(func() {
					var last error
					for _, err := range d.Extents(extentsCtx, 0, 1000) {
						last = err
					}
					if !errors.Is(last, c.list) {
						t.Errorf("Extents: %v, want %v", last, c.list)
					}
				})
				time.Sleep(50 * time.Second)
				c.end(cancel, cancelExtents, d)
				wg.Wait()
				if took := time.Since(start); took != 50*time.Second {
					t.Errorf("ended after %v, want 50 s", took)
				}
				d.Close()
				for _, m := range o.disks {
					if !m.Closed() {
						t.Error("a disk was not closed")
					}
				}
			})
		})
	}
}

func TestRetryBackoff(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := &opener{content: make([]byte, 10), each: func(_ int, m *sourcetest.Memory) error { m.OnRead = once(1 << 30); return nil }}
		var waits []time.Duration
		d, err := source.Retry(t.Context(), o.open, source.RetryOptions{
			Retries: 12,
			OnRetry: func(err error, wait time.Duration) {
				if err != errBroken {
					t.Errorf("OnRetry: %v", err)
				}
				waits = append(waits, wait)
			},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if _, err := d.ReadAt(make([]byte, 1), 0); err == nil {
			t.Error("no error")
		}
		want := []time.Duration{1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60, 60}
		if len(waits) != len(want) {
			t.Fatalf("%v", waits)
		}
		for i, w := range want {
			w *= time.Second
			if waits[i] > w || waits[i] < w/2 {
				t.Errorf("wait %d is %v, want from %v to %v", i+1, waits[i], w/2, w)
			}
		}
	})
}

// TestRetryPatience tests that a call ends with its patience, within a second, while it
// waits for a retry, a read that hangs, or an opening that hangs.
func TestRetryPatience(t *testing.T) {
	const patience = 6 * time.Second
	hangs := func(m *sourcetest.Memory) error {
		<-m.Context.Done()
		return context.Cause(m.Context)
	}
	for _, c := range []struct {
		name string
		each func(n int, m *sourcetest.Memory) error
		want string
	}{
		{"every read fails", func(_ int, m *sourcetest.Memory) error {
			m.OnRead = func(int64, int) error { return errBroken }
			return nil
		}, "connection reset"},
		{"every read hangs", func(_ int, m *sourcetest.Memory) error {
			m.OnRead = func(int64, int) error { return hangs(m) }
			return nil
		}, "no answer"},
		{"a read fails and the next hangs", func(_ int, m *sourcetest.Memory) error {
			fails := once(1)
			m.OnRead = func(off int64, n int) error {
				if err := fails(off, n); err != nil {
					return err
				}
				return hangs(m)
			}
			return nil
		}, "no answer"},
		{"opening again is refused", func(n int, m *sourcetest.Memory) error {
			m.OnRead = func(int64, int) error { return errBroken }
			if n > 1 {
				return errBroken
			}
			return nil
		}, "cannot open the source again: connection reset"},
		{"opening again hangs", func(n int, m *sourcetest.Memory) error {
			m.OnRead = func(int64, int) error { return errBroken }
			if n > 1 {
				return hangs(m)
			}
			return nil
		}, "cannot open the source again: no answer"},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := &opener{content: content(1000), each: c.each}
				d, err := source.Retry(t.Context(), o.open, source.RetryOptions{Retries: -1, Timeout: patience})
				if err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Hour) // time without calls does not count
				start := time.Now()
				_, err = d.ReadAt(make([]byte, 10), 0)
				if err == nil || !strings.Contains(err.Error(), "gave up after 6s without progress: "+c.want) {
					t.Errorf("%v", err)
				}
				if took := time.Since(start); took < patience-time.Second || took > patience+time.Second {
					t.Errorf("ended after %v, want %v", took, patience)
				}
				d.Close()
				for _, m := range o.disks {
					if !m.Closed() {
						t.Error("a disk was not closed")
					}
				}
			})
		})
	}
}

// ending is a disk that ends by itself when err is set.
type ending struct {
	*sourcetest.Memory
	err error
}

func (e *ending) Ended() error { return e.err }

func (e *ending) ReadAt(p []byte, off int64) (int, error) {
	if e.err != nil {
		return 0, e.err
	}
	return e.Memory.ReadAt(p, off)
}

// TestRetryRevives tests that, with Revive, the next call opens a disk again that has
// ended or could not be opened for a permanent reason. A disk that changed stays an
// error.
func TestRetryRevives(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		refused := source.Permanent(errors.New("incorrect password"))
		var last *ending
		var refuse error
		id, openings := "the disk", 0
		open := func(ctx context.Context) (source.Disk, error) {
			openings++
			if refuse != nil {
				return nil, refuse
			}
			last = &ending{Memory: &sourcetest.Memory{Context: ctx, Bytes: content(1000), ID: id}}
			return last, nil
		}
		d, err := source.Retry(t.Context(), open, source.RetryOptions{Revive: true, Timeout: 1 << 62, Backoff: seconds})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		read := func() error {
			_, err := d.ReadAt(make([]byte, 10), 0)
			return err
		}
		// An error does not open the disk again if the disk has not ended.
		broken := true
		last.OnRead = func(int64, int) error {
			if broken {
				return errBroken
			}
			return nil
		}
		if err := read(); !errors.Is(err, errBroken) {
			t.Errorf("a read that fails: %v", err)
		}
		broken = false
		if err := read(); err != nil || openings != 1 {
			t.Errorf("after an error: %v, %d openings", err, openings)
		}
		// The disk ends, and the next openings are refused for a while.
		first := last
		last.err = errors.New("given up")
		if err := read(); !errors.Is(err, last.err) {
			t.Errorf("the end: %v", err)
		}
		refuse = refused
		for range 2 {
			if err := read(); !errors.Is(err, refused) {
				t.Errorf("while it is refused: %v", err)
			}
		}
		if openings != 3 || !first.Closed() {
			t.Errorf("%d openings; closed %v", openings, first.Closed())
		}
		refuse = nil
		if err := read(); err != nil {
			t.Errorf("there again: %v", err)
		}
		// Another disk with the same name is an error.
		last.err = errors.New("given up")
		read()
		id = "another disk"
		for range 2 {
			if err := read(); !errors.Is(err, source.ErrChanged) {
				t.Errorf("another disk: %v", err)
			}
		}
	})
}
