package batch

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Report is what became of a batch, by docs/cli.md, "run: job files".
type Report struct {
	Version  int           `json:"version"`
	Status   report.Status `json:"status"` // ok, failed or interrupted
	Exit     int           `json:"exit"`
	Started  time.Time     `json:"started"`
	Finished time.Time     `json:"finished"`
	Counts   Counts        `json:"counts"`
	Jobs     []*JobReport  `json:"jobs"`
}

// Counts are numbers of jobs. Done are those whose target is whole, also from an
// earlier run; skipped are those that were not started.
type Counts struct {
	Done        int `json:"done"`
	Failed      int `json:"failed"`
	Skipped     int `json:"skipped"`
	Interrupted int `json:"interrupted"`
}

// JobReport is the report of a job's last attempt.
type JobReport struct {
	Name     string            `json:"name"`
	Labels   map[string]string `json:"labels"`
	Attempts int               `json:"attempts"`
	*report.Report
}

// end counts the jobs and decides the status. Stopped is the exit status that a
// signal asks for, or 0.
func (r *Report) end(stopped int) {
	r.Counts = Counts{}
	canResume, attention := true, 0
	for _, j := range r.Jobs {
		switch j.Status {
		case report.StatusOK:
			r.Counts.Done++
			attention = max(attention, j.Exit)
		case report.StatusSkipped:
			r.Counts.Skipped++
		case report.StatusInterrupted:
			r.Counts.Interrupted++
		default:
			r.Counts.Failed++
			canResume = canResume && j.Exit == exit.Resumable
		}
	}
	c := r.Counts
	switch {
	case stopped != 0:
		r.Status, r.Exit = report.StatusInterrupted, stopped
	case c.Done == len(r.Jobs):
		r.Status, r.Exit = report.StatusOK, attention // 0 unless a job that is done left something behind
	case c.Failed == 0: // of a merge: all the others were stopped
		r.Status, r.Exit = report.StatusInterrupted, exit.Resumable
	case c.Done > 0:
		r.Status, r.Exit = report.StatusFailed, exit.SomeJobs
	case canResume:
		r.Status, r.Exit = report.StatusFailed, exit.Resumable
	default:
		r.Status, r.Exit = report.StatusFailed, exit.Failed
	}
}

// Single makes the report of a batch out of that of one copy, for Write. The
// source names the job.
func Single(copied *report.Report) *Report {
	r := &Report{Version: 1, Started: copied.Started, Finished: copied.Finished, Jobs: []*JobReport{{Name: copied.Source, Attempts: 1, Report: copied}}}
	r.end(0)
	r.Status, r.Exit = copied.Status, copied.Exit
	return r
}

// Write writes the report to path, as a page for people where the name ends in
// .html, else as JSON: as a whole or not at all, or in place where path is no
// regular file, as durable.Write does.
func (r *Report) Write(path string) error {
	var text []byte
	var err error
	if strings.EqualFold(filepath.Ext(path), ".html") {
		text, err = r.page()
	} else if text, err = json.MarshalIndent(r, "", "  "); err == nil {
		text = append(text, '\n')
	}
	text = printable.Bytes(text)
	if err == nil {
		err = durable.Write(path, text, privateMode)
	}
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return nil
}

// maxReport bounds a report that is merged, in bytes.
const maxReport = 1 << 30

