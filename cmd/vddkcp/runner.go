package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/diskjob"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vddk"
)

// The method diskJobs returns what package diskjob needs to run jobs. All jobs of the batch
// use the same result.
func (b *batchRun) diskJobs() *diskjob.Jobs {
	return &diskjob.Jobs{Spec: b.spec, Copy: b.copyDisk, Limit: b.limit, Display: b.display, Log: b.log, Failed: b.failed, AlsoTidy: tidyVM}
}

// tidyVM removes the state file that a killed run left after it had completed the copy of a disk of
// a VM.
func tidyVM(j *batch.Job, spec job.Spec) {
	if address.IsVM(j.Source) && spec.WritesFile() {
		machine.Tidy(stateBeside(spec.Target))
	}
}

// The method failed shows the user the error of a job's copy. With --log-dir, it also
// writes the error to the log of the job.
func (b *batchRun) failed(t *batch.Task, err error) {
	b.refuseReport(err)
	if end := report.Of(err); b.LogDir != "" && !end.Done() {
		t.Log.Debug("failed", "error", err, "hint", end.Hint, "exit", end.Exit)
	}
	failJob(b.display, b.asJSON, t.Name, err)
}

// The method spec returns the options of the copy that a job describes. They include the
// limits that the job shares with other jobs.
func (b *batchRun) spec(j *batch.Job) job.Spec {
	s := b.command(j).spec()
	o := &s.Opener.VDDK.Options
	o.Budget, o.Registry = b.budget(j), b.servers.logins()
	outputs := b.outputs.withFile("--log-dir", b.logPath(j))
	s.Opened = func() error { return outputs.checkOpened(s.Opener, s.BackingOpener) }
	return s
}

// The method command returns the flags of the copy that a job describes. The caller may
// change the returned copyCommand.
func (b *batchRun) command(j *batch.Job) *copyCommand {
	c, err := b.parser.command(j)
	if err != nil {
		panic(err) // loading has checked it
	}
	return c
}

// The method budget returns the limits for memory and connections on an ESXi host. All jobs
// of this host share them. If the host of a job is unknown, its server counts as the host.
// The result is nil for a job whose source is on this machine. It is also nil for a disk of a
// VM without a host in the job file, because the server will tell the host.
func (b *batchRun) budget(j *batch.Job) *vddk.Budget {
	key := j.HostKey()
	if key == "" || address.IsVM(j.Source) && j.Host == "" {
		return nil
	}
	return b.servers.budget(key)
}

// The method copyDisk copies the disk that a job describes.
func (b *batchRun) copyDisk(ctx context.Context, j *batch.Job, spec job.Spec) (r *report.Report, err error) {
	spec.Log = b.texts.log(spec.Log)
	if a, ok := addressOrPath(j.Source, address.Source).(address.VM); ok {
		r, err = b.command(j).copyDiskOfVM(ctx, a, spec)
	} else {
		r, err = job.Run(ctx, spec)
	}
	b.texts.report(r)
	return r, b.texts.error(err)
}

// refuseReport looks for an *outputError, which says that an output, such as a report, is a
// file of a source. It records the path of this output. At the end of the batch, no report
// is written to a recorded path. refuseReport ignores all other errors.
func (b *batchRun) refuseReport(err error) {
	var refused *outputError
	if !errors.As(err, &refused) {
		return
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.refused[refused.path] = true
}

// isRefused reports whether refuseReport has recorded the given path.
func (b *batchRun) isRefused(path string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.refused[path]
}

// jobLog returns the log of a job. With --log-dir, the messages of this log are also
// written to a file. The returned function done closes this file.
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

// The type accesses contains the jobs with --prepare-access that have not ended. From the
// time when the first disk of a VM is opened until all jobs of the VM have ended, an access
// to the VM is prepared. VDDK prevents the migration of the VM during this time.
type accesses struct {
	registry *vddk.Registry
	left     map[*batch.Job]*vddk.Params
	ending   sync.WaitGroup // calls of EndAccess, which take a while; other jobs do not wait for them
}

func (b *batchRun) expectDisks(jobs []*batch.Job) *accesses {
	a := &accesses{registry: b.servers.logins(), left: map[*batch.Job]*vddk.Params{}}
	for _, j := range jobs {
		if j.Text("prepare_access") == "" {
			continue // parsing the flags of a job takes time, and is done only for jobs that need it
		}
		c, err := b.parser.command(j)
		if err != nil || !c.PrepareAccess || address.IsVM(j.Source) {
			continue // the copy will report the error
		}
		r, err := c.resolve()
		if err != nil {
			continue
		}
		p := &vddk.Params{Server: r.server, Port: r.port, VM: c.VM, PrepareAccess: true}
		a.left[j] = p
		a.registry.Expect(p)
	}
	return a
}

// The method done records that a job has ended. Calls must not be concurrent.
func (a *accesses) done(j *batch.Job) {
	if p := a.left[j]; p != nil {
		delete(a.left, j)
		a.ending.Go(func() { a.registry.Done(p) })
	}
}

// The method wait treats all jobs as ended, including jobs that never started. It returns
// when no access to a VM is prepared any more.
func (a *accesses) wait() {
	for j := range a.left {
		a.done(j)
	}
	a.ending.Wait()
}
