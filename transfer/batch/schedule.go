package batch

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Options say how a batch runs.
type Options struct {
	Limits          Limits
	ContinueOnError bool
	// Resume goes on with what the store says: jobs that are done are not run,
	// and all others go on where they stopped.
	Resume bool
	Store  *Store
	// Copy runs one copy. The report it returns is not nil, and says with what
	// exit status the copy ended.
	Copy func(ctx context.Context, t *Task) *report.Report
	// Size is how much a source is thought to hold, in bytes; -1: not known.
	Size func(*Job) int64
	Log  *slog.Logger
	// JobLog is the log of a job, until done is called; nil: Log.
	JobLog func(*Job) (log *slog.Logger, done func())
	// Tidy removes what a copy leaves beside its target when it is killed after
	// that was whole; nil: nothing.
	Tidy func(*Job)
	// Backing tells the disk that the target of a job is an overlay of from any
	// other, also from itself with another content: "" where the target is none.
	// It is called concurrently; nil: no target is an overlay.
	Backing func(*Job) string
	// Spawn calls start, which starts a command of a job as a process group of its
	// own, and returns what is to be called when that has ended: for whoever ends
	// the program at once, and must not leave commands behind; nil: nobody.
	Spawn func(start func() (group int, err error)) (gone func(), err error)
	// Ended is told of each job when it is over, and of those that were done
	// before; nil: nobody.
	Ended func(*Job, *JobReport)
	// Waiting is called before a wait of some time, after which so many jobs are
	// tried again, and returns what is called after it; nil: nothing.
	Waiting func(jobs int, wait time.Duration) (done func())
	// Stopped is the exit status that the end of the context stands for.
	Stopped func(cause error) int
}

// Task is an attempt at a job.
type Task struct {
	*Job
	Log     *slog.Logger
	Attempt int  // from 1
	Resume  bool // an earlier attempt may have left something to go on with
	// Redo says that the copy was whole once, and fields or target changed: what is
	// at the target now may be in use, or have been written to.
	Redo bool
	// Whole is called by Options.Copy when the target is whole and durable, before
	// it gets its final name, with the mark of its file by package fileid ("" where
	// it is no file). When it returns, this is noted: after a kill the file of that
	// mark, and no other one, is taken for the finished copy.
	Whole func(mark string)
}

// UnfinishedError is a state file of a batch that did not end, and nobody said
// that it is to go on.
type UnfinishedError struct {
	path       string
	done, jobs int
}

func (e *UnfinishedError) Error() string {
	return fmt.Sprintf("state file %s is of a batch that is not finished: %d of %d jobs are done", e.path, e.done, e.jobs)
}

// Hint says what can be done.
func (e *UnfinishedError) Hint() string {
	return "--resume goes on with it; remove the file to start anew"
}

// Run runs jobs until all have ended, or those that run have after ctx ended.
// A failure of jobs is no error, but in the report. The error is of the state
// file: an *UnfinishedError before anything ran, or one in writing it, beside the
// report.
func Run(ctx context.Context, jobs []*Job, o Options) (*Report, error) {
	o.Limits = o.Limits.WithDefaults()
	o.Backing = orNoBacking(o.Backing)
	r := &run{o: o, reports: make(map[*Job]*JobReport, len(jobs)), servers: map[string]int{}, hosts: map[string]int{}}
	all := &Report{Version: 1, Started: time.Now()}
	queue, err := r.plan(jobs)
	if err != nil {
		return nil, err
	}
	done := make(chan struct{})
	var keeping sync.WaitGroup
	keeping.Go(func() {
		o.Store.keepWritten(done, func(err error) {
			o.Log.Warn("the state is not written; what changed is kept beside it", "error", err)
		})
	})
	r.schedule(ctx, longestFirst(queue, o.Size))
	close(done)
	keeping.Wait()
	for _, j := range jobs {
		result := r.reports[j]
		if result == nil {
			why := "not started: a job failed, and continue_on_error is false"
			if ctx.Err() != nil {
				why = fmt.Sprintf("not started: %v", context.Cause(ctx))
			}
			result = skippedReport(j, why)
		}
		all.Jobs = append(all.Jobs, result)
	}
	stopped := 0
	if ctx.Err() != nil {
		stopped = o.Stopped(context.Cause(ctx))
	}
	all.Finished = time.Now()
	all.end(stopped)
	err = o.Store.flush()
	noting, writing := o.Store.cost()
	o.Log.Debug("state file", "noting", noting, "writing", writing, "of", all.Finished.Sub(all.Started))
	return all, err
}

