package vddk

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/vddk/worker"
)

// fakeQueries returns a host whose disk has one chunk of data in each window, and else holes.
func fakeQueries(t testing.TB, size int64) *fakeHost {
	host := &fakeHost{t: t, content: zeros{}, opened: worker.Opened{Capacity: uint64(size / sectorSize), Transport: "nbd"}}
	next := uint64(0)
	for off := uint64(0); off < host.opened.Capacity; off += windowChunks * chunkSectors {
		host.holes = append(host.holes, worker.Block{Start: next, Count: off + 1024 - next})
		next = off + 1024 + 128
	}
	host.holes = append(host.holes, worker.Block{Start: next, Count: host.opened.Capacity})
	return host
}

type zeros struct{}

func (zeros) ReadAt(p []byte, _ int64) (int, error) { clear(p); return len(p), nil }

// The second pass over a disk of 64 TiB makes no queries, even if the caller asks for one extent
// at a time.
func TestExtentsAreRemembered(t *testing.T) {
	const size = 64<<40 + 512
	host := fakeQueries(t, size)
	d := host.mustOpen(Params{}, Options{})
	count := func() (n int) {
		for e, err := range source.Covered(t.Context(), d, 0, size) {
			if err != nil {
				t.Fatal(err)
			}
			if n++; e.Kind == source.Data && e.Len != chunk && e.End() != size {
				t.Fatalf("%+v", e)
			}
		}
		return n
	}
	n := count()
	if n != 2*2048+2 || host.queries != 2048+outlineQueries {
		t.Errorf("%d extents, %d queries", n, host.queries)
	}
	if count(); host.queries != 2048+outlineQueries {
		t.Errorf("%d queries after the second pass", host.queries)
	}
	for off := int64(0); off < 1<<40; {
		for e, err := range d.Extents(t.Context(), off, min(size-off, 1<<32)) {
			if err != nil {
				t.Fatal(err)
			}
			off = e.End()
			break
		}
	}
	if host.queries != 2048+outlineQueries {
		t.Errorf("%d queries after one extent at a time", host.queries)
	}
	if d.allocation.cache.Bytes() > cacheBytes {
		t.Errorf("%d bytes are remembered", d.allocation.cache.Bytes())
	}
}

// The disk can be read during a slow query, and the query for the next window begins before that
// window is needed.
func TestQueriesAreAhead(t *testing.T) {
	host := fakeQueries(t, 4*window)
	let := make(chan struct{}, 4)
	asked := make(chan uint64, 4)
	host.onQuery = func(_ int, _ *fakeWorker, start, _ uint64) error {
		asked <- start / chunkSectors / windowChunks
		<-let
		return nil
	}
	d := host.mustOpen(Params{}, Options{})
	wanted := make(chan struct{})
	go func() {
		defer close(wanted)
		n := 0
		for _, err := range d.Extents(t.Context(), 0, d.Size()) {
			if err != nil {
				t.Error(err)
			}
			if n++; n == 1 {
				break
			}
		}
	}()
	if w := <-asked; w != 0 {
		t.Errorf("window %d was asked for first", w)
	}
	if _, err := d.ReadAt(make([]byte, 3*mib), 0); err != nil { // during the query
		t.Error(err)
	}
	let <- struct{}{}
	<-wanted
	if w := <-asked; w != 1 {
		t.Errorf("window %d was asked for ahead", w)
	}
	let <- struct{}{}
	close(let)
}

func TestQueriesAreHalved(t *testing.T) {
	host := fakeQueries(t, 3*window)
	most := uint64(0)
	host.onQuery = func(_ int, _ *fakeWorker, _, sectors uint64) error {
		if sectors > 100_000*chunkSectors {
			return libraryError(1, "Unknown error")
		}
		most = max(most, sectors/chunkSectors)
		return nil
	}
	d := host.mustOpen(Params{}, Options{Retry: fastRetry(-1)})
	n := 0
	for _, err := range source.Covered(t.Context(), d, 0, d.Size()) {
		if err != nil {
			t.Fatal(err)
		}
		n++
	}
	// Expected are three repetitions of the first query, three halvings, 3*8 ranges, and some
	// larger ranges that fail.
	if n != 7 || most != windowChunks/8 || host.queries < 3+3+3*8 || host.queries > 3+3+3*8+4 || d.Stats().ExtentsSource != "query" {
		t.Errorf("%d extents, up to %d chunks a query, %d queries, %+v", n, most, host.queries, d.Stats())
	}
}

