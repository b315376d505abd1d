package batch_test

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// reading returns the fate of a copy that reads 1 MiB a second and waits for its source for most of
// that time.
func reading(seconds int) *fate {
	return &fate{status: report.StatusOK, do: func(_ context.Context, t *batch.Task) {
		t.Way(report.Way{Via: "nfc"})
		t.Counters.Enter(progress.Copy)
		t.Counters.Examined(100<<20, 100<<20)
		t.Counters.AddPlanned(int64(seconds) << 20)
		t.Counters.SetConnections(3)
		for range seconds {
			t.Counters.Begin(progress.WaitSource)
			time.Sleep(700 * time.Millisecond)
			t.Counters.End(progress.WaitSource)
			t.Counters.Begin(progress.WaitTarget)
			time.Sleep(200 * time.Millisecond)
			t.Counters.End(progress.WaitTarget)
			time.Sleep(100 * time.Millisecond)
			t.Counters.AddRead(1 << 20)
			t.Counters.AddDone(1 << 20)
		}
	}}
}

// TestMonitor looks at a batch while it runs: one job is done, one runs, one waits for another
// attempt and one has not begun.
func TestMonitor(t *testing.T) {
	f := newFake(t, `"limits":{"total":1},`+jobsOf("a h1", "b", "c h2", "d"))
	f.fates = map[string][]*fate{"a": {reading(10)}, "b": {mayPass}, "c": {reading(60)}}
	var whole, now *batch.Report
	f.o.Watch = func(m *batch.Monitor) func() {
		var all sync.WaitGroup
		all.Go(func() {
			time.Sleep(51*time.Second + 500*time.Millisecond)
			whole, now = m.Report(), m.Now()
		})
		return all.Wait
	}
	end := f.mustRun(false, 0, batch.Counts{Done: 4})
	if whole.Status != report.StatusRunning || whole.Exit != -1 || !whole.Finished.Equal(whole.Updated) || whole.Updated.Sub(whole.Started) != 51*time.Second+500*time.Millisecond {
		t.Errorf("status %s, exit %d, from %s to %s, updated %s", whole.Status, whole.Exit, whole.Started, whole.Finished, whole.Updated)
	}
	if want := (batch.Counts{Done: 1, Running: 1, Pending: 2}); whole.Counts != want || now.Counts != want {
		t.Errorf("counts %+v and %+v, want %+v", whole.Counts, now.Counts, want)
	}
	var got []string
	for _, j := range whole.Jobs {
		got = append(got, fmt.Sprintf("%s %q %s %d %d", j.Name, j.Host, j.Status, j.Attempts, j.Exit))
	}
	if got, want := strings.Join(got, ", "), `a "h1" ok 1 0, b "" pending 1 -1, c "h2" running 1 -1, d "" pending 0 -1`; got != want {
		t.Errorf("jobs %s; want %s", got, want)
	}
	if !strings.Contains(whole.Jobs[1].Error, "will be tried again; attempt 1 failed") {
		t.Errorf("a job that is tried again: %q", whole.Jobs[1].Error)
	}
	if len(now.Jobs) != 1 || now.Jobs[0].Name != "c" {
		t.Fatalf("%d jobs run now", len(now.Jobs))
	}
	c := now.Jobs[0]
	if c.BytesRead != 40<<20 || c.BytesPlanned != 60<<20 || c.VirtualSize != 100<<20 || c.Connections != 3 || c.Via != "nfc" || c.Waits.Source < 27 {
		t.Errorf("the job that runs: %+v", c.Report)
	}
	if l := c.Live; l.Phase != "copy" || l.BytesDone != 40<<20 || l.Rate < 0.9*(1<<20) || l.Rate > 1.1*(1<<20) || l.ETASeconds == nil || *l.ETASeconds < 15 || l.BoundBy != "source" {
		t.Errorf("live %+v", l)
	}
	if n := whole.Totals; n.BytesRead != 50<<20 || n.Connections != 3 || n.Rate < 0.9*(1<<20) || n.Waits.Source < 34 {
		t.Errorf("totals %+v", n)
	}
	if end.Totals.BytesRead != 70<<20 || end.Totals.Connections != 0 || end.Jobs[2].Live != nil || !end.Updated.Equal(end.Finished) {
		t.Errorf("at the end: %+v, updated %s", end.Totals, end.Updated)
	}
	sum := 0.0
	end.Curve.Rates[len(end.Curve.Rates)-1] *= end.Finished.Sub(end.Started).Seconds()/10 - float64(len(end.Curve.Rates)-1)
	for _, rate := range end.Curve.Rates {
		sum += rate * end.Curve.Seconds
	}
	if len(end.Curve.Rates) < 7 || sum < 70<<20-1000 || sum > 70<<20+1000 {
		t.Errorf("the curve %+v stands for %.0f bytes, want %d", end.Curve, sum, 70<<20)
	}
}

// TestWatchIsNotCalledForNothing checks that a batch that cannot run is not watched, because its
// watchers would overwrite the report of the batch before it.
func TestWatchIsNotCalledForNothing(t *testing.T) {
	f := newFake(t, jobsOf("a", "b"))
	f.fates = map[string][]*fate{"a": {broken}}
	f.mustRun(false, 4, batch.Counts{Done: 1, Failed: 1})
	f.o.Watch = func(*batch.Monitor) func() {
		t.Error("Watch was called")
		return func() {}
	}
	if _, err := f.run(t.Context(), false); err == nil {
		t.Error("no error of an unfinished batch")
	}
}
