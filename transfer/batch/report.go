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

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/fileversion"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Report says how a batch ended, or what it does while it runs. The section "Reports of a batch"
// of docs/cli.md describes its JSON.
type Report struct {
	Version  int           `json:"version"`
	Status   report.Status `json:"status"` // ok, failed, interrupted or running
	Exit     int           `json:"exit"`   // -1 while the batch runs
	JobFile  string        `json:"job_file"`
	Started  time.Time     `json:"started"`
	Finished time.Time     `json:"finished"` // while the batch runs, the same as Updated
	Updated  time.Time     `json:"updated"`  // when the report was made
	Counts   Counts        `json:"counts"`
	Totals   Totals        `json:"totals"`
	Curve    *Curve        `json:"curve,omitempty"`
	Jobs     []*JobReport  `json:"jobs"`
}

// Counts says how many jobs ended in which way. A job is done if its target is complete, even
// if an earlier run copied it. A job is skipped if it was not started.
type Counts struct {
	Done        int `json:"done"`
	Failed      int `json:"failed"`
	Skipped     int `json:"skipped"`
	Interrupted int `json:"interrupted"`
	Running     int `json:"running"` // 0 if the batch has ended
	Pending     int `json:"pending"` // 0 if the batch has ended
}

// The method add counts a job with the given status.
func (c *Counts) add(s report.Status) {
	switch s {
	case report.StatusOK:
		c.Done++
	case report.StatusSkipped:
		c.Skipped++
	case report.StatusInterrupted:
		c.Interrupted++
	case report.StatusRunning:
		c.Running++
	case report.StatusPending:
		c.Pending++
	default:
		c.Failed++
	}
}

// JobReport is the report of a job's last attempt.
type JobReport struct {
	Name     string            `json:"name"`
	Host     string            `json:"host"` // the ESXi host, as the job file has it
	Labels   map[string]string `json:"labels"`
	Attempts int               `json:"attempts"`
	Live     *Live             `json:"live,omitempty"` // nil if the job does not run
	*report.Report
}

// The method end completes the report: it counts the jobs, and sets the status and the exit status
// of the batch. If a signal stopped the batch, the parameter stopped is the exit status for this
// signal; if not, it is 0.
func (r *Report) end(stopped int) {
	r.Counts = Counts{}
	canResume, attention := true, 0
	for _, j := range r.Jobs {
		r.Counts.add(j.Status)
		switch j.Status {
		case report.StatusOK:
			attention = max(attention, j.Exit)
		case report.StatusFailed, report.StatusMismatch:
			canResume = canResume && j.Exit == exit.Resumable
		}
	}
	c := r.Counts
	switch {
	case stopped != 0:
		r.Status, r.Exit = report.StatusInterrupted, stopped
	case c.Done == len(r.Jobs):
		r.Status, r.Exit = report.StatusOK, attention // not 0 if a job is done, but needs attention
	case c.Failed == 0: // only in a merged report: all other jobs were interrupted
		r.Status, r.Exit = report.StatusInterrupted, exit.Resumable
	case c.Done > 0:
		r.Status, r.Exit = report.StatusFailed, exit.SomeJobs
	case canResume:
		r.Status, r.Exit = report.StatusFailed, exit.Resumable
	default:
		r.Status, r.Exit = report.StatusFailed, exit.Failed
	}
}

// Single turns the report of a single copy into the report of a batch with one job. The name of
// the job is the source.
func Single(copied *report.Report) *Report {
	r := &Report{Version: 1, Started: copied.Started, Finished: copied.Finished, Updated: copied.Finished, Jobs: []*JobReport{{Name: copied.Source, Attempts: 1, Report: copied}}}
	r.end(0)
	r.Status, r.Exit, r.Totals = copied.Status, copied.Exit, totalsOf(r.Jobs)
	return r
}

// IsPage reports whether Write writes an HTML page to path.
func IsPage(path string) bool { return strings.EqualFold(filepath.Ext(path), ".html") }

