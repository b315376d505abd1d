package main

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"path/filepath"
	"sync"
	"text/tabwriter"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	sinkraw "github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// The type checked is the result of --check for one job.
type checked struct {
	job        *batch.Job
	size, data int64 // bytes of the disk, and bytes to be copied
	need       int64 // bytes that the target will allocate; 0 if the target is not a file, or unknown
	unknown    bool  // how much data the disk has is unknown
	fileSystem uint64
	err        error
}

// The method check checks all jobs without copying, and prints the results.
func (b *batchRun) check(ctx context.Context, jobs []*batch.Job) error {
	out := standardOutput(ctx)
	if b.Resume {
		left, err := b.unfinished(jobs)
		if err != nil {
			return err
		}
		if done := len(jobs) - len(left); done > 0 {
			if _, err := fmt.Fprintf(out, "%d of %d jobs are done and not checked\n", done, len(jobs)); err != nil {
				return err
			}
		}
		jobs = left
	}
	all := make([]checked, len(jobs))
	stop := b.reportChecked(len(jobs))
	defer stop()
	var group errgroup.Group
	group.SetLimit(b.file.Limits.Total)
	for i, j := range jobs {
		if ctx.Err() != nil {
			break
		}
		group.Go(func() error {
			all[i] = b.checkJob(ctx, j)
			b.checked.Add(1)
			return nil
		})
	}
	_ = group.Wait()
	stop()
	if err := context.Cause(ctx); err != nil {
		return err
	}
	bad, wrong, err := printChecked(out, all)
	if err != nil {
		return err
	}
	full, err := b.printSpace(out, all)
	if err != nil {
		return err
	}
	if b.Probe != nil {
		if err := b.estimate(ctx, out, all); err != nil {
			return err
		}
	}
	if bad+full == 0 {
		return nil
	}
	e := &batchError{exit: exit.Failed, message: fmt.Sprintf("%d of %d jobs are not ready", bad, len(all))}
	if full > 0 {
		e.message += fmt.Sprintf(", and %d file systems have too little space", full)
	}
	if wrong > 0 {
		e.exit, e.hint = exit.Usage, "correct the job file: the reasons above say which parameters of which jobs are wrong"
	}
	return e
}

// reportChecked shows every ten seconds how many of the jobs have been checked. It returns
// the function stop, which ends this.
func (b *batchRun) reportChecked(jobs int) (stop func()) {
	done := make(chan struct{})
	go func() {
		tick := time.NewTicker(10 * time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
				b.notice(fmt.Sprintf("checked %d of %d jobs", b.checked.Load(), jobs))
			case <-done:
				return
			}
		}
	}()
	return sync.OnceFunc(func() { close(done) })
}

// The method unfinished returns the jobs that --resume would run.
func (b *batchRun) unfinished(jobs []*batch.Job) ([]*batch.Job, error) {
	path, err := b.statePath()
	if err != nil {
		return nil, err
	}
	if jobs, err = batch.Unfinished(path, jobs, b.diskJobs().Runner); err != nil {
		return nil, usage.Wrap(err)
	}
	return jobs, nil
}

func (b *batchRun) checkJob(ctx context.Context, t *batch.Job) checked {
	spec := b.spec(t)
	file := spec.WritesFile()
	spec.Resume = spec.Resume || b.Resume && file
	spec.Log = b.texts.log(b.log.With("job", t.Name))
	p, err := b.plan(ctx, t, spec)
	r := checked{job: t, size: p.Size, data: p.Need, need: p.Need, unknown: address.IsVM(t.Source), err: b.texts.error(err)}
	switch {
	case file && spec.Preallocation != sinkraw.PreallocateOff:
		r.need = r.size
	case !file || r.unknown:
		r.need = 0
	}
	var st unix.Stat_t
	if r.need > 0 && unix.Stat(filepath.Dir(spec.Target), &st) == nil {
		r.fileSystem = st.Dev
	}
	return r
}

