// Package diskjob runs those jobs of a batch that copy one disk each.
//
// The method [Jobs.Runner] is the value of the option Runner of a batch:
//
//	jobs := &diskjob.Jobs{Spec: specOf, Copy: copy, Display: display, Log: log}
//	r, err := batch.Run(ctx, list, batch.Options{Runner: jobs.Runner, ...})
//
// Package batch decides when a job runs, and calls the methods of its [batch.Runner]. The
// runner asks Jobs.Spec for the options of the copy and passes them to package job.
package diskjob

import (
	"context"
	"log/slog"
	"os"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Jobs has what the jobs of a batch have in common. All fields except Limit are required.
type Jobs struct {
	// Spec returns the options of the copy that a job describes. It is called each time the
	// options are needed, because keeping the options of a million jobs would take a
	// gigabyte. It must be safe for concurrent use.
	Spec func(*batch.Job) job.Spec
	// Copy copies the disk that a job describes, with the options that Spec has returned for the
	// job. It is job.Run, or a function that prepares the source first. It must be safe for
	// concurrent use.
	Copy    func(context.Context, *batch.Job, job.Spec) (*report.Report, error)
	Limit   *transfer.Limiter      // limits the bytes that all jobs together read per second; nil: no limit
	Display *progress.BatchDisplay // shows the jobs that run
	Log     *slog.Logger           // for messages about jobs that do not run
	// Failed is called with the error of each copy that ends with an error. Some of these errors
	// say that the target is nevertheless complete. Failed must be safe for concurrent use.
	Failed func(*batch.Task, error)
	// AlsoTidy is called after job.Tidy, for a job whose copy is complete. It removes files that a
	// killed run left and that job.Tidy does not know. It may be nil.
	AlsoTidy func(*batch.Job, job.Spec)
}

// Runner returns the batch.Runner of a job.
func (s *Jobs) Runner(j *batch.Job) batch.Runner { return runner{s, j} }

// runner is the batch.Runner of a job that copies one disk.
type runner struct {
	*Jobs
	job *batch.Job
}

// Run implements batch.Runner.
func (r runner) Run(ctx context.Context, t *batch.Task) *report.Report {
	log := t.Log
	spec := r.Spec(r.job)
	spec.Resume = spec.Resume || t.Resume && spec.CanResume()
	spec.Limit = spec.Limit.Within(r.Limit)
	spec.KeepOld, spec.Batch, spec.Whole = t.Redo, true, t.Whole
	spec.Log, spec.Counters = log, t.Counters
	t.Way(spec.Way)
	done := r.Display.Start(t.Name, t.Source, spec.Counters)
	log.Debug("begins", "source", t.Source, "target", t.Target, "attempt", t.Attempt, "resume", spec.Resume)
	copied, err := r.Copy(ctx, r.job, spec)
	done()
	if report.Of(err).Done() {
		log.Info("done", "read", bytesize.Format(copied.BytesRead), "written", bytesize.Format(copied.BytesWritten), "seconds", int(copied.Seconds))
	}
	if err != nil {
		r.Failed(t, err)
	}
	return copied
}

// Demand implements batch.Runner.
func (r runner) Demand() batch.Demand { return r.job.Demand() }

// Size implements batch.Runner. The size of a disk on a server is unknown until the
// job runs.
func (r runner) Size() int64 { return Size(r.job) }

// Backing implements batch.Runner.
func (r runner) Backing() string {
	if r.job.Text("backing") == "" {
		return ""
	}
	return job.DescribeBacking(context.Background(), r.Spec(r.job))
}

// Tidy implements batch.Runner.
func (r runner) Tidy() {
	spec := r.Spec(r.job)
	spec.Log = r.Log.With("job", r.job.Name)
	job.Tidy(spec)
	if r.AlsoTidy != nil {
		r.AlsoTidy(r.job, spec)
	}
}

// Size returns the size of a source that is a local file, in bytes, and -1 for
// other sources.
func Size(j *batch.Job) int64 {
	fi, err := os.Stat(j.Source)
	if err != nil || !fi.Mode().IsRegular() {
		return -1
	}
	return fi.Size()
}
