package batch

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/transfer/report"
)

// Options say how a batch runs. Limits, Store, Runner and Log are required.
type Options struct {
	Limits          Limits
	ContinueOnError bool // start other jobs after one has failed
	// Resume continues the batch that Store describes: jobs that are done are not run
	// again, and all others continue where they stopped.
	Resume bool
	Store  *Store
	// Runner returns the work of a job. It is called once for each job, before any
	// job starts, so it should be cheap.
	Runner func(*Job) Runner
	Log    *slog.Logger
	// JobLog returns the log of a job, which is used until done is called. If JobLog is
	// nil, all jobs use Log.
	JobLog func(*Job) (log *slog.Logger, done func())
	// Spawn calls start, which starts a command of a job in a process group of its own.
	// gone is called when the group has ended. A program that may exit at once uses
	// Spawn to kill the groups that are left. It may be nil.
	Spawn func(start func() (group int, err error)) (gone func(), err error)
	// Ended is called for each job when it is over, and for each job that an earlier run
	// has done. Calls do not overlap. It may be nil.
	Ended func(*Job, *JobReport)
	// Waiting is called before the pause after which the given number of jobs is tried
	// again. done is called after the pause. It may be nil.
	Waiting func(jobs int, wait time.Duration) (done func())
}

// Runner is the work of one job: it copies a disk, and may copy a whole machine. Its
// methods are called for one attempt at a time, except Backing, which is called at
// any time.
type Runner interface {
	// Run makes one attempt. The report is not nil and says how the attempt ended:
	// with [exit.Resumable] the job is tried again later.
	Run(ctx context.Context, t *Task) *report.Report
	// Demand returns what the job counts against the limits. It is always the same.
	Demand() Demand
	// Size returns how many bytes the source probably holds; -1: unknown. If all
	// sizes are known, the largest job starts first.
	Size() int64
	// Backing returns a text that identifies the disk that the target is an overlay
	// of, and the content of that disk. It is "" if the target is no overlay. If the text
	// changes, a job that was done runs again.
	Backing() string
	// Tidy removes the files that a killed run left next to a target which is whole.
	Tidy()
}

// Demand is what a job counts against [Limits] while it runs.
type Demand struct {
	Disks  int    // against Limits.Total; at least 1
	Server string // against Limits.PerServer; "": none
	Host   string // against Limits.PerHost; "": unknown
}

// Task is an attempt at a job.
type Task struct {
	*Job
	Log     *slog.Logger
	Attempt int  // from 1
	Resume  bool // an earlier attempt may have left a part of the copy
	// Redo says that the job was done before, and that its fields or its target have
	// changed since. The file at the target may be in use.
	Redo bool
	// Whole is called by Runner.Run when the target is whole and durable, before
	// it gets its final name. The mark identifies the file by package fileid; it is "" if the
	// target is no file. Whole records the mark durably: if the process is killed, the next
	// run takes a file with that mark, and no other file, for the finished copy.
	Whole func(mark string)
}

// UnfinishedError reports that the state file describes a batch that is not finished,
// while Options.Resume is not set.
type UnfinishedError struct {
	path       string
	done, jobs int
}

func (e *UnfinishedError) Error() string {
	return fmt.Sprintf("state file %s belongs to a batch that is not finished: %d of %d jobs are done", e.path, e.done, e.jobs)
}

// Hint returns what the user can do.
func (e *UnfinishedError) Hint() string {
	return "--resume continues it; remove the file to start over"
}

// Run runs jobs until all have ended. After the end of ctx it starts no more jobs and
// waits for those that run. A job that failed is not an error of Run: the report says
// so. Errors concern the state file: an *[UnfinishedError] with a nil report before
// anything ran, or a failure to write the file, together with the report.
func Run(ctx context.Context, jobs []*Job, o Options) (*Report, error) {
	o.Limits = o.Limits.WithDefaults()
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
			o.Log.Warn("the state file cannot be written; changes are kept in a second file next to it", "error", err)
		})
	})
	r.schedule(ctx, longestFirst(queue))
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
		stopped = report.Of(context.Cause(ctx)).Exit
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

// run is a batch that runs. Only the goroutine of schedule uses its fields.
type run struct {
	o              Options
	reports        map[*Job]*JobReport // of jobs that have ended
	disks          int                 // number of disks that are copied now
	servers, hosts map[string]int      // number of disks that are copied now, by name
}

// attempt is a job that waits for its next attempt, or runs.
type attempt struct {
	job    *Job
	runner Runner
	demand Demand // of runner; the scheduler compares it with the limits very often
	number int    // of earlier attempts
	resume bool
	redo   bool           // the job was done before
	copied *report.Report // of a copy that is whole; only the after command is missing
}

func newAttempt(j *Job, r Runner) *attempt { return &attempt{job: j, runner: r, demand: r.Demand()} }

// longestFirst sorts jobs by size, the largest first, if all sizes are known. Otherwise
// a batch could end with one long copy that runs alone.
func longestFirst(queue []*attempt) []*attempt {
	sizes := make(map[*attempt]int64, len(queue))
	for _, a := range queue {
		n := int64(0)
		if a.copied == nil {
			if n = a.runner.Size(); n < 0 {
				return queue
			}
		}
		sizes[a] = n
	}
	slices.SortStableFunc(queue, func(a, b *attempt) int { return cmp.Compare(sizes[b], sizes[a]) })
	return queue
}
