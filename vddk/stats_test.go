package vddk

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"
)

// TestCallStats checks the table of -D vddk.stats=1.
func TestCallStats(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host, _, d := newWritable(t, 1<<20, Options{Debug: map[string]bool{"stats": true}})
		host.onRead = func(int, *fakeWorker, uint64, int) error {
			time.Sleep(1500 * time.Microsecond)
			return nil
		}
		host.onFlush = func(int, *fakeWorker) error {
			time.Sleep(time.Second)
			return nil
		}
		for off := range int64(4) {
			if _, err := d.ReadAt(make([]byte, 4096), off<<12); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := d.WriteAt(make([]byte, 8192), 0); err != nil {
			t.Fatal(err)
		}
		if err := d.Flush(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		want := []string{
			"VixDiskLib_...                        µs calls           bytes",
			"  Flush                          1000000     1",
			"  ReadAsync                         6000     4           16384",
			"  Close                                0     1",
			"  InitEx                               0     1",
			"  Open                                 0     1",
			"  WriteAsync                           0     1            8192",
		}
		if got := d.report.stats.table(); !slices.Equal(got, want) {
			t.Errorf("table\n%q, want\n%q", got, want)
		}
	})
}
