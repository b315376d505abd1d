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

// Options say how a batch runs.
type Options struct {
	Limits          Limits
	ContinueOnError bool
	// Resume goes on with what the store says: jobs that are done are not run,
	// and all others go on where they stopped.
	Resume bool
	Store  *Store
	// Runner returns the work of a job. It is called once for each job, before any
	// job starts, so it should be cheap.
	Runner func(*Job) Runner
	Log    *slog.Logger
	// JobLog is the log of a job, until done is called; nil: Log.
	JobLog func(*Job) (log *slog.Logger, done func())
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
	// of, with its content; "": the target is no overlay. If the text changes, a job
	// that was done runs again.
	Backing() string
	// Tidy removes what a run that was killed left beside a target which is whole.
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
	Resume  bool // an earlier attempt may have left something to go on with
	// Redo says that the copy was whole once, and fields or target changed: what is
	// at the target now may be in use, or have been written to.
	Redo bool
	// Whole is called by Runner.Run when the target is whole and durable, before
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

// run is a batch under way. Its fields belong to the goroutine of schedule.
type run struct {
	o              Options
	reports        map[*Job]*JobReport // of jobs that have ended
	disks          int                 // at once
	servers, hosts map[string]int      // disks at once, of each
}

// attempt is a job that is to run.
type attempt struct {
	job    *Job
	runner Runner
	number int // of attempts before
	resume bool
	redo   bool           // it was done before
	copied *report.Report // only the after command is missing
}

// longestFirst sorts, where all sizes are known, so that the batch does not end
// with one long copy alone.
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