func skippedReport(j *Job, why string) *JobReport {
	t := report.New(j.Source, j.Target)
	t.End(report.StatusSkipped, 0)
	t.Error = why
	return &JobReport{Name: j.Name, Labels: j.Labels(), Report: t}
}

// run is a batch under way. Its fields belong to the goroutine of schedule.
type run struct {
	o              Options
	reports        map[*Job]*JobReport // of jobs that have ended
	servers, hosts map[string]int      // disks at once
}

// plan returns what is to be done, by the state file.
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
			queue = append(queue, &attempt{job: j})
		}
		return queue, nil
	}
	for i, j := range jobs {
		a := &attempt{job: j, resume: true}
		if e := entries[i]; e != nil {
			a.number, a.redo = e.Attempts, e.Redo || e.Phase == phaseDone || e.Phase == phaseCopied
			if r.wasDone(j, e) {
				e.Report.Attempts, e.Report.Labels = e.Attempts, j.Labels()
				r.reports[j] = e.Report
				if r.o.Ended != nil {
					r.o.Ended(j, e.Report)
				}
				continue
			}
			a.copied = r.wasCopied(j, e)
		}
		queue = append(queue, a)
	}
	return queue, nil
}

// wasDone says whether a job needs nothing more.
func (r *run) wasDone(j *Job, e *entry) bool {
	if e.Phase != phaseDone {
		return false
	}
	why := e.changed(j, r.o.Backing)
	if why != "" {
		r.o.Log.Warn("the job runs again: "+why, "job", j.Name)
	}
	return why == ""
}

// changed says why a job that was done is no longer; "" where it still is.
func (e *entry) changed(j *Job, backing func(*Job) string) string {
	switch size := fileSize(j.Target); {
	case e.Fingerprint != j.Fingerprint():
		return "its fields changed since it was done"
	case e.Size >= 0 && size < 0:
		return "its target is gone"
	case e.Size >= 0 && size != e.Size:
		return fmt.Sprintf("its target has %d bytes and had %d when it was done", size, e.Size)
	case e.Backing != "" && backing(j) != e.Backing:
		return "the backing of its target changed since it was done"
	}
	return ""
}

func orNoBacking(backing func(*Job) string) func(*Job) string {
	if backing == nil {
		return func(*Job) string { return "" }
	}
	return backing
}

// Unfinished returns those jobs that Run would run with Options.Resume and the
// state file at path, which another run may have. Backing is that of Options.
func Unfinished(path string, jobs []*Job, backing func(*Job) string) ([]*Job, error) {
	s := &Store{path: path, texts: map[string][]byte{}}
	if err := s.load(); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(jobs), func(j *Job) bool {
		e := s.get(j.Name)
		return e != nil && e.Phase == phaseDone && e.changed(j, orNoBacking(backing)) == ""
	}), nil
}

// wasCopied returns the report of a copy that is whole, though its job did not
// come to its end; else nil.
func (r *run) wasCopied(j *Job, e *entry) *report.Report {
	if e.Fingerprint != j.Fingerprint() {
		return nil
	}
	if e.Backing != "" && r.o.Backing(j) != e.Backing {
		return nil
	}
	switch e.Phase {
	case phaseCopied:
		if size := fileSize(j.Target); size == e.Size {
			return e.Report.Report
		}
	case phaseRunning:
		// Only the file that the copy itself has noted counts. One that is there,
		// or was changed since, may be anybody's.
		if e.Mark != "" && fileid.MarkOf(j.Target) == e.Mark {
			t := report.New(j.Source, j.Target)
			t.End(report.StatusOK, 0)
			t.Warnings = append(t.Warnings, "the copy was whole when an earlier run was killed; what it counted is lost")
			if r.o.Tidy != nil {
				r.o.Tidy(j)
			}
			r.o.Log.Warn("the copy was whole when the earlier run was killed", "job", j.Name)
			return t
		}
	}
	return nil
}

