package batch_test

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/report"
)

func TestMerge(t *testing.T) {
	dir := t.TempDir()
	begun := time.Now().Add(-time.Hour)
	job := func(name string, status report.Status, exit int, minutes int) *batch.JobReport {
		r := report.New("s", "t")
		r.End(status, exit)
		r.Finished = begun.Add(time.Duration(minutes) * time.Minute)
		return &batch.JobReport{Name: name, Labels: map[string]string{}, Attempts: 1, Report: r}
	}
	write := func(name string, minutes int, jobs ...*batch.JobReport) {
		r := batch.Report{Version: 1, Started: begun.Add(time.Duration(minutes) * time.Minute), Finished: begun.Add(time.Duration(minutes+10) * time.Minute), Jobs: jobs}
		if err := r.Write(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	other := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := batch.Merge(dir, nil); err == nil || !strings.Contains(err.Error(), "no report of a batch") {
		t.Errorf("of nothing: %v", err)
	}
	write("0.json", 0, job("a", report.StatusInterrupted, 130, 1), job("c", report.StatusOK, 0, 1))
	write("0-again.json", 20, job("a", report.StatusOK, 0, 21), job("c", report.StatusFailed, 1, 30))
	write("1.json", 5, job("b", report.StatusFailed, 75, 6), job("d", report.StatusSkipped, 0, 40))
	write("2.json", 5, job("d", report.StatusFailed, 1, 7))
	other("jobs.state.json", `{"version":1,"jobs":[]}`)
	other("list.json", `[]`)
	other("notes.txt", `x`)
	r, notes, err := batch.Merge(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{`these jobs are in several reports; the latest one counts: "a", "c", "d"`}; !slices.Equal(notes, want) {
		t.Errorf("notes %q, want %q", notes, want)
	}
	got := ""
	for _, j := range r.Jobs {
		got += fmt.Sprintf("%s=%s ", j.Name, j.Status)
	}
	if got != "a=ok b=failed c=failed d=failed " || r.Exit != 4 || r.Counts != (batch.Counts{Done: 1, Failed: 3}) {
		t.Errorf("%s, exit %d, counts %+v", got, r.Exit, r.Counts)
	}
	if !r.Started.Equal(begun) || r.Finished.Sub(begun) != 30*time.Minute {
		t.Errorf("from %s to %s", r.Started, r.Finished)
	}
	// By a job file: in its order, without strangers, and with what is missing.
	f := newFake(t, jobsOf("e", "a", "b", "f"))
	if r, notes, err = batch.Merge(dir, f.file.Jobs); err != nil {
		t.Fatal(err)
	}
	got = ""
	for _, j := range r.Jobs {
		got += fmt.Sprintf("%s=%s ", j.Name, j.Status)
	}
	if got != "e=skipped a=ok b=failed f=skipped " || r.Exit != 4 || r.Counts != (batch.Counts{Done: 1, Failed: 1, Skipped: 2}) || !strings.Contains(r.Jobs[0].Error, "no report has this job") {
		t.Errorf("%s, exit %d, counts %+v", got, r.Exit, r.Counts)
	}
	if want := []string{`these jobs are in no report: "e", "f"`, `these jobs are left out because the job file does not have them: "c", "d"`}; len(notes) != 3 || !slices.Equal(notes[1:], want) {
		t.Errorf("notes %q, want %q", notes, want)
	}
	other("3.json", `{"version":1,"counts":{},"jobs":[{}]}`)
	if _, _, err := batch.Merge(dir, nil); err == nil || !strings.Contains(err.Error(), "3.json: jobs[0] has no name") {
		t.Errorf("of a bad one: %v", err)
	}
	for _, text := range []string{`{"version":2,"counts":{},"jobs":[]}`, `{"version":2,"counts":7,"jobs":{}}`} {
		other("3.json", text)
		_, _, err := batch.Merge(dir, nil)
		if err == nil || !strings.Contains(err.Error(), "3.json: the report has the format version 2, but this vddkcp reads only version 1") || report.Of(err).Exit != 2 {
			t.Errorf("of another version: %v", err)
		}
	}
	other("3.json", `{"version":1,"counts":7}`) // no report
	if _, _, err := batch.Merge(dir, nil); err != nil {
		t.Error(err)
	}
	other("3.json", `{"version":1,`)
	other("4.json", "")
	if _, _, err := batch.Merge(dir, nil); err == nil || !strings.Contains(err.Error(), "3.json: unexpected end of JSON input; expected the complete report of a batch") || !strings.Contains(err.Error(), "4.json: unexpected end") {
		t.Errorf("of a cut one: %v", err)
	}
}

// TestReportFields checks that the report has exactly the fields that docs/cli.md
// describes.
func TestReportFields(t *testing.T) {
	f := newFake(t, jobsOf("a"))
	r := f.mustRun(false, 0, batch.Counts{Done: 1})
	path := filepath.Join(f.dir, "r.json")
	if err := r.Write(path); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"version", "status", "exit", "job_file", "started", "finished", "updated", "counts", "totals", "curve", "jobs"} {
		if fields[name] == nil {
			t.Errorf("no %q", name)
		}
		delete(fields, name)
	}
	if len(fields) != 0 {
		t.Errorf("fields %v", fields)
	}
	var jobs struct{ Jobs []map[string]any }
	if err := json.Unmarshal(text, &jobs); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"name", "host", "labels", "attempts", "status", "exit", "source", "target", "bytes_read", "error", "hint"} {
		if _, ok := jobs.Jobs[0][name]; !ok {
			t.Errorf("a job without %q", name)
		}
	}
}

// TestMergeOfARunningBatch checks that the report of a batch that runs, or was killed, is merged as
// if the batch had been stopped, and that a note says so.
func TestMergeOfARunningBatch(t *testing.T) {
	dir := t.TempDir()
	begun := time.Date(2026, 12, 1, 22, 0, 0, 0, time.UTC)
	job := func(name string, status report.Status) *batch.JobReport {
		r := report.New("s", "t")
		r.End(status, 0)
		r.Finished = begun.Add(time.Minute)
		return &batch.JobReport{Name: name, Labels: map[string]string{}, Attempts: 1, Live: new(batch.Live), Report: r}
	}
	r := batch.Report{
		Version: 1, Status: report.StatusRunning, Exit: -1, Started: begun, Finished: begun.Add(time.Minute), Updated: begun.Add(time.Minute),
		Curve: &batch.Curve{Seconds: 10, Rates: []float64{1, 2, 3, 4, 5, 6}}, Totals: batch.Totals{BytesRead: 210},
		Jobs: []*batch.JobReport{job("a", report.StatusOK), job("b", report.StatusRunning), job("c", report.StatusPending), job("d", report.StatusPending)},
	}
	r.Jobs[2].Attempts = 0 // an attempt at d has failed, but none at c
	if err := r.Write(filepath.Join(dir, "r.json")); err != nil {
		t.Fatal(err)
	}
	// A FIFO is no report, and Merge does not wait for its content.
	if err := syscall.Mkfifo(filepath.Join(dir, "fifo.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	merged, notes, err := batch.Merge(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(notes) != 1 || !strings.Contains(notes[0], "r.json is the report of a batch that still ran, or was killed, after 2026-12-01T22:01:00Z") {
		t.Errorf("notes %q", notes)
	}
	if want := (batch.Counts{Done: 1, Failed: 1, Interrupted: 1, Skipped: 1}); merged.Counts != want || merged.Status != report.StatusFailed || merged.Exit != 4 || merged.Jobs[3].Exit != 75 {
		t.Errorf("%s, exit %d, counts %+v; want failed, 4, %+v", merged.Status, merged.Exit, merged.Counts, want)
	}
	if b := merged.Jobs[1]; b.Live != nil || b.Exit != 75 || b.Error == "" {
		t.Errorf("the job that ran: %+v, %+v", b, b.Report)
	}
	if !slices.Equal(merged.Curve.Rates, r.Curve.Rates) || merged.Totals.BytesRead != 210 {
		t.Errorf("curve %v, want %v; %d bytes", merged.Curve.Rates, r.Curve.Rates, merged.Totals.BytesRead)
	}
}
