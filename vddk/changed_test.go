package vddk

import (
	"bytes"
	"errors"
	"testing"

	"github.com/vddkcp/vddkcp/source"
)

// Without a snapshot, data that was read before is compared when a lost worker is replaced,
// because the disk may be another one with the same size and name.
func TestReopenedOtherContent(t *testing.T) {
	const size = 16 * mib
	for _, test := range []struct {
		name    string
		params  Params
		o       Options
		same    bool
		crash   int // the worker, counted from 1, that crashes during the comparison; 0 for none
		changed bool
		starts  int
	}{
		{name: "another disk", changed: true, starts: 2},
		{name: "another disk, small requests", o: Options{RequestSize: 4096}, changed: true, starts: 2},
		{name: "the same", same: true, starts: 2},
		{name: "the same, small requests", o: Options{RequestSize: 4096}, same: true, starts: 2},
		{name: "lost while it compares", crash: 2, changed: true, starts: 3},
		{name: "a snapshot", params: Params{Snapshot: "snapshot-1"}, starts: 2},
		{name: "for a server", o: Options{Retry: source.RetryOptions{Mutable: true}}, starts: 2},
	} {
		t.Run(test.name, func(t *testing.T) {
			host, content := newFakeHost(t, size)
			other := bytes.Clone(content)
			if !test.same {
				for i := range other {
					other[i] ^= 0xff
				}
			}
			crashed := false
			host.onRead = func(k int, w *fakeWorker, sector uint64, _ int) error {
				host.mu.Lock()
				defer host.mu.Unlock()
				switch {
				case w.number == 1 && sector >= size/2/sectorSize:
					host.content = bytes.NewReader(other)
					return errCrash
				case w.number == test.crash && !crashed:
					crashed = true
					return errCrash
				}
				return nil
			}
			retry := fastRetry(-1)
			retry.Mutable = test.o.Retry.Mutable
			test.o.Retry, test.o.Connections = retry, 1
			d := host.mustOpen(test.params, test.o)
			p := make([]byte, mib)
			var err error
			for off := int64(0); off < size && err == nil; off += mib {
				_, err = d.ReadAt(p, off)
			}
			if errors.Is(err, source.ErrChanged) != test.changed || !test.changed && err != nil {
				t.Errorf("%v, want an ErrChanged: %v", err, test.changed)
			}
			host.mu.Lock()
			defer host.mu.Unlock()
			if host.starts != test.starts {
				t.Errorf("%d workers, want %d", host.starts, test.starts)
			}
		})
	}
}
