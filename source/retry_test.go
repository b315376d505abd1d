package source_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/source/sourcetest"
)

var errBroken = errors.New("connection reset")

func content(n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{}).Read(b)
	return b
}

// opener opens Memory disks with the same content, and keeps a list of them.
type opener struct {
	content []byte
	extents []source.Extent
	each    func(n int, m *sourcetest.Memory) error // called for opening n, counted from 1

	mu    sync.Mutex
	disks []*sourcetest.Memory
	tried int
}

func (o *opener) open(ctx context.Context) (source.Disk, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if n := len(o.disks); n > 0 && !o.disks[n-1].Closed() {
		return nil, source.Permanent(fmt.Errorf("disk %d is still open", n))
	}
	m := &sourcetest.Memory{Context: ctx, Bytes: o.content, ExtentList: o.extents, ID: "the disk"}
	o.tried++
	if o.each != nil {
		if err := o.each(o.tried, m); err != nil {
			return nil, err
		}
	}
	o.disks = append(o.disks, m)
	return m, nil
}

// once returns a hook that fails the first n calls.
func once(n int) func(int64, int) error {
	var mu sync.Mutex
	return func(int64, int) error {
		mu.Lock()
		defer mu.Unlock()
		if n--; n >= 0 {
			return errBroken
		}
		return nil
	}
}

// seconds is a Backoff of n seconds before retry n.
func seconds(n int) time.Duration { return time.Duration(n) * time.Second }

func TestRetrySuite(t *testing.T) {
	extents := []source.Extent{{Len: 100_000}, {Off: 100_000, Len: 50_000, Kind: source.Zero}, {Off: 150_000, Len: 50_001}}
	b := content(200_001)
	clear(b[100_000:150_000])
	for _, c := range []struct {
		name   string
		faults int // one of this many calls fails, at random
	}{{"NoFaults", 0}, {"Faults", 4}} {
		t.Run(c.name, func(t *testing.T) {
			var mu sync.Mutex
			r := rand.New(rand.NewPCG(1, 2))
			fault := func() error {
				mu.Lock()
				defer mu.Unlock()
				if c.faults > 0 && r.IntN(c.faults) == 0 {
					return errBroken
				}
				return nil
			}
			sourcetest.Run(t, sourcetest.Config{
				Content: b,
				Open: func(ctx context.Context, t testing.TB) source.Disk {
					o := &opener{content: b, extents: extents}
					o.each = func(n int, m *sourcetest.Memory) error {
						m.OnRead = func(int64, int) error { return fault() }
						m.OnExtent = func(source.Extent) error { return fault() }
						if n == 1 {
							return nil
						}
						return fault()
					}
					d, err := source.Retry(ctx, o.open, source.RetryOptions{
						Retries: -1,
						Backoff: func(int) time.Duration { return 0 },
					})
					if err != nil {
						t.Fatal(err)
					}
					return d
				},
			})
		})
	}
}