// attempt is a job that is to run.
type attempt struct {
	job    *Job
	number int // of attempts before
	resume bool
	redo   bool           // it was done before
	copied *report.Report // only the after command is missing
}

// longestFirst sorts, where all sizes are known, so that the batch does not end
// with one long copy alone.
func longestFirst(queue []*attempt, size func(*Job) int64) []*attempt {
	sizes := make(map[*attempt]int64, len(queue))
	for _, a := range queue {
		n := int64(0)
		if a.copied == nil {
			if n = size(a.job); n < 0 {
				return queue
			}
		}
		sizes[a] = n
	}
	slices.SortStableFunc(queue, func(a, b *attempt) int { return cmp.Compare(sizes[b], sizes[a]) })
	return queue
}

// schedule runs all of queue, as the limits allow.
func (r *run) schedule(ctx context.Context, queue []*attempt) {
	type end struct {
		a      *attempt
		report *JobReport
	}
	ends := make(chan end)
	running, stop := 0, false
	var again []*attempt
	for round := 0; ; {
		for ctx.Err() == nil && !stop && running < r.o.Limits.Total {
			i := slices.IndexFunc(queue, func(a *attempt) bool { return r.fits(a.job) })
			if i < 0 {
				break
			}
			a := queue[i]
			queue = slices.Delete(queue, i, i+1)
			running++
			r.occupy(a.job, 1)
			go func() { ends <- end{a, r.work(ctx, a)} }()
		}
		if running == 0 {
			if len(again) == 0 || stop || ctx.Err() != nil {
				for _, a := range again {
					r.ended(a.job)
				}
				return
			}
			round++
			if r.pause(ctx, len(again), round) {
				queue, again = again, nil
				r.o.Log.Info("trying again what may pass now", "jobs", len(queue), "round", round)
			}
			continue
		}
		e := <-ends
		running--
		r.occupy(e.a.job, -1)
		r.reports[e.a.job] = e.report
		failed := e.report.Status == report.StatusFailed || e.report.Status == report.StatusMismatch
		if failed && e.report.Exit == exit.Resumable && round < r.o.Limits.Rounds && ctx.Err() == nil {
			again = append(again, &attempt{job: e.a.job, number: e.report.Attempts, resume: true, redo: e.a.redo})
			continue
		}
		if failed && !r.o.ContinueOnError {
			stop = true
		}
		r.ended(e.a.job)
	}
}

// ended tells of a job that is over.
func (r *run) ended(j *Job) {
	if r.o.Ended != nil {
		r.o.Ended(j, r.reports[j])
	}
}

// Before a round there is a wait, so that what keeps jobs from running has time to
// pass: firstPause, three times as long before each further one, longestPause at
// most.
const (
	firstPause   = 3 * time.Second
	longestPause = time.Minute
)