// Merge makes one report of those in the folder dir: all files there whose names
// end in .json and that are reports of batches. A job that several have counts
// once, by the latest in which it began. With jobs the report is of these and in
// their order, and those that no report has are skipped. Notes are for the user.
func Merge(dir string, jobs []*Job) (merged *Report, notes []string, err error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("merge reports: %w", err)
	}
	merged = &Report{Version: 1}
	byName := map[string]*JobReport{}
	var names, twice []string
	found := 0
	var bad []error // of all files at once
	for _, f := range files {
		if !strings.EqualFold(filepath.Ext(f.Name()), ".json") || strings.HasPrefix(f.Name(), ".") || f.IsDir() {
			continue
		}
		r, err := readReport(filepath.Join(dir, f.Name()))
		if err != nil {
			bad = append(bad, fmt.Errorf("merge reports: %w", err))
		}
		if r == nil {
			continue
		}
		found++
		if merged.Started.IsZero() || r.Started.Before(merged.Started) {
			merged.Started = r.Started
		}
		if r.Finished.After(merged.Finished) {
			merged.Finished = r.Finished
		}
		for _, j := range r.Jobs {
			have, ok := byName[j.Name]
			if !ok {
				names = append(names, j.Name)
			} else if !slices.Contains(twice, j.Name) {
				twice = append(twice, j.Name)
			}
			if !ok || j.better(have) {
				byName[j.Name] = j
			}
		}
	}
	if len(bad) > 0 {
		return nil, nil, errors.Join(bad...)
	}
	if found == 0 {
		return nil, nil, fmt.Errorf("merge reports: %w", &fs.PathError{Op: "look for *.json", Path: dir, Err: errors.New("no report of a batch")})
	}
	if len(twice) > 0 {
		notes = append(notes, "in several reports, of which the latest counts: "+listed(twice))
	}
	if jobs == nil {
		slices.Sort(names)
		for _, name := range names {
			merged.Jobs = append(merged.Jobs, byName[name])
		}
		merged.end(0)
		return merged, notes, nil
	}
	var missing []string
	for _, j := range jobs {
		r := byName[j.Name]
		delete(byName, j.Name)
		if r == nil {
			missing = append(missing, j.Name)
			r = skippedReport(j, "no report has it: its shard did not run, or has not ended")
		}
		merged.Jobs = append(merged.Jobs, r)
	}
	if len(missing) > 0 {
		notes = append(notes, "in no report: "+listed(missing))
	}
	if len(byName) > 0 {
		notes = append(notes, "left out, since the job file does not have them: "+listed(slices.Sorted(maps.Keys(byName))))
	}
	merged.end(0)
	return merged, notes, nil
}

// listed names a few jobs.
func listed(names []string) string {
	const few = 10
	quoted := make([]string, 0, few)
	for _, name := range names[:min(len(names), few)] {
		quoted = append(quoted, strconv.Quote(name))
	}
	text := strings.Join(quoted, ", ")
	if more := len(names) - few; more > 0 {
		text += fmt.Sprintf(" and %d more", more)
	}
	return text
}

// better says whether j tells more of a job than other does: what became of it
// last, not that a later run never came to it.
func (j *JobReport) better(other *JobReport) bool {
	if a, b := j.Status == report.StatusSkipped, other.Status == report.StatusSkipped; a != b {
		return b
	}
	return j.Finished.After(other.Finished)
}

// readReport returns nil for JSON that is no report of a batch.
func readReport(path string) (*Report, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if fi.Size() > maxReport {
		return nil, fmt.Errorf("%s: %d bytes, want a report of at most %d", path, fi.Size(), maxReport)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	// A state file lies there too, and has jobs.
	var shape struct {
		Version int               `json:"version"`
		Counts  *Counts           `json:"counts"`
		Jobs    []json.RawMessage `json:"jobs"`
	}
	if err := json.Unmarshal(text, &shape); err != nil {
		if errors.As(err, new(*json.UnmarshalTypeError)) {
			return nil, nil
		}
		return nil, fmt.Errorf("%s: %w; want a whole report: run what wrote it again with --resume, or remove it", path, err)
	}
	if shape.Counts == nil {
		return nil, nil
	}
	if shape.Version != 1 {
		return nil, fmt.Errorf("%s: a report of version %d, want 1", path, shape.Version)
	}
	r := new(Report)
	if err := json.NewDecoder(bytes.NewReader(text)).Decode(r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for i, j := range r.Jobs {
		if j == nil || j.Report == nil || j.Name == "" {
			return nil, fmt.Errorf("%s: jobs[%d] has no name or no status", path, i)
		}
	}
	return r, nil
}