// The method plan checks the copy of a job. For a disk of a VM it makes no snapshot, so the number
// of bytes to copy is not known, and the size of the disk stands for it.
func (b *batchRun) plan(ctx context.Context, j *batch.Job, spec job.Spec) (*job.Planned, error) {
	if a, ok := addressOrPath(j.Source, address.Source).(address.VM); ok {
		return b.command(j).planDiskOfVM(ctx, a, spec)
	}
	return job.Plan(ctx, spec)
}

// printChecked prints a line for each job, and a line with a hint below a job that is not ready.
// The result bad is the number of jobs that are not ready. The result wrong is the number of those
// among them whose parameters in the job file are invalid.
func printChecked(out io.Writer, all []checked) (bad, wrong int, err error) {
	// The hints are added after the table has been aligned, because a line without columns would
	// end the alignment.
	var lines bytes.Buffer
	hints := make([]string, 0, len(all))
	table := tabwriter.NewWriter(&lines, 0, 8, 2, ' ', 0)
	fmt.Fprintln(table, "JOB\tSIZE\tTO COPY\tTARGET\tREADY")
	for _, c := range all {
		ready, hint, size, data := "yes", "", bytesize.Format(c.size), bytesize.Format(c.data)
		if c.unknown {
			data = "unknown"
		}
		if c.err != nil {
			bad++
			end := report.Of(c.err)
			if end.Exit == exit.Usage {
				wrong++
			}
			ready = "no: " + c.err.Error()
			hint = end.Hint
			// The check of a job may fail before the sizes of its disk are known. Sizes
			// that are not known are 0.
			if c.data == 0 {
				data = "-"
			}
			if c.size == 0 {
				size = "-"
			}
		}
		// The names are quoted, because a tab or a newline in a name would start another
		// cell of the table.
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\n", printable.Name(c.job.Name), size, data, printable.Name(c.job.Target), printable.Line(ready))
		hints = append(hints, hint)
	}
	_ = table.Flush() // a bytes.Buffer has no errors
	head, err := lines.ReadString('\n')
	text := head
	for _, hint := range hints {
		line, _ := lines.ReadString('\n')
		text += line
		if hint != "" {
			text += "  hint: " + printable.Line(hint) + "\n"
		}
	}
	if err == nil {
		_, err = io.WriteString(out, text)
	}
	return bad, wrong, err
}

// printSpace prints how much space the targets need on each file system. It returns the
// number of file systems with too little space for all of their targets together.
func (b *batchRun) printSpace(out io.Writer, all []checked) (full int, err error) {
	type fileSystem struct {
		id   uint64
		path string
		need int64
		jobs int
	}
	var systems []*fileSystem
	find := func(id uint64, path string) *fileSystem {
		for _, s := range systems {
			if s.id == id {
				return s
			}
		}
		s := &fileSystem{id: id, path: path}
		systems = append(systems, s)
		return s
	}
	unknown := 0
	for _, c := range all {
		switch {
		case c.need > 0 && c.fileSystem != 0:
			s := find(c.fileSystem, filepath.Dir(c.job.Target))
			s.need += c.need
			s.jobs++
		case c.unknown && c.need == 0 && c.err == nil:
			unknown++
		}
	}
	if unknown > 0 {
		if _, err := fmt.Fprintf(out, "space: %s not counted, because how much data a disk of a VM has is unknown before it is read\n", plural(unknown, "job is", "jobs are")); err != nil {
			return full, err
		}
	}
	for _, s := range systems {
		var st unix.Statfs_t
		if err := unix.Statfs(s.path, &st); err != nil {
			return full, fmt.Errorf("%s: %w", s.path, err)
		}
		free := int64(st.Bavail) * st.Frsize
		verdict := "enough"
		if s.need > free {
			verdict = "too little"
			full++
		}
		if _, err := fmt.Fprintf(out, "space at %s: %d jobs take up to %s, %s are free: %s\n", printable.Name(s.path), s.jobs, bytesize.Format(s.need), bytesize.Format(free), verdict); err != nil {
			return full, err
		}
	}
	return full, nil
}
