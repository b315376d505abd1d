package report_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

func TestReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report.json")
	c := new(progress.Counters)
	c.AddRead(7)
	c.AddZeroed(5)
	for _, exit := range []int{1, 0} { // the second replaces the first
		r := report.New("src", "dst")
		r.Count(c.Snapshot())
		r.End(report.StatusOK, exit)
		if err := r.Write(path); err != nil {
			t.Fatal(err)
		}
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]any
	if err := json.Unmarshal(text, &fields); err != nil {
		t.Fatal(err)
	}
	// The names of docs/cli.md, all of them and no other.
	contract := "version status exit started finished seconds source target format transport vddk_version via via_reason virtual_size bytes_planned bytes_read bytes_written bytes_zero bytes_cloned connections extents_source retries worker_restarts waits resumed_from resume_proof verify digest warnings error hint"
	names := strings.Fields(contract)
	for _, name := range names {
		if _, ok := fields[name]; !ok {
			t.Errorf("%s is missing", name)
		}
	}
	if len(fields) != len(names) {
		t.Errorf("%d fields, want %d", len(fields), len(names))
	}
	if fields["exit"] != 0.0 || fields["bytes_read"] != 7.0 || fields["bytes_zero"] != 5.0 || fields["warnings"] == nil {
		t.Errorf("report %s", text)
	}
	left, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(left) != 1 {
		t.Errorf("beside the report: %v, %v", left, err)
	}
	if err := report.New("", "").Write(filepath.Join(path, "below")); err == nil {
		t.Error("no error of a report that can't be written")
	}
}
