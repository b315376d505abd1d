package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vddk"
)

// diskRunner is the batch.Runner of a job that copies one disk. Each method that needs
// the flags of the job parses them again, because keeping the flags of a million jobs
// would take a gigabyte.
type diskRunner struct {
	b   *batchRun
	job *batch.Job
}

func (b *batchRun) runner(j *batch.Job) batch.Runner { return diskRunner{b, j} }

// Run implements batch.Runner.
func (r diskRunner) Run(ctx context.Context, t *batch.Task) *report.Report {
	b, log := r.b, t.Log
	spec := b.spec(r.job)
	spec.Resume = spec.Resume || t.Resume && spec.CanResume()
	spec.Limit = spec.Limit.Within(b.limit)
	spec.KeepOld, spec.Batch, spec.Whole = t.Redo, true, t.Whole
	spec.Log, spec.Counters = log, new(progress.Counters)
	outputs := b.outputs.withFile("--log-dir", b.logPath(r.job))
	spec.Opened = func() error { return outputs.checkOpened(spec.Opener, spec.BackingOpener) }
	done := b.display.Start(t.Name, t.Source, spec.Counters)
	log.Debug("begins", "source", t.Source, "target", t.Target, "attempt", t.Attempt, "resume", spec.Resume)
	copied, err := job.Run(ctx, spec)
	done()
	b.refuseReport(err)
	end := report.Of(err)
	if end.Done() {
		log.Info("done", "read", bytesize.Format(copied.BytesRead), "written", bytesize.Format(copied.BytesWritten), "seconds", int(copied.Seconds))
	} else if b.LogDir != "" {
		log.Debug("failed", "error", err, "hint", end.Hint, "exit", end.Exit)
	}
	if err != nil {
		failJob(b.display, b.asJSON, t.Name, err)
	}
	return copied
}

// Demand implements batch.Runner.
func (r diskRunner) Demand() batch.Demand { return r.job.Demand() }

// Size implements batch.Runner. The size of a disk on a server is unknown until the
// job runs.
func (r diskRunner) Size() int64 { return sizeOf(r.job) }

// Backing implements batch.Runner.
func (r diskRunner) Backing() string {
	if r.job.Text("backing") == "" {
		return ""
	}
	return job.DescribeBacking(context.Background(), r.b.spec(r.job))
}

// Tidy implements batch.Runner.
func (r diskRunner) Tidy() {
	spec := r.b.spec(r.job)
	spec.Log = r.b.log.With("job", r.job.Name)
	job.Tidy(spec)
}

// sizeOf returns the size of a source that is a local file, in bytes, and -1 for
// other sources.
func sizeOf(j *batch.Job) int64 {
	fi, err := os.Stat(j.Source)
	if err != nil || !fi.Mode().IsRegular() {
		return -1
	}
	return fi.Size()
}

// spec returns the options of the copy of a job, with the limits that it shares with the
// other jobs.
func (b *batchRun) spec(j *batch.Job) job.Spec {
	s := b.command(j).spec()
	o := &s.Opener.VDDK.Options
	o.Budget, o.Registry = b.budget(j), b.registry
	return s
}

// command returns the flags of the copy that a job describes. The caller may change the
// returned copyCommand.
func (b *batchRun) command(j *batch.Job) *copyCommand {
	c, err := b.parser.command(j)
	if err != nil {
		panic(err) // loading has checked it
	}
	return c
}

// budget returns the memory and the connections that the job shares with all jobs of its
// host, or nil for a source on this machine.
func (b *batchRun) budget(j *batch.Job) *vddk.Budget {
	key := j.HostKey()
	if key == "" {
		return nil
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.budgets[key] == nil {
		limits := b.file.Limits
		b.budgets[key] = vddk.NewHostBudget(limits.NFCBuffer, limits.Connections)
	}
	return b.budgets[key]
}

// refuseReport records the output that err names if err is an *outputError: this output
// is a file of a source, so that the report must not be written to it.
func (b *batchRun) refuseReport(err error) {
	var refused *outputError
	if !errors.As(err, &refused) {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refused[refused.path] = true
}

// jobLog returns the log of a job. With --log-dir it also writes to a file, which done
// closes.
func (b *batchRun) jobLog(j *batch.Job) (log *slog.Logger, done func()) {
	log, done = b.log.With("job", j.Name), func() {}
	if b.LogDir == "" {
		return log, done
	}
	file, err := durable.OpenOutput(b.logPath(j), os.O_APPEND|os.O_CREATE|os.O_WRONLY)
	if err != nil {
		log.Warn("the log file of the job cannot be opened", "error", err)
		return log, done
	}
	all := slog.NewTextHandler(printable.NewWriter(file), &slog.HandlerOptions{Level: slog.LevelDebug})
	return slog.New(slog.NewMultiHandler(log.Handler(), all)), func() { file.Close() }
}

// accesses records which jobs with --prepare-access have not ended. The migration of a
// VM is prevented from the time when its first disk is opened until all jobs of the VM
// have ended.
type accesses struct {
	registry *vddk.Registry
	left     map[*batch.Job]*vddk.Params
	ending   sync.WaitGroup // calls of EndAccess, which take a while; other jobs do not wait for them
}

func (b *batchRun) expectDisks(jobs []*batch.Job) *accesses {
	a := &accesses{registry: b.registry, left: map[*batch.Job]*vddk.Params{}}
	for _, j := range jobs {
		if j.Text("prepare_access") == "" {
			continue // parsing the flags of a job takes time, so only the necessary ones are parsed
		}
		c, err := b.parser.command(j)
		if err != nil || !c.PrepareAccess {
			continue // the copy will report the error
		}
		p := &vddk.Params{Server: withoutBrackets(c.Server), Port: uint32(c.Port), VM: c.VM, PrepareAccess: true}
		a.left[j] = p
		a.registry.Expect(p)
	}
	return a
}

// done records that a job has ended. Calls must not be concurrent.
func (a *accesses) done(j *batch.Job) {
	if p := a.left[j]; p != nil {
		delete(a.left, j)
		a.ending.Go(func() { a.registry.Done(p) })
	}
}

// wait ends all accesses, including those of jobs that never started, and returns when
// they have ended.
func (a *accesses) wait() {
	for j := range a.left {
		a.done(j)
	}
	a.ending.Wait()
}
