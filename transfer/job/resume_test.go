package job

import (
	"errors"
	"path/filepath"
	"testing"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// TestResumeBesideAnother checks that a run changes nothing if another process has continued
// the copy since the journal was read.
func TestResumeBesideAnother(t *testing.T) {
	path := filepath.Join(t.TempDir(), "journal")
	j, _, err := journal.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { j.Close() })
	write := func(off int64) {
		t.Helper()
		e := journal.Entry{Copy: journal.Copy{Size: 100}}
		e.Offset = off
		if err := j.Write(e); err != nil {
			t.Fatal(err)
		}
	}
	write(10)
	entries, err := journal.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	r := &resumption{path: path, entries: entries, newest: 10}
	if err := r.untouched(); err != nil {
		t.Error(err)
	}
	write(20)
	if err := r.untouched(); err == nil {
		t.Error("a checkpoint that another process wrote is overlooked")
	}
	if err := j.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := r.untouched(); err == nil {
		t.Error("a journal that another process removed is overlooked")
	}
}

// TestRetriedInABatch checks that a transient error in a batch has the exit status of a copy
// that can be resumed.
func TestRetriedInABatch(t *testing.T) {
	boom := errors.New("boom")
	if o := report.Of(&retriedError{boom}); o.Status != report.StatusFailed || o.Exit != exit.Resumable {
		t.Errorf("%+v", o)
	}
}