// TestRetryFaults tests for several kinds of failures what a read returns, after how
// much time, and how often the disk is opened.
func TestRetryFaults(t *testing.T) {
	b := content(10_000)
	for _, c := range []struct {
		name       string
		options    source.RetryOptions
		each       func(n int, m *sourcetest.Memory) error
		want       string // the error; empty: success
		is         error
		after      time.Duration
		openings   int
		retries    int64
		reopenings int64
	}{
		{name: "nothing fails", openings: 1},
		{
			name:    "a read fails once: it is read again",
			options: source.RetryOptions{Retries: -1},
			each: func(n int, m *sourcetest.Memory) error {
				m.OnRead = once(1)
				return nil
			},
			after: time.Second, openings: 1, retries: 1,
		},
		{
			name:    "twice: the disk is opened again",
			options: source.RetryOptions{Retries: -1},
			each: func(n int, m *sourcetest.Memory) error {
				if n == 1 {
					m.OnRead = once(1000)
				}
				return nil
			},
			after: 3 * time.Second, openings: 2, retries: 2, reopenings: 1,
		},
		{
			name:    "opening fails three times",
			options: source.RetryOptions{Retries: -1},
			each: func(n int, m *sourcetest.Memory) error {
				if n == 1 {
					m.OnRead = once(1000)
				} else if n < 5 {
					return errBroken
				}
				return nil
			},
			after: (1 + 2 + 3 + 4 + 5) * time.Second, openings: 5, retries: 5, reopenings: 4,
		},
		{
			name:    "no retries",
			options: source.RetryOptions{},
			each:    func(n int, m *sourcetest.Memory) error { m.OnRead = once(1); return nil },
			want:    "connection reset", is: errBroken, openings: 1,
		},
		{
			name:    "too few retries",
			options: source.RetryOptions{Retries: 3},
			each:    func(n int, m *sourcetest.Memory) error { m.OnRead = once(1000); return nil },
			want:    "gave up after 3 retries: connection reset", is: errBroken,
			after: (1 + 2 + 3) * time.Second, openings: 3, retries: 3, reopenings: 2,
		},
		{
			name:    "no progress",
			options: source.RetryOptions{Retries: -1, Timeout: 10 * time.Second},
			each:    func(n int, m *sourcetest.Memory) error { m.OnRead = once(1000); return nil },
			want:    "gave up after 10s without progress: connection reset", is: errBroken,
			after: 9937500 * time.Microsecond, openings: 6, retries: 6, reopenings: 5,
		},
		{
			name:    "no such file at a reopening",
			options: source.RetryOptions{Retries: -1},
			each: func(n int, m *sourcetest.Memory) error {
				m.OnRead = once(1000)
				if n > 1 {
					return &fs.PathError{Op: "open", Path: "disk", Err: os.ErrNotExist}
				}
				return nil
			},
			want: "cannot open the source again: open disk: file does not exist", is: fs.ErrNotExist,
			after: 3 * time.Second, openings: 2, retries: 2, reopenings: 1,
		},
		{
			name:    "a marked error",
			options: source.RetryOptions{Retries: -1},
			each: func(n int, m *sourcetest.Memory) error {
				m.OnRead = func(int64, int) error { return fmt.Errorf("grain: %w", source.Permanent(errBroken)) }
				return nil
			},
			want: "grain: connection reset", is: errBroken, openings: 1,
		},
		{
			name:    "an error that the caller calls permanent",
			options: source.RetryOptions{Retries: -1, Permanent: func(err error) bool { return errors.Is(err, errBroken) }},
			each:    func(n int, m *sourcetest.Memory) error { m.OnRead = once(1); return nil },
			want:    "connection reset", is: errBroken, openings: 1,
		},
		{
			name:    "a timeout of the connection is none",
			options: source.RetryOptions{Retries: -1},
			each: func(n int, m *sourcetest.Memory) error {
				fail := once(1)
				m.OnRead = func(off int64, n int) error {
					if fail(off, n) != nil {
						return context.DeadlineExceeded
					}
					return nil
				}
				return nil
			},
			after: time.Second, openings: 1, retries: 1,
		},
		{
			name:    "another identity",
			options: source.RetryOptions{Retries: -1},
			each: func(n int, m *sourcetest.Memory) error {
				m.OnRead = once(1000)
				if n > 1 {
					m.ID = "another disk"
				}
				return nil
			},
			want:  `cannot open the source again: the disk was replaced or changed: its identity was "the disk" (proof of unchanged content: snapshot), and now is "another disk" (proof of unchanged content: snapshot)`,
			after: 3 * time.Second, openings: 2, retries: 2, reopenings: 1,
		},
		{
			name:    "another size",
			options: source.RetryOptions{Retries: -1},
			each: func(n int, m *sourcetest.Memory) error {
				m.OnRead = once(1000)
				if n > 1 {
					m.Bytes = m.Bytes[:9000]
				}
				return nil
			},
			want:  `it had 10000 bytes (identity "the disk"), and now has 9000 bytes (identity "the disk")`,
			after: 3 * time.Second, openings: 2, retries: 2, reopenings: 1,
		},
		{
			name:    "too short a read",
			options: source.RetryOptions{Retries: 1},
			each: func(n int, m *sourcetest.Memory) error {
				m.Content, m.Length = bytes.NewReader(m.Bytes[:5]), int64(len(m.Bytes))
				return nil
			},
			want: "read [3, 1003) of a disk of 10000 bytes: the disk returned 2 bytes, want 1000", is: io.ErrUnexpectedEOF,
			after: time.Second, openings: 1, retries: 1,
		},
	} {
		t.Run(c.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				o := &opener{content: b, each: c.each}
				c.options.Backoff = seconds
				d, err := source.Retry(t.Context(), o.open, c.options)
				if err != nil {
					t.Fatal(err)
				}
				start := time.Now()
				p := make([]byte, 1000)
				_, err = d.ReadAt(p, 3)
				if c.want == "" {
					if err != nil || !bytes.Equal(p, b[3:1003]) {
						t.Errorf("ReadAt: %v", err)
					}
				} else if err == nil || !strings.Contains(err.Error(), c.want) || c.is != nil && !errors.Is(err, c.is) {
					t.Errorf("ReadAt: %v, want %s", err, c.want)
				}
				if took := time.Since(start); took != c.after {
					t.Errorf("after %v, want %v", took, c.after)
				}
				counted, _ := source.Ability[source.Counted](d)
				if counts := counted.Stats(); o.tried != c.openings || counts.Retries != c.retries || counts.Reopenings != c.reopenings {
					t.Errorf("%d openings, %d retries, %d reopenings, want %d, %d, %d", o.tried, counts.Retries, counts.Reopenings, c.openings, c.retries, c.reopenings)
				}
				if err := d.Close(); err != nil {
					t.Error(err)
				}
				for i, m := range o.disks {
					if !m.Closed() {
						t.Errorf("disk %d was not closed", i+1)
					}
				}
			})
		})
	}
}