// After queries have failed, no queries are made for some time, and ranges that are not known are
// Data.
func TestQueriesFail(t *testing.T) {
	for _, test := range []struct {
		name    string
		err     func(k int) error
		most    int // queries
		known   int64
		missing bool
	}{
		{name: "unsupported", err: func(int) error { return libraryError(6, "The operation is not supported") }, most: 1},
		{name: "always", err: func(int) error { return libraryError(1, "Unknown error") }, most: 12},
		{name: "later", err: func(k int) error { return when(k > 1, libraryError(1, "Unknown error")) }, most: 30, known: window},
		{name: "the worker crashes", err: func(int) error { return errCrash }, most: 3},
		{name: "once it crashes", err: func(k int) error { return when(k == 2, errCrash) }, most: 4, known: 3 * window},
		{name: "what is no answer", err: func(int) error { return errors.New("blocks overlap") }, most: 1},
		{name: "no such function", missing: true},
	} {
		t.Run(test.name, func(t *testing.T) {
			host := fakeQueries(t, 3*window)
			if test.missing {
				host.lacks = "VixDiskLib_QueryAllocatedBlocks"
			}
			host.onQuery = func(k int, _ *fakeWorker, _, _ uint64) error { return test.err(k) }
			var mu sync.Mutex
			var warnings []string
			d := host.mustOpen(Params{}, Options{Retry: fastRetry(-1), Warn: func(s string) {
				mu.Lock()
				defer mu.Unlock()
				warnings = append(warnings, s)
			}})
			for range 2 {
				end := int64(0)
				for e, err := range source.Covered(t.Context(), d, 0, d.Size()) {
					if err != nil {
						t.Fatal(err)
					}
					if end = e.End(); e.Off >= test.known && e.Kind != source.Data {
						t.Errorf("%+v, want data from %d on", e, test.known)
					}
				}
				if end != d.Size() {
					t.Errorf("the extents end at %d", end)
				}
			}
			want, source := 1, "full"
			if test.known == d.Size() {
				want, source = 0, "query"
			}
			if len(warnings) != want || host.queries > test.most || d.Stats().ExtentsSource != source {
				t.Errorf("warnings %q, %d queries, %+v", warnings, host.queries, d.Stats())
			}
		})
	}
}

// A temporary failure affects only the queries that fail: holes of other ranges are found before
// and after it.
func TestQueryHiccup(t *testing.T) {
	for _, test := range []struct {
		name       string
		from, till int // numbers of the first and last query that fail
		err        error
		most       int64 // bytes of holes that may be reported as Data
	}{
		{name: "one", from: 4, till: 4, err: libraryError(14009, "refused")},
		{name: "nine", from: 4, till: 12, err: libraryError(14009, "refused")},
		{name: "two crashes", from: 4, till: 5, err: errCrash},
		{name: "hang", from: 4, till: 4, err: errHang},
		{name: "more than is tried again", from: 4, till: 26, err: libraryError(14009, "refused"), most: 8 * unknownPiece},
		{name: "three crashes", from: 4, till: 6, err: errCrash, most: unknownPiece},
		{name: "of the outline", from: 2, till: 2, err: libraryError(1, "Unknown error")},
		{name: "the first", from: 1, till: 3, err: libraryError(1, "Unknown error")},
		{name: "an answer that is none", from: 4, till: 4, err: errors.New("blocks overlap"), most: unknownPiece},
	} {
		t.Run(test.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				host := fakeQueries(t, 300<<30)
				host.holes = nil
				size, gap := uint64(300<<30/sectorSize), uint64(25<<30/sectorSize)
				for at := uint64(0); at < size; at += gap { // 64 KiB of data in each 25 GiB
					host.holes = append(host.holes, worker.Block{Start: at + chunkSectors, Count: gap - chunkSectors})
				}
				host.onQuery = func(k int, _ *fakeWorker, _, _ uint64) error { return when(k >= test.from && k <= test.till, test.err) }
				var warnings []string
				d := host.mustOpen(Params{}, Options{Retry: source.RetryOptions{Retries: -1}, Warn: func(s string) { warnings = append(warnings, s) }})
				data := int64(0)
				for e, err := range d.Extents(t.Context(), 0, d.Size()) {
					if err != nil {
						t.Fatal(err)
					}
					if e.Kind == source.Data {
						data += e.Len
						time.Sleep(time.Duration(e.Len * 10)) // simulates reading the extent with 100 MB/s
						if _, err := d.ReadAt(make([]byte, 512), e.Off); err != nil {
							t.Fatal(err)
						}
					}
				}
				data -= 12 * chunk
				if data > test.most || data > 0 != (len(warnings) > 0) || d.Stats().ExtentsSource != "query" {
					t.Errorf("%d bytes of holes are data, at most %d may be; warnings %q, %+v", data, test.most, warnings, d.Stats())
				}
				if lost := test.till - test.from + 1; host.queries > 2*(outlineFrom+3)+2*lost {
					t.Errorf("%d queries", host.queries)
				}
				d.Close()
				host.checkGone()
			})
		})
	}
}

