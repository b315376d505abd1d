package batch_test

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/report"
)

func TestLimitsCountDisks(t *testing.T) {
	var lines []string
	for i := range 40 {
		lines = append(lines, fmt.Sprintf("j%d h%d s%d", i, i%4, i%2))
	}
	for _, c := range []struct {
		limits string
		most   int
	}{
		{`{"total":3}`, 3},
		{`{}`, 4},
		{`{"total":100,"per_host":2}`, 8},
		{`{"total":100,"per_server":3}`, 6},
		{`{"total":7,"per_host":2,"per_server":3}`, 6},
		{`{"total":100}`, 40},
	} {
		t.Run(c.limits, func(t *testing.T) {
			f := newFake(t, `"limits":`+c.limits+`,`+jobsOf(lines...))
			f.mustRun(false, 0, batch.Counts{Done: 40})
			if f.most != c.most || len(f.over) > 0 {
				t.Errorf("%d disks at once, want %d; over their limits: %v", f.most, c.most, f.over)
			}
		})
	}
}

// TestJobsOfSeveralDisks checks that all disks of a job count against the limits, and
// that a job with more disks than a limit runs alone.
func TestJobsOfSeveralDisks(t *testing.T) {
	f := newFake(t, `"limits":{"total":3},`+jobsOf("a", "b", "c", "d"))
	f.disks = map[string]int{"a": 2, "c": 2, "d": 9}
	f.mustRun(false, 0, batch.Counts{Done: 4})
	if got := strings.Join(f.copied, ""); f.most != 2 || got != "abcd" && got != "bacd" {
		t.Errorf("begun %s, %d at once", got, f.most)
	}
	host := newFake(t, `"limits":{"total":9,"per_host":2},`+jobsOf("a h1", "b h1"))
	host.disks = map[string]int{"a": 3}
	host.mustRun(false, 0, batch.Counts{Done: 2})
	if host.most != 1 {
		t.Errorf("%d at once on a host", host.most)
	}
}

// TestOrderIsTheFilesAndWaitsForNobody checks that jobs start in the order of the
// file, and that a job which waits for a limit does not delay jobs which the limit
// does not concern.
func TestOrderIsTheFilesAndWaitsForNobody(t *testing.T) {
	f := newFake(t, `"limits":{"total":2,"per_host":1},`+jobsOf("a h1", "b h1", "c h2", "d h1"))
	f.mustRun(false, 0, batch.Counts{Done: 4})
	if got := strings.Join(f.copied[:2], ""); got != "ac" && got != "ca" {
		t.Errorf("begun: %v", f.copied)
	}
	if got := strings.Join(f.copied[2:], ""); got != "bd" {
		t.Errorf("begun: %v", f.copied)
	}
	one := newFake(t, `"limits":{"total":1},`+jobsOf("c", "a", "b"))
	one.mustRun(false, 0, batch.Counts{Done: 3})
	if got := strings.Join(one.copied, ""); got != "cab" {
		t.Errorf("begun: %v", one.copied)
	}
}

func TestLongestFirst(t *testing.T) {
	f := newFake(t, `"limits":{"total":1},`+jobsOf("a", "b", "c", "d"))
	sizes := map[string]int64{"a": 5, "b": 9, "c": 5, "d": 0}
	f.sizes = sizes
	f.mustRun(false, 0, batch.Counts{Done: 4})
	if got := strings.Join(f.copied, ""); got != "bacd" {
		t.Errorf("begun: %v", f.copied)
	}
}

func TestRoundsTryAgainAtTheEnd(t *testing.T) {
	f := newFake(t, `"limits":{"total":1,"rounds":2},`+jobsOf("a", "b", "c", "d"))
	f.fates = map[string][]*fate{"a": {mayPass}, "b": {mayPass, mayPass, mayPass, ok}, "c": {broken, ok}}
	r := f.mustRun(false, 4, batch.Counts{Done: 2, Failed: 2})
	if got := strings.Join(f.copied, ""); got != "abcdabb" {
		t.Errorf("begun: %v", f.copied)
	}
	if got := strings.Join(f.resumed, ""); got != "abb" {
		t.Errorf("resumed: %v", f.resumed)
	}
	attempts := []int{r.Jobs[0].Attempts, r.Jobs[1].Attempts, r.Jobs[2].Attempts, r.Jobs[3].Attempts}
	if !reflect.DeepEqual(attempts, []int{2, 3, 1, 1}) || r.Jobs[1].Exit != 75 {
		t.Errorf("attempts %v, exit of b %d", attempts, r.Jobs[1].Exit)
	}
	if want := []string{"c failed", "d ok", "a ok", "b failed"}; !reflect.DeepEqual(f.ended, want) {
		t.Errorf("ended %v, want %v", f.ended, want)
	}
}