func TestRetryFirstOpening(t *testing.T) {
	n := 0
	_, err := source.Retry(t.Context(), func(context.Context) (source.Disk, error) {
		n++
		return nil, errBroken
	}, source.RetryOptions{Retries: -1})
	if err != errBroken || n != 1 {
		t.Errorf("%v after %d openings", err, n)
	}
}

// TestRetryTogether tests that many readers which fail at once open the disk only once,
// and that all of them succeed, although each waits for a time of its own.
func TestRetryTogether(t *testing.T) {
	for _, failures := range []int{0, 2} { // number of reopenings that fail
		t.Run(fmt.Sprint(failures), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := content(64 << 10)
				o := &opener{content: b, each: func(n int, m *sourcetest.Memory) error {
					switch {
					case n == 1:
						m.OnRead = once(1 << 30)
					case n < 2+failures:
						return errBroken
					}
					return nil
				}}
				d, err := source.Retry(t.Context(), o.open, source.RetryOptions{Retries: -1})
				if err != nil {
					t.Fatal(err)
				}
				defer d.Close()
				var wg sync.WaitGroup
				for i := range 16 {
					wg.Go(func() {
						p := make([]byte, 4096)
						off := int64(i * len(p))
						if _, err := d.ReadAt(p, off); err != nil || !bytes.Equal(p, b[off:off+4096]) {
							t.Errorf("ReadAt(%d): %v", off, err)
						}
					})
				}
				wg.Wait()
				if want := 2 + failures; o.tried != want {
					t.Errorf("%d openings, want %d", o.tried, want)
				}
			})
		})
	}
}

// TestRetryBadRange tests that a range which cannot be read does not make other reads
// fail, although the disk is opened again during these.
func TestRetryBadRange(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := content(64 << 10)
		o := &opener{content: b, each: func(n int, m *sourcetest.Memory) error {
			m.OnRead = func(off int64, n int) error {
				if off == 0 {
					return errBroken
				}
				time.Sleep(300 * time.Millisecond)
				return nil
			}
			return nil
		}}
		d, err := source.Retry(t.Context(), o.open, source.RetryOptions{Retries: 20, Timeout: time.Minute, Backoff: func(int) time.Duration { return time.Second }})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		var wg sync.WaitGroup
		wg.Go(func() {
			if _, err := d.ReadAt(make([]byte, 10), 0); !errors.Is(err, errBroken) {
				t.Errorf("the bad range: %v", err)
			}
		})
		for i := range 4 {
			wg.Go(func() {
				for n := range 100 {
					off := int64(1 + i + n*500)
					p := make([]byte, 400)
					if _, err := d.ReadAt(p, off); err != nil || !bytes.Equal(p, b[off:off+400]) {
						t.Errorf("ReadAt(%d): %v", off, err)
						return
					}
				}
			})
		}
		wg.Wait()
		counted, _ := source.Ability[source.Counted](d)
		if counts := counted.Stats(); counts.Retries != 20 || counts.Reopenings != 19 {
			t.Errorf("%d retries, %d reopenings", counts.Retries, counts.Reopenings)
		}
	})
}

func TestRetryExtents(t *testing.T) {
	extents := []source.Extent{{Len: 100}, {Off: 100, Len: 200, Kind: source.Zero}, {Off: 300, Len: 300}, {Off: 600, Len: 400, Kind: source.Zero}}
	synctest.Test(t, func(t *testing.T) {
		var failed []int64
		o := &opener{content: make([]byte, 1000), extents: extents, each: func(n int, m *sourcetest.Memory) error {
			m.OnExtent = func(e source.Extent) error {
				// The read at 300 fails twice with the first disk.
				if n == 1 && e.Off >= 300 {
					failed = append(failed, e.Off)
					return errBroken
				}
				return nil
			}
			return nil
		}}
		d, err := source.Retry(t.Context(), o.open, source.RetryOptions{Retries: 2, Backoff: seconds})
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		var got []source.Extent
		for e, err := range d.Extents(t.Context(), 0, 1000) {
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, e)
		}
		if !slices.Equal(got, extents) {
			t.Errorf("got %+v", got)
		}
		if !slices.Equal(failed, []int64{300, 300}) || o.tried != 2 {
			t.Errorf("failed at %d, %d openings", failed, o.tried)
		}
	})
}

// plain hides the abilities of a disk.
type plain struct{ source.Disk }