// pause waits before a round, from 1, of so many jobs. It says false where ctx
// ends the wait.
func (r *run) pause(ctx context.Context, jobs, round int) bool {
	wait := firstPause
	for range round - 1 {
		wait = min(3*wait, longestPause)
	}
	r.o.Log.Info("waiting before trying again what may pass", "jobs", jobs, "round", round, "wait", wait)
	if r.o.Waiting != nil {
		defer r.o.Waiting(jobs, wait)()
	}
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// fits says whether the limits let a job start now.
func (r *run) fits(j *Job) bool {
	l := r.o.Limits
	if s := j.Server(); s != "" && l.PerServer > 0 && r.servers[s] >= l.PerServer {
		return false
	}
	return j.Host == "" || l.PerHost == 0 || r.hosts[j.Host] < l.PerHost
}

func (r *run) occupy(j *Job, n int) {
	r.servers[j.Server()] += n
	r.hosts[j.Host] += n
}

// work runs an attempt, with its commands, and keeps the state file. It is the
// one method that runs beside schedule, and touches nothing of its.
func (r *run) work(ctx context.Context, a *attempt) *JobReport {
	j, log := a.job, r.o.Log.With("job", a.job.Name)
	if r.o.JobLog != nil {
		var done func()
		log, done = r.o.JobLog(j)
		defer done()
	}
	e := &entry{Name: j.Name, Phase: phaseRunning, Fingerprint: j.Fingerprint(), Attempts: a.number + 1, Size: -1, Redo: a.redo}
	keep := func(p phase) {
		e.Phase = p
		if err := r.o.Store.put(e); err != nil {
			log.Warn("the state is not written: after a kill the job may run again", "error", err)
		}
	}
	ended := &JobReport{Name: j.Name, Labels: j.Labels(), Attempts: a.number + 1, Report: a.copied}
	if a.copied == nil {
		keep(phaseRunning)
		ended.Report = r.copy(ctx, a, log, func(mark string) {
			e.Mark, e.Backing = mark, r.o.Backing(j)
			if err := r.o.Store.putDurably(e); err != nil {
				log.Warn("the state is not written: after a kill the finished copy is not recognised", "error", err)
			}
		})
	} else {
		ended.Attempts = max(a.number, 1)
		e.Attempts = ended.Attempts
	}
	e.Report = ended
	ok := ended.Status == report.StatusOK
	if ok {
		e.Size = fileSize(j.Target)
		e.Backing = cmp.Or(e.Backing, r.o.Backing(j))
	}
	if len(j.After) > 0 {
		if ok {
			keep(phaseCopied)
		}
		// It runs whatever came, a signal included.
		err := r.hook(context.WithoutCancel(ctx), "after", j.After, j, ended, log)
		if err != nil {
			log.Error(err.Error())
			ended.Report = afterFailed(ended.Report, err)
			if ok {
				// The copy stays: only the command runs again.
				copied := *ended
				copied.Report = afterSucceeded(ended.Report)
				e.Report = &copied
				keep(phaseCopied)
				return ended
			}
		} else if ok {
			e.Size = fileSize(j.Target) // it may have moved it away
		}
	}
	switch ended.Status {
	case report.StatusOK:
		e.Redo = false
		keep(phaseDone)
	case report.StatusInterrupted:
		keep(phaseInterrupted)
	default:
		keep(phaseFailed)
	}
	return ended
}

// copy runs the before command and the copy.
func (r *run) copy(ctx context.Context, a *attempt, log *slog.Logger, whole func(string)) *report.Report {
	if len(a.job.Before) > 0 {
		if err := r.hook(ctx, "before", a.job.Before, a.job, nil, log); err != nil {
			t := report.New(a.job.Source, a.job.Target)
			t.End(report.StatusFailed, exit.Failed)
			if ctx.Err() != nil {
				t.End(report.StatusInterrupted, r.o.Stopped(context.Cause(ctx)))
			}
			t.Error = err.Error()
			log.Error(t.Error)
			return t
		}
	}
	return r.o.Copy(ctx, &Task{Job: a.job, Log: log, Attempt: a.number + 1, Resume: a.resume, Redo: a.redo, Whole: whole})
}

// afterFailed is the report of a copy whose after command failed.
func afterFailed(t *report.Report, err error) *report.Report {
	failed := *t
	if failed.Status != report.StatusOK {
		failed.Warnings = append(slices.Clone(failed.Warnings), err.Error())
		return &failed
	}
	failed.Status, failed.Exit, failed.Error = report.StatusFailed, exit.Failed, err.Error()
	failed.Hint = "the copy is whole; --resume runs only the command again"
	return &failed
}

// afterSucceeded is afterFailed undone.
func afterSucceeded(t *report.Report) *report.Report {
	ok := *t
	ok.Status, ok.Exit, ok.Error, ok.Hint = report.StatusOK, 0, "", ""
	return &ok
}

// LogName is the name of a job's log file: the job's name, in which a slash, a
// percent sign, control characters and a dot at the beginning are %XX, and which
// is cut, with its shard of 2^32 in hexadecimal behind it, where it is long.
func LogName(job string) string {
	var b strings.Builder
	for i := range len(job) {
		c := job[i]
		if c == '/' || c == '%' || c < ' ' || c == 0x7f || c == '.' && i == 0 {
			fmt.Fprintf(&b, "%%%02X", c)
		} else {
			b.WriteByte(c)
		}
	}
	name := b.String()
	if len(name) > 200 {
		name = strings.ToValidUTF8(name[:190], "") + fmt.Sprintf("-%08x", Shard(job, 1<<32))
	}
	return name + ".log"
}
