package batch

import (
	"cmp"
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// The method work makes one attempt at a job, including its before and after commands, and updates
// the state file. It runs in a goroutine of its own. The fields of r, the running batch, belong to
// the goroutine of the scheduler. The method may therefore use only the field r.o, the options,
// which do not change.
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
			log.Warn("the state file cannot be written: if this run is killed, the job may run again", "error", err)
		}
	}
	ended := &JobReport{Name: j.Name, Host: j.Host, Labels: j.Labels(), Attempts: a.number + 1, Report: a.copied}
	if a.copied == nil {
		keep(phaseRunning)
		ended.Report = r.copy(ctx, a, log, func(mark string) {
			e.Mark, e.Backing = mark, a.runner.Backing()
			if err := r.o.Store.putDurably(e); err != nil {
				log.Warn("the state file cannot be written: if this run is killed, the finished copy is not recognised", "error", err)
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
		e.Backing = cmp.Or(e.Backing, a.runner.Backing())
	}
	if len(j.After) > 0 {
		if ok {
			keep(phaseCopied)
		}
		// The after command runs whether the copy succeeded or not, even after a signal.
		err := r.hook(context.WithoutCancel(ctx), a, hookAfter, ended, log)
		if err != nil {
			log.Error(err.Error())
			copied := *ended
			ended.Report = afterFailed(ended.Report, err)
			if ok {
				// The copy is complete, and only the after command failed. The state file therefore
				// keeps the report of a successful copy. With --resume only the after command runs
				// again.
				e.Report = &copied
				keep(phaseCopied)
				return ended
			}
		} else if ok {
			e.Size = fileSize(j.Target) // the command may have moved the target away
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

// The method copy runs the before command of a job and then the copy.
func (r *run) copy(ctx context.Context, a *attempt, log *slog.Logger, whole func(string)) *report.Report {
	if len(a.job.Before) > 0 {
		if err := r.hook(ctx, a, hookBefore, nil, log); err != nil {
			t := report.New(a.job.Source, a.job.Target)
			t.End(report.StatusFailed, exit.Failed)
			if ctx.Err() != nil {
				t.End(report.StatusInterrupted, report.Of(context.Cause(ctx)).Exit)
			}
			t.Error = err.Error()
			log.Error(t.Error)
			return t
		}
	}
	return a.runner.Run(ctx, &Task{
		Job: a.job, Log: log, Attempt: a.number + 1, Resume: a.resume, Redo: a.redo, Whole: whole,
		Counters: &a.live.counters, Way: func(w report.Way) { r.monitor.setWay(a.live, w) },
	})
}

// afterFailed returns a copy of the report t, changed to say that the after command failed with the
// error err.
func afterFailed(t *report.Report, err error) *report.Report {
	failed := *t
	if failed.Status != report.StatusOK {
		failed.Warnings = append(slices.Clone(failed.Warnings), err.Error())
		return &failed
	}
	failed.Status, failed.Exit, failed.Error = report.StatusFailed, exit.Failed, err.Error()
	failed.Hint = `the copy itself is complete: run again with --resume, which runs only the command in the job's field "after"`
	return &failed
}

// LogName returns the name of a job's log file: the job's name and ".log". A slash, a percent
// sign, a control character and a dot at the beginning of the name are written as %XX. If this
// makes the name longer than 200 bytes, it is cut to 190 bytes, and "-" and a hash of the whole
// job name are appended, so that two long names do not become equal. The hash is Shard(job, 1<<32)
// in eight hexadecimal digits.
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
