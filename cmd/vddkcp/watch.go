package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/durable"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/metrics"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// While a batch runs, its reports and metrics are rewritten every reportInterval, and the file for
// run --status every nowInterval. A report of many jobs is rewritten less often: after each writing
// there is a pause of at least reportRest times the time that it took, so that the reports of a
// batch of any size take at most about one percent of one processor.
const (
	reportInterval = 10 * time.Second
	nowInterval    = 2 * time.Second
	reportRest     = 100
)

// repeat calls the function do at once and then every interval, with the pauses that reportRest
// demands, until the channel done is closed.
func repeat(done <-chan struct{}, interval time.Duration, do func()) {
	for {
		begun := time.Now()
		do()
		took := time.Since(begun)
		if !retry.Sleep(context.Background(), max(interval-took, reportRest*took), done) {
			return
		}
	}
}

// The method watch implements batch.Options.Watch: while the batch runs, it writes the files that
// say what the batch does, and tells systemd. Each file has a goroutine of its own, because a file
// system that does not answer must not delay the others.
func (b *batchRun) watch(store *batch.Store, m *batch.Monitor) (done func()) {
	ending := make(chan struct{})
	var all sync.WaitGroup
	every := func(interval time.Duration, do func()) {
		all.Go(func() { repeat(ending, interval, do) })
	}
	every(nowInterval, warnOnce(b.log, "what runs now cannot be written for run --status", func() error { return store.WriteNow(b.named(m.Now())) }))
	for _, path := range b.Report {
		if !mayRewrite(path, "{", batch.PageStart) {
			continue
		}
		every(reportInterval, warnOnce(b.log, "the report cannot be written now; vddkcp tries again", func() error {
			if b.isRefused(path) {
				return nil
			}
			return b.named(m.Report()).Write(path)
		}))
	}
	if b.Metrics != "" && mayRewrite(b.Metrics, metrics.Start) {
		every(reportInterval, warnOnce(b.log, metricsLater, func() error {
			if b.isRefused(b.Metrics) {
				return nil
			}
			return batchMetrics(m.Now(), b.Metrics).Write(b.Metrics)
		}))
	}
	return func() {
		close(ending)
		all.Wait()
		warnOnce(b.log, "the file for run --status cannot be removed", store.RemoveNow)()
	}
}

// metricsLater is the warning for metrics that cannot be written while a command runs.
const metricsLater = "the metrics cannot be written now; vddkcp tries again"

// warnOnce returns a function that calls the function write and logs its first error. A command
// does not fail because a file about it cannot be written while it runs.
func warnOnce(log *slog.Logger, what string, write func() error) func() {
	warned := false
	return func() {
		if err := write(); err != nil && !warned {
			warned = true
			log.Warn(what, "error", err)
		}
	}
}

// The method named sets the name of the job file in a report.
func (b *batchRun) named(r *batch.Report) *batch.Report {
	r.JobFile = b.Jobs
	return r
}

// mayRewrite reports whether an output may be written again and again while the batch runs. A
// terminal or a pipe gets it only once, at the end. So does a file that exists and begins with none
// of the given texts, because another program has written it. Such a file may be a part of a disk
// that a job reads, which is known only when the job has opened the disk.
func mayRewrite(path string, starts ...string) bool {
	if !durable.Replaces(path) {
		return false
	}
	f, err := os.Open(path)
	if err != nil {
		return true // there is no such file, or writing reports the error
	}
	defer f.Close()
	head := make([]byte, 32)
	n, _ := io.ReadFull(f, head)
	return n == 0 || slices.ContainsFunc(starts, func(start string) bool { return strings.HasPrefix(string(head[:n]), start) })
}

// batchMetrics returns the metrics of a batch that has the given report. path is that of the
// metrics file.
func batchMetrics(r *batch.Report, path string) *metrics.Status {
	t := &r.Totals
	s := &metrics.Status{
		Command: "run", Name: metricsName(path), Started: r.Started, Updated: time.Now(),
		Jobs: map[string]int{
			"done": r.Counts.Done, "failed": r.Counts.Failed, "interrupted": r.Counts.Interrupted, "skipped": r.Counts.Skipped,
			"running": r.Counts.Running, "pending": r.Counts.Pending,
		},
		Read: t.BytesRead, Written: t.BytesWritten, Zeroed: t.BytesZero, Cloned: t.BytesCloned,
		Rate: t.Rate, Connections: t.Connections, Retries: t.Retries, Waits: t.Waits,
	}
	if r.Status != report.StatusRunning {
		s.Finished, s.Exit, s.Rate = r.Finished, r.Exit, 0
	}
	return s
}

// metricsSuffix is the end of the name of a metrics file. The node exporter reads no other files.
const metricsSuffix = ".prom"

// metricsName returns the label that distinguishes the metrics in one file from those in others.
func metricsName(path string) string { return strings.TrimSuffix(filepath.Base(path), metricsSuffix) }

// checkMetrics checks the path of a metrics file.
func checkMetrics(path string) error {
	if path != "" && !strings.HasSuffix(path, metricsSuffix) {
		return fmt.Errorf("--metrics: %q: the node exporter reads only files whose names end in %s", path, metricsSuffix)
	}
	return nil
}

// batchStatus returns a line about a batch that runs, such as "12 of 40 done, 3 running, 1 failed,
// 310 MiB/s".
func batchStatus(r *batch.Report, jobs int) string {
	c := r.Counts
	text := fmt.Sprintf("%d of %d done", c.Done, jobs)
	for _, n := range []struct {
		count int
		what  string
	}{{c.Running, "running"}, {c.Failed, "failed"}, {c.Interrupted, "interrupted"}} {
		if n.count > 0 {
			text += fmt.Sprintf(", %d %s", n.count, n.what)
		}
	}
	return fmt.Sprintf("%s, %s/s", text, bytesize.Format(int64(r.Totals.Rate)))
}