// The range of queries grows again if its size was not the cause of a failure.
func TestQueryLimit(t *testing.T) {
	l := newQueryLimit()
	for range 8 {
		l.failed(l.chunks)
	}
	if l.chunks != leastQuery || l.failed(l.chunks) {
		t.Errorf("%d chunks after eight failures", l.chunks)
	}
	for range 8 {
		l.succeeded(l.chunks)
	}
	if l.chunks != windowChunks {
		t.Errorf("%d chunks after eight successes", l.chunks)
	}
	// A range that is always refused is tried less and less often.
	refused := 0
	for range 1000 {
		if l.chunks > windowChunks/4 {
			l.failed(l.chunks)
			refused++
		} else {
			l.succeeded(l.chunks)
		}
	}
	if refused > 10 {
		t.Errorf("%d of 1000 queries were for more than the library takes", refused)
	}
}

// The worker of a query that hangs is killed, and Close does not wait for a query whose result is
// not needed.
func TestQueryHangs(t *testing.T) {
	host := fakeQueries(t, 3*window)
	host.onQuery = func(k int, _ *fakeWorker, _, _ uint64) error { return errHang }
	d := host.mustOpen(Params{}, Options{Timeout: 20 * time.Millisecond, Retry: fastRetry(-1)})
	for e, err := range d.Extents(t.Context(), 0, d.Size()) {
		if err != nil || e.Kind != source.Data {
			t.Error(e, err)
		}
	}
	if host.queries != 3 || d.Stats().Restarts == 0 {
		t.Errorf("%d queries, %+v", host.queries, d.Stats())
	}
}

// A disk of terabytes without holes needs few extents.
func TestExtentsWithoutHoles(t *testing.T) {
	const size = 3<<40 + 512
	host := fakeQueries(t, size)
	host.holes = []worker.Block{{Start: 5 << 30 / sectorSize, Count: chunkSectors}}
	d := host.mustOpen(Params{}, Options{})
	var got []source.Extent
	for e, err := range source.Covered(t.Context(), d, 0, size) {
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, e)
	}
	want := []source.Extent{{Off: 0, Len: 5 << 30}, {Off: 5 << 30, Len: chunk, Kind: source.Zero, Absent: true}, {Off: 5<<30 + chunk, Len: size - 5<<30 - chunk}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%v, want %v", got, want)
	}
}

// On a large disk with little data, only windows with data are queried.
func TestOutline(t *testing.T) {
	const size = 1<<40 + 3*chunk + 512
	for _, refuses := range []bool{false, true} {
		host := fakeQueries(t, size)
		data := []int64{0, 5*window + 7*chunk, 20*window - chunk, 20 * window, 32*window + chunk}
		host.holes = nil
		next := int64(0)
		for _, off := range data {
			host.holes = append(host.holes, worker.Block{Start: uint64(next) / sectorSize, Count: uint64(off-next) / sectorSize})
			next = off + chunk
		}
		host.holes = append(host.holes, worker.Block{Start: uint64(next) / sectorSize, Count: uint64(size-next) / sectorSize})
		if refuses {
			host.onQuery = func(_ int, _ *fakeWorker, _, sectors uint64) error {
				if sectors > windowChunks*chunkSectors {
					return libraryError(3, "One of the parameters was invalid")
				}
				return nil
			}
		}
		d := host.mustOpen(Params{}, Options{})
		var got []int64
		for e, err := range source.Covered(t.Context(), d, 0, size) {
			if err != nil {
				t.Fatal(err)
			}
			if e.Kind != source.Data {
				continue
			}
			for off := e.Off; off < e.End(); off += chunk {
				got = append(got, off)
			}
		}
		want := append(slices.Clone(data), size-512) // the library cannot be asked about the end of the disk
		if !slices.Equal(got, want) {
			t.Errorf("refuses %v: data at %d, want %d", refuses, got, want)
		}
		// Expected are the query of the first window, two for the outline, and those of the
		// windows with data.
		if most := 1 + outlineQueries + 4; !refuses && host.queries > most {
			t.Errorf("%d queries, want at most %d", host.queries, most)
		}
	}
}