// Write writes the report to path, as an HTML page if path ends in .html, and as JSON
// otherwise. A regular file is replaced as a whole or not at all. Any other file, such as a
// pipe, is written in place.
func (r *Report) Write(path string) error {
	if !IsPage(path) {
		return report.WriteJSON(path, r)
	}
	text, err := r.page()
	if err != nil {
		return fmt.Errorf("report: %w", err)
	}
	return report.WriteText(path, text)
}

// reportFormat says which versions of reports Merge reads.
var reportFormat = fileversion.Format{
	Name: "report", Oldest: 1, Newest: 1,
	Otherwise: "remove the report from the folder to merge the others",
}

// maxReport is the size, in bytes, of the largest report that Merge reads.
const maxReport = 1 << 30

// Merge merges the reports of batches in the folder dir. It reads all files there whose names
// end in .json, and ignores those that are not reports of batches. If several reports have the
// same job, the latest attempt counts. If jobs is not nil, the merged report has exactly these
// jobs, in this order. A job that is in no report then has the status skipped. The notes, which
// are for the user, name the jobs that are in several reports, the jobs that are in no report,
// and the jobs that are in a report but not in jobs.
func Merge(dir string, jobs []*Job) (merged *Report, notes []string, err error) {
	found, notes, err := findReports(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("merge reports: %w", err)
	}
	merged = &Report{Version: 1, Updated: time.Now()}
	byName, times := map[string]*JobReport{}, map[string]int{} // times says how many reports a job has
	var names, twice []string
	for _, r := range found {
		if merged.Started.IsZero() || r.Started.Before(merged.Started) {
			merged.Started = r.Started
		}
		if r.Finished.After(merged.Finished) {
			merged.Finished = r.Finished
		}
		for _, j := range r.Jobs {
			switch times[j.Name]++; times[j.Name] {
			case 1:
				names = append(names, j.Name)
			case 2:
				twice = append(twice, j.Name)
			}
			if have := byName[j.Name]; have == nil || j.better(have) {
				byName[j.Name] = j
			}
		}
	}
	merged.combine(found)
	if len(twice) > 0 {
		notes = append(notes, "these jobs are in several reports; the latest one counts: "+listed(twice))
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
			r = skippedReport(j, "no report has this job: its shard did not run, or has not ended")
		}
		merged.Jobs = append(merged.Jobs, r)
	}
	if len(missing) > 0 {
		notes = append(notes, "these jobs are in no report: "+listed(missing))
	}
	if len(byName) > 0 {
		notes = append(notes, "these jobs are left out because the job file does not have them: "+listed(slices.Sorted(maps.Keys(byName))))
	}
	merged.end(0)
	return merged, notes, nil
}

// findReports reads the reports of batches in the folder dir. The notes, which are for the user,
// name the reports of batches that have not ended. These are returned as if the batches had been
// stopped.
func findReports(dir string) (found []*Report, notes []string, err error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, nil, err
	}
	var bad []error // all unreadable reports, to be reported together
	for _, f := range files {
		if !strings.EqualFold(filepath.Ext(f.Name()), ".json") || strings.HasPrefix(f.Name(), ".") || f.IsDir() {
			continue
		}
		r, err := readReport(filepath.Join(dir, f.Name()))
		if err != nil {
			bad = append(bad, err)
		}
		if r == nil {
			continue
		}
		if r.Status == report.StatusRunning {
			notes = append(notes, fmt.Sprintf("%s is the report of a batch that still ran, or was killed, after %s: the jobs that ran then count as interrupted", f.Name(), r.Updated.Format(time.RFC3339)))
			r.stop()
		}
		found = append(found, r)
	}
	if len(bad) > 0 {
		return nil, nil, errors.Join(bad...)
	}
	if len(found) == 0 {
		return nil, nil, &fs.PathError{Op: "look for *.json", Path: dir, Err: errors.New("the folder contains no report of a batch")}
	}
	return found, notes, nil
}

