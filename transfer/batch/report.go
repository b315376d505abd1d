package batch

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"vddkcp/transfer"
)

// Exit statuses of a batch, by docs/cli.md.
const (
	exitFailed    = 1
	exitSome      = 4
	exitCanResume = 75
)

// Report is what became of a batch, by docs/cli.md, "run: job files".
type Report struct {
	Version  int             `json:"version"`
	Status   transfer.Status `json:"status"` // ok, failed or interrupted
	Exit     int             `json:"exit"`
	Started  time.Time       `json:"started"`
	Finished time.Time       `json:"finished"`
	Counts   Counts          `json:"counts"`
	Jobs     []*JobReport    `json:"jobs"`
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
	*transfer.Report
}

// end counts the jobs and decides the status. Stopped is the exit status that a
// signal asks for, or 0.
func (r *Report) end(stopped int) {
	r.Counts = Counts{}
	canResume := true
	for _, j := range r.Jobs {
		switch j.Status {
		case transfer.StatusOK:
			r.Counts.Done++
		case transfer.StatusSkipped:
			r.Counts.Skipped++
		case transfer.StatusInterrupted:
			r.Counts.Interrupted++
		default:
			r.Counts.Failed++
			canResume = canResume && j.Exit == exitCanResume
		}
	}
	c := r.Counts
	switch {
	case stopped != 0:
		r.Status, r.Exit = transfer.StatusInterrupted, stopped
	case c.Done == len(r.Jobs):
		r.Status, r.Exit = transfer.StatusOK, 0
	case c.Failed == 0: // of a merge: all the others were stopped
		r.Status, r.Exit = transfer.StatusInterrupted, exitCanResume
	case c.Done > 0:
		r.Status, r.Exit = transfer.StatusFailed, exitSome
	case canResume:
		r.Status, r.Exit = transfer.StatusFailed, exitCanResume
	default:
		r.Status, r.Exit = transfer.StatusFailed, exitFailed
	}
}

// Write writes the report to path, as a page for people where the name ends in
// .html, else as JSON: as a whole or not at all, but into what is no regular
// file as it is.
func (r *Report) Write(path string) error {
	var text []byte
	var err error
	if strings.EqualFold(filepath.Ext(path), ".html") {
		text, err = r.page()
	} else if text, err = json.MarshalIndent(r, "", "  "); err == nil {
		text = append(text, '\n')
	}
	if err == nil {
		if info, statErr := os.Stat(path); statErr == nil && !info.Mode().IsRegular() {
			err = os.WriteFile(path, text, 0o666)
		} else if f, createErr := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*"); createErr != nil {
			err = createErr
		} else if err = f.Chmod(0o644); err == nil {
			err = replaceFile(f, path, text)
		} else {
			err = errors.Join(err, f.Close(), os.Remove(f.Name()))
		}
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
// once, by the report that has it done, else by the latest.
func Merge(dir string) (*Report, error) {
	files, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("merge reports: %w", err)
	}
	merged := &Report{Version: 1}
	byName := map[string]*JobReport{}
	found := 0
	for _, f := range files {
		if !strings.EqualFold(filepath.Ext(f.Name()), ".json") || strings.HasPrefix(f.Name(), ".") || f.IsDir() {
			continue
		}
		r, err := readReport(filepath.Join(dir, f.Name()))
		if err != nil {
			return nil, fmt.Errorf("merge reports: %w", err)
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
				merged.Jobs = append(merged.Jobs, j)
			}
			if !ok || j.better(have) {
				byName[j.Name] = j
			}
		}
	}
	if found == 0 {
		return nil, fmt.Errorf("merge reports: %w", &fs.PathError{Op: "look for *.json", Path: dir, Err: errors.New("no report of a batch")})
	}
	for i, j := range merged.Jobs {
		merged.Jobs[i] = byName[j.Name]
	}
	slices.SortStableFunc(merged.Jobs, func(a, b *JobReport) int { return cmp.Compare(a.Name, b.Name) })
	merged.end(0)
	return merged, nil
}

// better says whether j tells more of a job than other does.
func (j *JobReport) better(other *JobReport) bool {
	if a, b := j.Status == transfer.StatusOK, other.Status == transfer.StatusOK; a != b {
		return a
	}
	if a, b := j.Status == transfer.StatusSkipped, other.Status == transfer.StatusSkipped; a != b {
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
		return nil, fmt.Errorf("%s: %w", path, err)
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