// TestRoundsWait checks that the batch waits before each round, at most a minute, and
// logs the wait. By default there are two rounds.
func TestRoundsWait(t *testing.T) {
	for _, c := range []struct {
		limits string
		waits  []time.Duration
	}{
		{"", []time.Duration{3 * time.Second, 9 * time.Second}},
		{`"limits":{"rounds":0},`, nil},
		{`"limits":{"rounds":5},`, []time.Duration{3 * time.Second, 9 * time.Second, 27 * time.Second, time.Minute, time.Minute}},
	} {
		f := newFake(t, c.limits+jobsOf("a"))
		f.fates = map[string][]*fate{"a": {mayPass, mayPass, mayPass, mayPass, mayPass, mayPass, mayPass}}
		var waits []time.Duration
		over := 0
		f.o.Waiting = func(jobs int, wait time.Duration) func() {
			waits = append(waits, wait)
			began := time.Now()
			return func() {
				if over++; jobs != 1 || time.Since(began) != wait {
					t.Errorf("%d jobs waited for %v, want 1 for %v", jobs, time.Since(began), wait)
				}
			}
		}
		f.mustRun(false, 75, batch.Counts{Failed: 1})
		if !reflect.DeepEqual(waits, c.waits) || over != len(waits) {
			t.Errorf("limits %q: waits %v, of which %d ended; want %v", c.limits, waits, over, c.waits)
		}
		if told := strings.Count(f.log.String(), "waiting before trying failed jobs again"); told != len(c.waits) {
			t.Errorf("limits %q: %d waits are in the log, want %d", c.limits, told, len(c.waits))
		}
	}
}

// TestWaitForARoundEnds checks that the end of the context ends the wait, and that the
// waiting jobs keep the report of their last attempt.
func TestWaitForARoundEnds(t *testing.T) {
	f := newFake(t, jobsOf("a", "b"))
	f.fates = map[string][]*fate{"a": {mayPass}}
	f.o.Waiting = func(int, time.Duration) func() {
		f.stop(errStop)
		return func() {}
	}
	r := f.mustRun(false, 130, batch.Counts{Done: 1, Failed: 1})
	if len(f.copied) != 2 || r.Jobs[0].Exit != 75 {
		t.Errorf("begun %v, exit of a %d", f.copied, r.Jobs[0].Exit)
	}
	if want := []string{"b ok", "a failed"}; !reflect.DeepEqual(f.ended, want) {
		t.Errorf("ended %v, want %v", f.ended, want)
	}
}

func TestExitStatus(t *testing.T) {
	for _, c := range []struct {
		name   string
		fates  map[string][]*fate
		exit   int
		counts batch.Counts
	}{
		{"all done", nil, 0, batch.Counts{Done: 3}},
		{"done, and something is left", map[string][]*fate{"b": {{status: report.StatusOK, exit: 5}}}, 5, batch.Counts{Done: 3}},
		{"some failed", map[string][]*fate{"b": {broken}}, 4, batch.Counts{Done: 2, Failed: 1}},
		{"some may pass", map[string][]*fate{"a": {mayPass}, "b": {mayPass}}, 4, batch.Counts{Done: 1, Failed: 2}},
		{"all failed", map[string][]*fate{"a": {broken}, "b": {mayPass}, "c": {mismatch}}, 1, batch.Counts{Failed: 3}},
		{"all may pass", map[string][]*fate{"a": {mayPass}, "b": {mayPass}, "c": {mayPass}}, 75, batch.Counts{Failed: 3}},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t, `"limits":{"rounds":0},`+jobsOf("a", "b", "c"))
			f.fates = c.fates
			f.mustRun(false, c.exit, c.counts)
		})
	}
}

func TestStopOnError(t *testing.T) {
	f := newFake(t, `"continue_on_error":false,"limits":{"total":1},`+jobsOf("a", "b", "c"))
	f.fates = map[string][]*fate{"b": {broken}}
	r := f.mustRun(false, 4, batch.Counts{Done: 1, Failed: 1, Skipped: 1})
	if c := r.Jobs[2]; c.Status != report.StatusSkipped || !strings.Contains(c.Error, "continue_on_error") {
		t.Errorf("the last job: %+v", c.Report)
	}
}

func TestSignalThenResume(t *testing.T) {
	f := newFake(t, `"limits":{"total":1},`+jobsOf("a", "b", "c", "d", "e"))
	f.fates["c"] = []*fate{{status: report.StatusOK, takes: time.Hour, do: func(context.Context, *batch.Task) { f.stop(errStop) }}}
	r := f.mustRun(false, 130, batch.Counts{Done: 2, Skipped: 2, Interrupted: 1})
	if r.Status != report.StatusInterrupted || r.Jobs[4].Error != "not started: stopped" {
		t.Errorf("report %+v, last job %+v", r, r.Jobs[4].Report)
	}
	if _, err := f.run(t.Context(), false); !errors.As(err, new(*batch.UnfinishedError)) || f.copied != nil {
		t.Errorf("without resume: %v, begun %v", err, f.copied)
	}
	again := f.mustRun(true, 0, batch.Counts{Done: 5})
	slices.Sort(f.copied)
	if got := strings.Join(f.copied, ""); got != "cde" {
		t.Errorf("begun: %v", f.copied)
	}
	if !again.Jobs[0].Started.Equal(r.Jobs[0].Started) || again.Jobs[2].Attempts != 2 {
		t.Errorf("job a: %+v; c: %d attempts", again.Jobs[0].Report, again.Jobs[2].Attempts)
	}
	// A batch that is finished may be run anew.
	f.mustRun(false, 0, batch.Counts{Done: 5})
	if len(f.copied) != 5 {
		t.Errorf("begun: %v", f.copied)
	}
}

func TestLogName(t *testing.T) {
	long := strings.Repeat("ü", 300)
	for job, want := range map[string]string{
		"web01-0": "web01-0.log", "a/b c": "a%2Fb c.log", "..": "%2E..log", "50%": "50%25.log", "x\n\x00": "x%0A%00.log", "日本": "日本.log",
	} {
		if got := batch.LogName(job); got != want {
			t.Errorf("LogName(%q) = %q, want %q", job, got, want)
		}
	}
	if got := batch.LogName(long); len(got) > 255 || got == batch.LogName(long+"x") {
		t.Errorf("LogName of a long name: %q", got)
	}
}
