package batch

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// nowSuffix is the end of the name of a file next to the state file. While a batch runs, the file
// has the report that Monitor.Now returns. Other processes read it to show what runs.
const nowSuffix = ".now"

// NowPath returns the path of the file that says what runs now. state is the path of the state
// file.
func NowPath(state string) string { return state + nowSuffix }

// WriteNow replaces the file that says what runs now. After a power failure nothing runs, so the
// file need not be durable, and writing it every few seconds costs little.
func (s *Store) WriteNow(r *Report) error {
	text, err := json.Marshal(r)
	if err != nil {
		return err
	}
	path := NowPath(s.path)
	f, err := durable.Open(path+".new", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, durable.Private)
	if err != nil {
		return err
	}
	_, err = f.Write(printable.Bytes(text))
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), path)
	}
	return err
}

// RemoveNow removes the file that WriteNow writes, because the batch has ended.
func (s *Store) RemoveNow() error {
	if err := os.Remove(NowPath(s.path)); !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// State is what the state file of a batch and the files next to it say. Its JSON is the output of
// vddkcp run --status --json.
type State struct {
	Version   int          `json:"version"`
	StateFile string       `json:"state_file"`
	Running   durable.Held `json:"running"` // yes, no or unknown
	PID       int          `json:"pid"`     // of the process that runs the batch, or ran it and was killed
	Host      string       `json:"host"`    // that the process runs on
	Started   *time.Time   `json:"started"` // nil: not known
	Updated   *time.Time   `json:"updated"` // when the numbers of the running jobs were written; nil: there are none
	Counts    Counts       `json:"counts"`
	Totals    *Totals      `json:"totals"` // nil: the batch does not run
	Jobs      []*JobReport `json:"jobs"`   // that run, or ran when the batch was killed
	Failed    []*JobReport `json:"failed"` // with the error of the last attempt

	known map[string]bool // the jobs that the state file has
}

// ReadState reads the state of a batch. It locks nothing and writes nothing, so it does not disturb
// a run. The path is that of the state file. The state file need not exist yet if a run has just
// begun.
func ReadState(path string) (*State, error) {
	holder, err := durable.LockHolder(path + lockSuffix)
	if err != nil {
		return nil, fmt.Errorf("state file %s: %w", path, err)
	}
	s := &State{Version: 1, StateFile: path, Running: holder.Held, PID: holder.PID, Host: holder.Host, Jobs: []*JobReport{}, Failed: []*JobReport{}, known: map[string]bool{}}
	now, err := readNow(NowPath(path))
	if err != nil {
		return nil, err
	}
	store := &Store{path: path, texts: map[string][]byte{}}
	if err := store.load(); err != nil {
		return nil, err
	}
	if !store.there.Load() && now == nil && holder.Held == durable.HeldNo {
		return nil, &fs.PathError{Op: "open", Path: path, Err: unix.ENOENT}
	}
	for _, name := range store.order {
		s.add(store.get(name))
	}
	if now == nil {
		return s, nil
	}
	// If the process has just locked the state file, the file that says what runs may be of a run
	// before it that was killed.
	if now.Started.Before(holder.Since) {
		return s, nil
	}
	s.Started, s.Updated, s.Jobs = &now.Started, &now.Updated, now.Jobs
	if s.Running != durable.HeldNo {
		s.Counts, s.Totals = now.Counts, &now.Totals
		return s, nil
	}
	// The batch was killed. The state file says how jobs ended after the last update.
	all := now.Counts.sum()
	s.Counts.Pending = max(all-s.Counts.sum(), 0)
	for _, j := range s.Jobs {
		if j.Live != nil {
			j.Live = &Live{Phase: j.Live.Phase, BytesDone: j.Live.BytesDone}
		}
	}
	return s, nil
}

// lockSuffix is the end of the name of the file that a Store locks.
const lockSuffix = ".lock"

// The method add counts a job of the state file.
func (s *State) add(e *entry) {
	s.known[e.Name] = true
	switch e.Phase {
	case phaseDone:
		s.Counts.Done++
	case phaseInterrupted:
		s.Counts.Interrupted++
	case phaseRunning:
		if s.Running == durable.HeldNo {
			s.Counts.Interrupted++ // by a kill
		} else {
			s.Counts.Running++
		}
	case phaseCopied:
		if s.Running != durable.HeldNo {
			s.Counts.Running++
			return
		}
		s.Counts.Failed++
		failed := *e.Report
		failed.Report = afterFailed(e.Report.Report, errors.New("the copy is complete, but the after command has not succeeded"))
		s.Failed = append(s.Failed, &failed)
	case phaseFailed:
		s.Counts.Failed++
		if e.Report != nil && e.Report.Report != nil {
			s.Failed = append(s.Failed, e.Report)
		}
	}
}

// Expect tells s the jobs of the batch, so that it counts those that the state file does not have
// as pending. It changes nothing if the batch runs, because then the number is known.
func (s *State) Expect(jobs []*Job) {
	if s.Updated != nil {
		return
	}
	for _, j := range jobs {
		if !s.known[j.Name] {
			s.Counts.Pending++
		}
	}
}

// The method sum returns the number of all jobs.
func (c *Counts) sum() int {
	return c.Done + c.Failed + c.Skipped + c.Interrupted + c.Running + c.Pending
}

// readNow reads the file that WriteNow writes. The result is nil if there is no such file, or if it
// is incomplete: after a power failure it can be, because WriteNow does not make it durable.
func readNow(path string) (*Report, error) {
	text, err := durable.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if !json.Valid(text) {
		return nil, nil
	}
	r := new(Report)
	if err := json.Unmarshal(text, r); err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	for i, j := range r.Jobs {
		if j == nil || j.Report == nil || j.Status != report.StatusRunning {
			return nil, fmt.Errorf("%s: jobs[%d] is no job that runs", path, i)
		}
	}
	return r, nil
}

// IsState reports whether the file at path is the state file of a batch and not a job file. A state
// file that does not exist yet is recognised by the lock file of the run that will write it. The
// error says that the file cannot be read. IsState does not read a large file that is no JSON.
func IsState(path string) (bool, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK|unix.O_NOCTTY, 0)
	if errors.Is(err, fs.ErrNotExist) {
		_, locked := os.Stat(path + lockSuffix)
		return locked == nil, nil
	}
	if err != nil {
		return false, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	if !info.Mode().IsRegular() {
		return false, &fs.PathError{Op: "read", Path: path, Err: errors.New("want a regular file")}
	}
	var file struct {
		Jobs []struct {
			Phase phase `json:"phase"`
		} `json:"jobs"`
	}
	if err := json.NewDecoder(f).Decode(&file); err != nil {
		return false, nil
	}
	return len(file.Jobs) == 0 || file.Jobs[0].Phase != "", nil
}