// The method stop changes the report of a batch that ran when the report was made. The jobs that
// ran become interrupted. Those that waited become failed if an attempt has failed, and skipped
// otherwise, as if the batch had been stopped then.
func (r *Report) stop() {
	for _, j := range r.Jobs {
		switch j.Status {
		case report.StatusRunning:
			j.Status, j.Exit, j.Live = report.StatusInterrupted, exit.Resumable, nil
			j.Error = "the job ran when its report was written"
			j.Hint = "if the batch does not run any more, run it again with --resume"
		case report.StatusPending:
			if j.Attempts > 0 { // an attempt has failed, and the job was to be tried again
				j.Status, j.Exit = report.StatusFailed, exit.Resumable
				continue
			}
			j.Status, j.Exit = report.StatusSkipped, 0
			if j.Error == "" {
				j.Error = "the job had not started when its report was written"
			}
		}
	}
}

// The method combine sets the totals and the curve of a merged report from the reports of batches.
func (r *Report) combine(batches []*Report) {
	for _, b := range batches {
		r.Totals.merge(b.Totals)
	}
	if took := r.Finished.Sub(r.Started).Seconds(); took > 0 {
		r.Totals.Rate = float64(r.Totals.BytesRead) / took
	}
	r.Curve = joinCurves(batches, r.Started, r.Finished)
}

// The method merge adds the sums of other copies. Rates and connections are not added.
func (t *Totals) merge(other Totals) {
	t.BytesRead += other.BytesRead
	t.BytesWritten += other.BytesWritten
	t.BytesZero += other.BytesZero
	t.BytesCloned += other.BytesCloned
	t.Retries += other.Retries
	t.Waits.Add(other.Waits)
}

// totalsOf returns the sums of reports of jobs.
func totalsOf(jobs []*JobReport) (t Totals) {
	for _, j := range jobs {
		t.merge(Totals{
			BytesRead: j.BytesRead, BytesWritten: j.BytesWritten, BytesZero: j.BytesZero, BytesCloned: j.BytesCloned,
			Retries: j.Retries, Waits: j.Waits,
		})
	}
	return t
}

// The function listed returns a text with the first ten names, in quotes, and with the number of
// names that it leaves out.
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

// The method better reports whether Merge takes the report j or the report other. Both are reports
// of the same job. A report of an attempt is better than one that says that the job was skipped. If
// both reports say that, or neither does, the later report is better.
func (j *JobReport) better(other *JobReport) bool {
	if a, b := j.Status == report.StatusSkipped, other.Status == report.StatusSkipped; a != b {
		return b
	}
	return j.Finished.After(other.Finished)
}

// readReport reads the report of a batch. It returns nil if the JSON file is not such a report.
func readReport(path string) (*Report, error) {
	fi, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !fi.Mode().IsRegular() {
		return nil, nil // reading a FIFO could wait forever
	}
	if fi.Size() > maxReport {
		return nil, fmt.Errorf("%s: the report has %d bytes, want at most %d", path, fi.Size(), maxReport)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	// A state file also has a member "jobs", and may be in the same folder as the reports. A report
	// is recognised by its member "counts". The version is checked before the other members,
	// because they may have other types in another version.
	var shape struct {
		Version json.RawMessage `json:"version"`
		Counts  json.RawMessage `json:"counts"`
		Totals  json.RawMessage `json:"totals"`
		Jobs    json.RawMessage `json:"jobs"`
	}
	if err := json.Unmarshal(text, &shape); err != nil {
		if errors.As(err, new(*json.UnmarshalTypeError)) {
			return nil, nil
		}
		return nil, fmt.Errorf("%s: %w; expected the complete report of a batch: run the batch that wrote this report again with --resume, which writes a new report, or remove the file", path, err)
	}
	if shape.Counts == nil || bytes.Equal(shape.Counts, []byte("null")) {
		return nil, nil
	}
	if err := reportFormat.CheckJSON(text); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	r := new(Report)
	if err := json.Unmarshal(text, r); errors.As(err, new(*json.UnmarshalTypeError)) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if err := reportFormat.Check(int64(r.Version)); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for i, j := range r.Jobs {
		if j == nil || j.Report == nil || j.Name == "" {
			return nil, fmt.Errorf("%s: jobs[%d] has no name or no status", path, i)
		}
	}
	if shape.Totals == nil { // an early version of vddkcp wrote the report
		r.Totals = totalsOf(r.Jobs)
	}
	return r, nil
}
