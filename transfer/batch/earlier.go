package batch

import (
	"fmt"
	"slices"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// The method plan decides from the state file which jobs must still be run. It returns these jobs
// as a queue of values of the type attempt.
func (r *run) plan(jobs []*Job) (queue []*attempt, err error) {
	done, known := 0, 0
	entries := make([]*entry, len(jobs))
	for i, j := range jobs {
		if entries[i] = r.o.Store.get(j.Name); entries[i] != nil {
			known++
			if entries[i].Phase == phaseDone {
				done++
			}
		}
	}
	if !r.o.Resume {
		if known > 0 && done < len(jobs) {
			return nil, &UnfinishedError{r.o.Store.path, done, len(jobs)}
		}
		for _, j := range jobs {
			queue = append(queue, newAttempt(j, r.o.Runner(j)))
		}
		return queue, nil
	}
	for i, j := range jobs {
		a := newAttempt(j, r.o.Runner(j))
		a.resume = true
		if e := entries[i]; e != nil {
			a.number, a.redo = e.Attempts, e.Redo || e.Phase == phaseDone || e.Phase == phaseCopied
			if r.wasDone(a, e) {
				e.Report.Attempts, e.Report.Labels, e.Report.Host = e.Attempts, j.Labels(), j.Host
				r.reports[j] = e.Report
				r.monitor.doneBefore(j, e.Report)
				if r.o.Ended != nil {
					r.o.Ended(j, e.Report)
				}
				continue
			}
			a.copied = r.wasCopied(a, e)
		}
		queue = append(queue, a)
	}
	return queue, nil
}

// wasDone reports whether an earlier run has done the job and the job need not run again. It logs
// the reason if the job must run again.
func (r *run) wasDone(a *attempt, e *entry) bool {
	if e.Phase != phaseDone {
		return false
	}
	why := e.changed(a.job, a.runner)
	if why != "" {
		r.o.Log.Warn("the job runs again: "+why, "job", a.job.Name)
	}
	return why == ""
}

// The method changed returns the reason why a job that was done must run again. If the job need not
// run again, it returns "".
func (e *entry) changed(j *Job, r Runner) string {
	switch size := fileSize(j.Target); {
	case e.Fingerprint != j.Fingerprint():
		return "its fields have changed since the job was done"
	case e.Size >= 0 && size < 0:
		return "its target no longer exists"
	case e.Size >= 0 && size != e.Size:
		return fmt.Sprintf("its target has %d bytes, but had %d when the job was done", size, e.Size)
	case e.Report != nil && e.Report.Exit == exit.Left:
		return "something that vddkcp made for it is still on the server"
	case e.Backing != "" && r.Backing() != e.Backing:
		return "the backing of its target has changed since the job was done"
	}
	return ""
}

// Unfinished reads the state file at path and returns the jobs that Run would run with
// Options.Resume. Another run may use the state file at the same time. The function runner returns
// the Runner of a job, as Options.Runner does.
func Unfinished(path string, jobs []*Job, runner func(*Job) Runner) ([]*Job, error) {
	s := &Store{path: path, texts: map[string][]byte{}}
	if err := s.load(); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(jobs), func(j *Job) bool {
		e := s.get(j.Name)
		return e != nil && e.Phase == phaseDone && e.changed(j, runner(j)) == ""
	}), nil
}

// wasCopied returns the report of a complete copy that an earlier run made, although that run
// did not finish the job. If there is no such copy, wasCopied returns nil, and the job must
// copy.
func (r *run) wasCopied(a *attempt, e *entry) *report.Report {
	j := a.job
	if e.Fingerprint != j.Fingerprint() {
		return nil
	}
	if e.Backing != "" && a.runner.Backing() != e.Backing {
		return nil
	}
	switch e.Phase {
	case phaseCopied:
		if size := fileSize(j.Target); size == e.Size {
			return e.Report.Report
		}
	case phaseRunning:
		// The state file has a mark that identifies the file that the earlier run wrote. A file at
		// the target without this mark is not the finished copy: another program may have put it
		// there.
		if e.Mark != "" && fileid.MarkOf(j.Target) == e.Mark {
			t := report.New(j.Source, j.Target)
			t.End(report.StatusOK, 0)
			t.Warnings = append(t.Warnings, "the copy was whole when an earlier run was killed; its counts are lost")
			a.runner.Tidy()
			r.o.Log.Warn("the copy was whole when the earlier run was killed", "job", j.Name)
			return t
		}
	}
	return nil
}
