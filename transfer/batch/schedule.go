package batch

import (
	"context"
	"slices"
	"time"

	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// The method schedule runs the jobs in the given queue as the limits allow. When all jobs have
// ended, it tries those with a transient failure again. It does this at most Limits.Rounds times.
func (r *run) schedule(ctx context.Context, queue []*attempt) {
	type end struct {
		a      *attempt
		report *JobReport
	}
	ends := make(chan end)
	running, stop := 0, false
	var again []*attempt
	for round := 0; ; {
		for ctx.Err() == nil && !stop && r.disks < r.o.Limits.Total {
			i := slices.IndexFunc(queue, func(a *attempt) bool { return r.fits(&a.demand) })
			if i < 0 {
				break
			}
			a := queue[i]
			queue = slices.Delete(queue, i, i+1)
			running++
			r.occupy(a.demand)
			a.live = r.monitor.start(a.job, a.number+1)
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
				r.o.Log.Info("trying failed jobs again", "jobs", len(queue), "round", round)
			}
			continue
		}
		e := <-ends
		running--
		r.release(e.a.demand)
		r.reports[e.a.job] = e.report
		failed := e.report.Status == report.StatusFailed || e.report.Status == report.StatusMismatch
		willRetry := failed && e.report.Exit == exit.Resumable && round < r.o.Limits.Rounds && ctx.Err() == nil
		r.monitor.end(e.a.live, e.report, willRetry)
		if willRetry {
			again = append(again, &attempt{job: e.a.job, runner: e.a.runner, demand: e.a.demand, number: e.report.Attempts, resume: true, redo: e.a.redo})
			continue
		}
		if failed && !r.o.ContinueOnError {
			stop = true
		}
		r.ended(e.a.job)
	}
}

// The method ended calls Options.Ended for a job that is not tried again.
func (r *run) ended(j *Job) {
	if r.o.Ended != nil {
		r.o.Ended(j, r.reports[j])
	}
}

// Before a round of retries the batch pauses, so that the servers can recover. firstPause is the
// length of the pause before the first round. Each further pause is three times as long as the
// pause before it. No pause is longer than longestPause.
const (
	firstPause   = 3 * time.Second
	longestPause = time.Minute
)

// The method pause waits before a round of retries. round is the number of the round, from 1, and
// jobs is the number of jobs that are tried again. pause returns false if ctx ends first.
func (r *run) pause(ctx context.Context, jobs, round int) bool {
	wait := firstPause
	for range round - 1 {
		wait = min(3*wait, longestPause)
	}
	r.o.Log.Info("waiting before trying failed jobs again", "jobs", jobs, "round", round, "wait", wait)
	if r.o.Waiting != nil {
		defer r.o.Waiting(jobs, wait)()
	}
	return retry.Sleep(ctx, wait, nil)
}

// The method fits reports whether the limits allow a job with this demand to start now. A job that
// alone exceeds a limit may start when nothing else counts against that limit.
func (r *run) fits(d *Demand) bool {
	l := r.o.Limits
	if r.disks > 0 && r.disks+d.Disks > l.Total {
		return false
	}
	if d.Server != "" && l.PerServer > 0 && r.servers[d.Server]+d.Disks > max(l.PerServer, d.Disks) {
		return false
	}
	return d.Host == "" || l.PerHost == 0 || r.hosts[d.Host]+d.Disks <= max(l.PerHost, d.Disks)
}

// The method occupy is called when a job starts. It adds the disks of the job to the numbers of
// disks that are copied now. The method fits compares these numbers with the limits. When the job
// ends, the method release subtracts its disks again.
func (r *run) occupy(d Demand) {
	r.disks += d.Disks
	r.servers[d.Server] += d.Disks
	r.hosts[d.Host] += d.Disks
}

func (r *run) release(d Demand) {
	d.Disks = -d.Disks
	r.occupy(d)
}
