package batch

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Options say how a batch runs. Limits, Store, Runner and Log are required.
type Options struct {
	Limits          Limits
	ContinueOnError bool // start other jobs after one has failed
	// Resume continues the batch whose state is in Store. Jobs that are done are not run again, and
	// all other jobs continue where they stopped.
	Resume bool
	Store  *Store
	// Runner returns the Runner that does the work of a job. It is called once for each job,
	// before any job starts, so it should be cheap.
	Runner func(*Job) Runner
	Log    *slog.Logger
	// JobLog opens the log of a job. The batch calls the result, the function done, when it no
	// longer uses the log. If JobLog is nil, all jobs use Log.
	JobLog func(*Job) (log *slog.Logger, done func())
	// Spawn is called when the batch must start a before or after command of a job. Spawn must call
	// the function start, which starts the command in a process group of its own, and returns the
	// number of this group. If start fails, Spawn must return the error.
	//
	// Spawn also returns a function gone, which the batch calls when the process group has ended.
	// If the program may exit while a command runs, Spawn can record the process group, so that the
	// program kills it before it exits.
	//
	// If Spawn is nil, the batch itself starts each command.
	Spawn func(start func() (group int, err error)) (gone func(), err error)
	// Ended is called for each job after its last attempt. At the beginning of the batch, it is
	// also called for each job that an earlier run has done. It is not called for jobs that do not
	// start. Calls do not overlap. Ended may be nil.
	Ended func(*Job, *JobReport)
	// Waiting is called when a pause before a round of retries begins. jobs is the number of failed
	// jobs that are tried again after the pause, and wait is the length of the pause. The batch
	// calls the result, the function done, when the pause ends. Waiting may be nil.
	Waiting func(jobs int, wait time.Duration) (done func())
	// Watch is called before the first job starts, unless Run returns an error before. The Monitor
	// says what the batch does at any moment. The batch calls the result, the function done, when
	// the last job has ended. Watch may be nil.
	Watch func(*Monitor) (done func())
}

// Runner does the work of one job: it copies one disk, or all disks of a machine. The batch
// never calls two methods of a Runner at the same time, except Backing, which it may call at
// any time.
type Runner interface {
	// Run makes one attempt at the job. The report is not nil and says how the attempt ended.
	// If the exit status in the report is [exit.Resumable], the job is tried again later.
	Run(ctx context.Context, t *Task) *report.Report
	// Demand returns how much the job counts against the limits. The result never changes.
	Demand() Demand
	// Size returns how many bytes of data the source probably has, or -1 if that is unknown. If
	// the sizes of all jobs are known, the largest job starts first.
	Size() int64
	// Backing returns a text that identifies the backing disk of the target and the content of
	// that disk. If the target is not an overlay, the text is "". If the text has changed since
	// the job was done, the job runs again.
	Backing() string
	// Tidy removes the files that a killed run left next to a complete target.
	Tidy()
}

// Demand says how much a job counts against [Limits] while it runs.
type Demand struct {
	Disks  int    // against Limits.Total; at least 1
	Server string // against Limits.PerServer; "": none
	Host   string // against Limits.PerHost; "": unknown
}

// Task describes one attempt at a job to Runner.Run.
type Task struct {
	*Job
	Log     *slog.Logger
	Attempt int  // from 1
	Resume  bool // an earlier attempt may have left a part of the copy
	// Redo says that the job was done before, but must run again because of a change in its fields
	// or its target. Another program may then already use the file at the target.
	Redo bool
	// Runner.Run must call Whole when the target is complete and durable, before the target gets
	// its final name. The mark identifies the file of the target (see package fileid). It is "" if
	// the target is not a file. Whole records the mark durably. If the process is then killed, the
	// next run takes a file with this mark, and no other file, for the finished copy.
	Whole func(mark string)
	// Counters are what Runner.Run must count the work of the copy with.
	Counters *progress.Counters
	// Runner.Run may call Way with how the disk is read, as soon as this is known.
	Way func(report.Way)
}

// UnfinishedError says that the state file has a batch that is not finished, but that
// Options.Resume is not set.
type UnfinishedError struct {
	path       string
	done, jobs int
}

func (e *UnfinishedError) Error() string {
	return fmt.Sprintf("state file %s belongs to a batch that is not finished: %d of %d jobs are done", e.path, e.done, e.jobs)
}

// Hint says how the user can continue the batch or start over.
func (e *UnfinishedError) Hint() string {
	return "run again with --resume to continue that batch, or remove the state file to start over"
}

// Run runs jobs until all have ended. When ctx ends, it starts no more jobs and waits for the
// running ones. If a job fails, the report says so, and Run returns no error.
//
// Run returns an error only because of the state file. If the state file belongs to an unfinished
// batch and Options.Resume is not set, Run runs no job and returns an *[UnfinishedError] and no
// report. If the state file cannot be written at the end, Run returns the error and the complete
// report.
func Run(ctx context.Context, jobs []*Job, o Options) (*Report, error) {
	o.Limits = o.Limits.WithDefaults()
	r := &run{o: o, reports: make(map[*Job]*JobReport, len(jobs)), servers: map[string]int{}, hosts: map[string]int{}, monitor: newMonitor(jobs)}
	all := &Report{Version: 1, Started: r.monitor.begun}
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
	watched := func() {}
	if o.Watch != nil {
		keeping.Go(func() { r.monitor.keepSampling(done) })
		watched = o.Watch(r.monitor)
	}
	r.schedule(ctx, longestFirst(queue))
	close(done)
	keeping.Wait()
	watched()
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
	r.monitor.complete(all)
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
	return &JobReport{Name: j.Name, Host: j.Host, Labels: j.Labels(), Report: t}
}

// run is a batch that is running. Only the goroutine that calls schedule uses its fields. The
// field o is an exception: the options do not change, and all goroutines may read them.
type run struct {
	o              Options
	reports        map[*Job]*JobReport // of jobs that have ended
	disks          int                 // number of disks that are copied now
	servers, hosts map[string]int      // number of disks that are copied now, by name
	monitor        *Monitor            // safe for concurrent use
}

// attempt is a job that is running, or that waits to be run or tried again.
type attempt struct {
	job    *Job
	runner Runner
	demand Demand // of runner; the scheduler compares it with the limits very often
	number int    // of earlier attempts
	resume bool
	redo   bool           // the job was done before
	copied *report.Report // of a copy that is whole; only the after command is missing
	live   *live          // while the attempt runs
}

func newAttempt(j *Job, r Runner) *attempt { return &attempt{job: j, runner: r, demand: r.Demand()} }

// longestFirst sorts jobs by size, the largest first, if all sizes are known. In another order
// a long copy could start last, and run alone at the end.
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
