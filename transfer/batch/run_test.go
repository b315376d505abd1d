package batch_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// errStop stands for a signal.
var errStop = stopped{}

type stopped struct{}

func (stopped) Error() string   { return "stopped" }
func (stopped) ExitStatus() int { return 130 }

// fake is a batch whose copies are played.
type fake struct {
	t    *testing.T
	dir  string
	file *batch.File
	o    batch.Options
	log  *strings.Builder
	stop context.CancelCauseFunc

	mu       sync.Mutex
	copied   []string           // job names, as their copies began
	resumed  []string           // those that were to go on
	ended    []string           // NAME STATUS
	fates    map[string][]*fate // of each job's attempts
	now      int
	most     int // copies at once
	perHost  map[string]int
	sizes    map[string]int64  // of the sources; of others nothing is known
	backings map[string]string // texts that identify them
	disks    map[string]int    // of a job; 0: 1
	over     []string          // hosts and servers with more than a limit's disks at once
}

// fate is what becomes of a copy.
type fate struct {
	status report.Status
	exit   int
	takes  time.Duration
	do     func(ctx context.Context, t *batch.Task)
	whole  func() // called between the note that the target is whole and its rename
}

var (
	ok       = &fate{status: report.StatusOK, takes: time.Second}
	broken   = &fate{status: report.StatusFailed, exit: 1, takes: time.Second}
	mayPass  = &fate{status: report.StatusFailed, exit: 75, takes: time.Second}
	mismatch = &fate{status: report.StatusMismatch, exit: 3, takes: time.Second}
)

// newFake takes the "jobs" and what else a job file has beside its version.
func newFake(t *testing.T, file string) *fake {
	t.Helper()
	f := &fake{t: t, dir: t.TempDir(), log: new(strings.Builder), fates: map[string][]*fate{}, perHost: map[string]int{}}
	var err error
	f.file, err = batch.Load(strings.NewReader(`{"version":1,`+file+`}`), "jobs.json", f.dir, testSpec())
	if err != nil {
		t.Fatal(err)
	}
	f.o = batch.Options{
		Limits: f.file.Limits, ContinueOnError: f.file.ContinueOnError, Runner: func(j *batch.Job) batch.Runner { return &fakeRunner{f, j} },
		Log:   slog.New(slog.NewTextHandler(&locked{w: f.log}, nil)),
		Ended: func(j *batch.Job, r *batch.JobReport) { f.ended = append(f.ended, fmt.Sprint(j.Name, " ", r.Status)) },
	}
	return f
}

// fakeRunner is a job of a fake.
type fakeRunner struct {
	*fake
	job *batch.Job
}

func (r *fakeRunner) Run(ctx context.Context, t *batch.Task) *report.Report { return r.copy(ctx, t) }
func (r *fakeRunner) Backing() string                                       { return r.backings[r.job.Name] }
func (r *fakeRunner) Tidy()                                                 {}

func (r *fakeRunner) Demand() batch.Demand {
	d := r.job.Demand()
	d.Disks = max(r.disks[r.job.Name], 1)
	return d
}

func (r *fakeRunner) Size() int64 {
	if size, ok := r.sizes[r.job.Name]; ok {
		return size
	}
	return -1
}

type locked struct {
	mu sync.Mutex
	w  io.Writer
}

func (l *locked) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}

func (f *fake) copy(ctx context.Context, t *batch.Task) *report.Report {
	f.mu.Lock()
	f.copied = append(f.copied, t.Name)
	if t.Resume {
		f.resumed = append(f.resumed, t.Name)
	}
	fate := ok
	if fates := f.fates[t.Name]; len(fates) > 0 {
		fate, f.fates[t.Name] = fates[0], fates[1:]
	}
	count := func(n int) {
		f.now += n
		f.most = max(f.most, f.now)
		for key, limit := range map[string]int{"host " + t.Host: f.file.Limits.PerHost, "server " + t.Server(): f.file.Limits.PerServer} {
			if f.perHost[key] += n; limit > 0 && f.perHost[key] > limit && !strings.HasSuffix(key, " ") {
				f.over = append(f.over, key)
			}
		}
	}
	count(1)
	f.mu.Unlock()
	r := report.New(t.Source, t.Target)
	status, exit := fate.status, fate.exit
	if fate.do != nil {
		fate.do(ctx, t)
	}
	select {
	case <-ctx.Done():
		status, exit = report.StatusInterrupted, 130
	case <-time.After(fate.takes):
	}
	if status == report.StatusOK {
		partial := t.Target + ".partial"
		if err := os.WriteFile(partial, []byte(t.Name), 0o600); err != nil {
			f.t.Error(err)
		}
		t.Whole(fileid.MarkOf(partial))
		if fate.whole != nil {
			fate.whole()
		}
		if err := os.Rename(partial, t.Target); err != nil {
			f.t.Error(err)
		}
	}
	r.End(status, exit)
	f.mu.Lock()
	defer f.mu.Unlock()
	count(-1)
	return r
}

// run runs the batch with its state file, or returns the error before it.
func (f *fake) run(ctx context.Context, resume bool) (*batch.Report, error) {
	f.t.Helper()
	store, err := batch.OpenStore(filepath.Join(f.dir, "state.json"))
	if err != nil {
		f.t.Fatal(err)
	}
	f.copied, f.resumed, f.ended = nil, nil, nil
	f.o.Store, f.o.Resume = store, resume
	r, err := batch.Run(ctx, f.file.Jobs, f.o)
	if closed := store.Close(); closed != nil {
		f.t.Error(closed)
	}
	return r, err
}

// mustRun is run in a bubble whose clock jumps, until f.stop is called.
func (f *fake) mustRun(resume bool, exit int, counts batch.Counts) (r *batch.Report) {
	f.t.Helper()
	synctest.Test(f.t, func(t *testing.T) {
		var ctx context.Context
		ctx, f.stop = context.WithCancelCause(t.Context())
		defer f.stop(nil)
		var err error
		if r, err = f.run(ctx, resume); err != nil {
			f.t.Error(err)
		}
	})
	if r == nil {
		f.t.FailNow()
	}
	if r.Exit != exit || r.Counts != counts {
		f.t.Errorf("exit %d, counts %+v; want %d, %+v\n%s", r.Exit, r.Counts, exit, counts, f.log)
	}
	return r
}

// jobsOf makes jobs of lines NAME HOST SERVER.
func jobsOf(lines ...string) string {
	var jobs []string
	for _, line := range lines {
		words := append(strings.Fields(line), "", "")
		job := fmt.Sprintf(`{"name":"%s","source":"s","target":"t-%[1]s"`, words[0])
		if words[1] != "" {
			job += fmt.Sprintf(`,"host":"%s"`, words[1])
		}
		if words[2] != "" {
			job += fmt.Sprintf(`,"server":"%s"`, words[2])
		}
		jobs = append(jobs, job+"}")
	}
	return `"jobs":[` + strings.Join(jobs, ",") + `]`
}

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

// A job may have several disks, which all count. One with more disks than a limit
// runs alone.
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

// A limit that one job waits for does not keep back those that it is not of.
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

// Between rounds there is a wait, which grows to a minute and is told. Two rounds
// are the default.
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

// The end of the context ends the wait, and the jobs that wait keep what their
// last attempt gave.
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

func TestResumeLooksAtTargets(t *testing.T) {
	f := newFake(t, jobsOf("a", "b", "c", "d"))
	f.mustRun(false, 0, batch.Counts{Done: 4})
	if err := os.Remove(filepath.Join(f.dir, "t-a")); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(f.dir, "t-b"), 100); err != nil {
		t.Fatal(err)
	}
	f.file.Jobs[2].Source += "x"
	f.mustRun(true, 0, batch.Counts{Done: 4})
	slices.Sort(f.copied)
	if got := strings.Join(f.copied, ""); got != "abc" {
		t.Errorf("begun: %v", f.copied)
	}
	for _, want := range []string{"its target is gone\" job=a", "its target has 100 bytes and had 1 when it was done\" job=b", "its fields changed since it was done\" job=c"} {
		if !strings.Contains(f.log.String(), want) {
			t.Errorf("the log lacks %q:\n%s", want, f.log)
		}
	}
}

// A job whose backing changed runs again, whether it was done or only copied.
func TestBackingThatChanged(t *testing.T) {
	f := newFake(t, jobsOf("a", "b"))
	backings := map[string]string{"a": "base at noon"}
	f.backings = backings
	f.o.Limits.Total = 1
	var killed string
	f.fates["a"] = []*fate{{status: report.StatusOK, whole: func() { killed = f.state() }}}
	f.mustRun(false, 0, batch.Counts{Done: 2})
	f.mustRun(true, 0, batch.Counts{Done: 2})
	if len(f.copied) != 0 {
		t.Errorf("with the same backing: begun %v", f.copied)
	}
	backings["a"] = "base at night"
	f.mustRun(true, 0, batch.Counts{Done: 2})
	if got := strings.Join(f.copied, ""); got != "a" || !strings.Contains(f.log.String(), "the backing of its target changed since it was done") {
		t.Errorf("with another backing: begun %q\n%s", got, f.log)
	}
	f.leave(killed)
	f.mustRun(true, 0, batch.Counts{Done: 2})
	if got := strings.Join(f.copied, ""); !strings.Contains(got, "a") {
		t.Errorf("killed when it was whole, and another backing since: begun %q", got)
	}
}

// state is what a run leaves that is killed just when a job has begun.
func (f *fake) state() string {
	text, err := os.ReadFile(filepath.Join(f.dir, "state.json.changes"))
	if err != nil {
		f.t.Error(err)
	}
	return string(text)
}

// leave puts back what state returned.
func (f *fake) leave(state string) {
	f.t.Helper()
	for name, text := range map[string]string{"state.json": `{"version":1,"jobs":[]}`, "state.json.changes": state} {
		if err := os.WriteFile(filepath.Join(f.dir, name), []byte(text), 0o600); err != nil {
			f.t.Error(err)
		}
	}
}

// A run that is killed between a copy's end and its note in the state file does
// not copy again.
func TestKilledAfterTheCopy(t *testing.T) {
	f := newFake(t, jobsOf("a", "b"))
	var killed string
	f.fates["a"] = []*fate{{status: report.StatusOK, whole: func() { killed = f.state() }}}
	f.o.Limits.Total = 1
	f.mustRun(false, 0, batch.Counts{Done: 2})
	if !strings.Contains(killed, `"phase":"running"`) {
		t.Fatalf("state while a runs: %s", killed)
	}
	resume := func(want string) {
		t.Helper()
		f.leave(killed)
		f.mustRun(true, 0, batch.Counts{Done: 2})
		if got := strings.Join(f.copied, ""); got != want {
			t.Errorf("begun: %s, want %s", got, want)
		}
	}
	resume("b")
	// Where it is not there it is copied.
	if err := os.Remove(filepath.Join(f.dir, "t-a")); err != nil {
		t.Fatal(err)
	}
	resume("ab")
	// A file of the same name and size that another program made is not it.
	path := filepath.Join(f.dir, "t-a")
	if err := errors.Join(os.Remove(path), os.WriteFile(path, []byte("a"), 0o600)); err != nil {
		t.Fatal(err)
	}
	resume("ab")
}

// A file that was there before the copy is never taken for it, whatever happened
// to that file while the copy ran.
func TestKilledWhileTheOldTargetChanged(t *testing.T) {
	for name, change := range map[string]func(path string) error{
		"touched":  func(path string) error { return os.Chtimes(path, time.Now(), time.Now().Add(time.Hour)) },
		"written":  func(path string) error { return os.WriteFile(path, []byte("older and longer"), 0o600) },
		"replaced": func(path string) error { return errors.Join(os.Remove(path), os.WriteFile(path, nil, 0o600)) },
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t, `"limits":{"rounds":0},`+jobsOf("a"))
			path := filepath.Join(f.dir, "t-a")
			if err := os.WriteFile(path, []byte("old"), 0o600); err != nil {
				t.Fatal(err)
			}
			for _, at := range []string{"while it copies", "when it is whole"} {
				var killed string
				kill := func() {
					if err := change(path); err != nil {
						t.Fatal(err)
					}
					killed = f.state()
				}
				first := &fate{status: report.StatusFailed, exit: 75, do: func(context.Context, *batch.Task) { kill() }}
				if at == "when it is whole" {
					first = &fate{status: report.StatusOK, whole: kill}
				}
				f.fates["a"] = []*fate{first}
				os.Remove(filepath.Join(f.dir, "state.json"))
				old, err := os.ReadFile(path)
				if err != nil {
					t.Fatal(err)
				}
				if at == "when it is whole" {
					f.mustRun(false, 0, batch.Counts{Done: 1})
					// The kill came before the rename.
					if err := errors.Join(os.Remove(path), os.WriteFile(path, old, 0o600)); err != nil {
						t.Fatal(err)
					}
				} else {
					f.mustRun(false, 75, batch.Counts{Failed: 1})
				}
				f.leave(killed)
				f.copied = nil
				f.mustRun(true, 0, batch.Counts{Done: 1})
				if len(f.copied) != 1 {
					t.Errorf("killed %s: begun: %v", at, f.copied)
				}
			}
		})
	}
}

// Of the changes that a killed run left, one that was cut was not made, and those of
// a state file that somebody removed are nobody's.
func TestChangesOfAKilledRun(t *testing.T) {
	f := newFake(t, jobsOf("a", "b", "c"))
	var killed string
	f.fates["c"] = []*fate{{status: report.StatusOK, whole: func() { killed = f.state() }}}
	f.o.Limits.Total = 1
	f.mustRun(false, 0, batch.Counts{Done: 3})
	for _, c := range []struct{ name, changes, copied string }{
		{"whole", killed, ""}, // c was noted as whole
		{"cut, and more behind it", killed[:10] + "\n" + killed, ""},
		{"cut", killed[:len(killed)-10], "c"}, // the note that c became whole
	} {
		f.leave(c.changes)
		f.mustRun(true, 0, batch.Counts{Done: 3})
		if got := strings.Join(f.copied, ""); got != c.copied {
			t.Errorf("%s: begun %s, want %s", c.name, got, c.copied)
		}
	}
	f.leave(killed)
	if err := os.Remove(filepath.Join(f.dir, "state.json")); err != nil {
		t.Fatal(err)
	}
	f.mustRun(false, 0, batch.Counts{Done: 3})
	if got := strings.Join(f.copied, ""); got != "abc" {
		t.Errorf("anew: begun %s", got)
	}
	if left, err := filepath.Glob(filepath.Join(f.dir, "state.json?*")); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
	f.leave(`{"name":"a","phase":"eh"}`)
	if _, err := batch.OpenStore(filepath.Join(f.dir, "state.json")); err == nil || !strings.Contains(err.Error(), `state.json.changes: phase "eh": want running`) {
		t.Errorf("error %v", err)
	}
}

// What was there before a copy that replaces it is not that copy's.
func TestKilledBeforeTheCopyReplaced(t *testing.T) {
	f := newFake(t, `"limits":{"rounds":0},`+jobsOf("a"))
	if err := os.WriteFile(filepath.Join(f.dir, "t-a"), []byte("old"), 0o600); err != nil {
		t.Fatal(err)
	}
	var killed string
	f.fates["a"] = []*fate{{status: report.StatusFailed, exit: 75, do: func(context.Context, *batch.Task) { killed = f.state() }}}
	f.mustRun(false, 75, batch.Counts{Failed: 1})
	f.leave(killed)
	f.mustRun(true, 0, batch.Counts{Done: 1})
	if len(f.copied) != 1 {
		t.Errorf("begun: %v", f.copied)
	}
}

func TestStateIsLocked(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	first, err := batch.OpenStore(path)
	if err != nil {
		t.Fatal(err)
	}
	_, err = batch.OpenStore(path)
	var used *batch.UsedError
	if want := fmt.Sprintf("process %d on ", os.Getpid()); !errors.As(err, &used) || !strings.Contains(err.Error(), want) {
		t.Errorf("error %v, want one that names %q", err, want)
	}
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	second, err := batch.OpenStore(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.Close(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Dir(path)); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func TestBadState(t *testing.T) {
	path := filepath.Join(t.TempDir(), "state.json")
	for text, want := range map[string]string{
		"":                                      "unexpected end of JSON input; want the state file of an earlier run",
		`{"version":2,"jobs":[]}`:               "version 2, want 1",
		`{"version":1,"jobs":[{"phase":"eh"}]}`: `job 0: phase "eh": want running`,
		`{"version":1,"jobs":[7]}`:              "job 0: json: cannot unmarshal number",
		`{"version":1,"jobs":[{"name":"a","phase":"done"}]}`:               "job 0: phase done without a report",
		`{"version":1,"jobs":[{"name":"a","phase":"copied","report":{}}]}`: "job 0: phase copied without a report",
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		store, err := batch.OpenStore(path)
		if err == nil {
			store.Close()
		}
		if err == nil || !strings.Contains(err.Error(), want) || !strings.Contains(err.Error(), path) {
			t.Errorf("%q: error %v, want %q", text, err, want)
		}
	}
}

// A state file that can't be written costs no copy, but the run's end tells.
func TestStateThatCantBeWritten(t *testing.T) {
	f := newFake(t, jobsOf("a", "b"))
	state := filepath.Join(f.dir, "d")
	if err := os.Mkdir(state, 0o700); err != nil {
		t.Fatal(err)
	}
	store, err := batch.OpenStore(filepath.Join(state, "state.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer store.Close()
	if err := os.Mkdir(filepath.Join(state, "state.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	f.o.Store = store
	r, err := batch.Run(t.Context(), f.file.Jobs, f.o)
	if err == nil || r == nil || r.Counts.Done != 2 || !strings.Contains(f.log.String(), "the state file cannot be written") {
		t.Errorf("report %+v, error %v\n%s", r, err, f.log)
	}
}

func TestMerge(t *testing.T) {
	dir := t.TempDir()
	begun := time.Now().Add(-time.Hour)
	job := func(name string, status report.Status, exit int, minutes int) *batch.JobReport {
		r := report.New("s", "t")
		r.End(status, exit)
		r.Finished = begun.Add(time.Duration(minutes) * time.Minute)
		return &batch.JobReport{Name: name, Labels: map[string]string{}, Attempts: 1, Report: r}
	}
	write := func(name string, minutes int, jobs ...*batch.JobReport) {
		r := batch.Report{Version: 1, Started: begun.Add(time.Duration(minutes) * time.Minute), Finished: begun.Add(time.Duration(minutes+10) * time.Minute), Jobs: jobs}
		if err := r.Write(filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	other := func(name, text string) {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := batch.Merge(dir, nil); err == nil || !strings.Contains(err.Error(), "no report of a batch") {
		t.Errorf("of nothing: %v", err)
	}
	write("0.json", 0, job("a", report.StatusInterrupted, 130, 1), job("c", report.StatusOK, 0, 1))
	write("0-again.json", 20, job("a", report.StatusOK, 0, 21), job("c", report.StatusFailed, 1, 30))
	write("1.json", 5, job("b", report.StatusFailed, 75, 6), job("d", report.StatusSkipped, 0, 40))
	write("2.json", 5, job("d", report.StatusFailed, 1, 7))
	other("jobs.state.json", `{"version":1,"jobs":[]}`)
	other("list.json", `[]`)
	other("notes.txt", `x`)
	r, notes, err := batch.Merge(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{`these jobs are in several reports; the latest one counts: "a", "c", "d"`}; !slices.Equal(notes, want) {
		t.Errorf("notes %q, want %q", notes, want)
	}
	got := ""
	for _, j := range r.Jobs {
		got += fmt.Sprintf("%s=%s ", j.Name, j.Status)
	}
	if got != "a=ok b=failed c=failed d=failed " || r.Exit != 4 || r.Counts != (batch.Counts{Done: 1, Failed: 3}) {
		t.Errorf("%s, exit %d, counts %+v", got, r.Exit, r.Counts)
	}
	if !r.Started.Equal(begun) || r.Finished.Sub(begun) != 30*time.Minute {
		t.Errorf("from %s to %s", r.Started, r.Finished)
	}
	// By a job file: in its order, without strangers, and with what is missing.
	f := newFake(t, jobsOf("e", "a", "b", "f"))
	if r, notes, err = batch.Merge(dir, f.file.Jobs); err != nil {
		t.Fatal(err)
	}
	got = ""
	for _, j := range r.Jobs {
		got += fmt.Sprintf("%s=%s ", j.Name, j.Status)
	}
	if got != "e=skipped a=ok b=failed f=skipped " || r.Exit != 4 || r.Counts != (batch.Counts{Done: 1, Failed: 1, Skipped: 2}) || !strings.Contains(r.Jobs[0].Error, "no report has this job") {
		t.Errorf("%s, exit %d, counts %+v", got, r.Exit, r.Counts)
	}
	if want := []string{`these jobs are in no report: "e", "f"`, `these jobs are left out because the job file does not have them: "c", "d"`}; len(notes) != 3 || !slices.Equal(notes[1:], want) {
		t.Errorf("notes %q, want %q", notes, want)
	}
	other("3.json", `{"version":1,"counts":{},"jobs":[{}]}`)
	if _, _, err := batch.Merge(dir, nil); err == nil || !strings.Contains(err.Error(), "3.json: jobs[0] has no name") {
		t.Errorf("of a bad one: %v", err)
	}
	other("3.json", `{"version":1,`)
	other("4.json", "")
	if _, _, err := batch.Merge(dir, nil); err == nil || !strings.Contains(err.Error(), "3.json: unexpected end of JSON input; want a complete report") || !strings.Contains(err.Error(), "4.json: unexpected end") {
		t.Errorf("of a cut one: %v", err)
	}
}

// The report has the fields of the contract, none more and none less.
func TestReportFields(t *testing.T) {
	f := newFake(t, jobsOf("a"))
	r := f.mustRun(false, 0, batch.Counts{Done: 1})
	path := filepath.Join(f.dir, "r.json")
	if err := r.Write(path); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var fields map[string]json.RawMessage
	if err := json.Unmarshal(text, &fields); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"version", "status", "exit", "started", "finished", "counts", "jobs"} {
		if fields[name] == nil {
			t.Errorf("no %q", name)
		}
		delete(fields, name)
	}
	if len(fields) != 0 {
		t.Errorf("fields %v", fields)
	}
	var jobs struct{ Jobs []map[string]any }
	if err := json.Unmarshal(text, &jobs); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"name", "labels", "attempts", "status", "exit", "source", "target", "bytes_read", "error", "hint"} {
		if _, ok := jobs.Jobs[0][name]; !ok {
			t.Errorf("a job without %q", name)
		}
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

func TestEstimate(t *testing.T) {
	const mib, second = 1 << 20, time.Second
	for _, c := range []struct {
		name    string
		jobs    []string // NAME HOST SERVER, each of 100 MiB
		each    batch.Expected
		limits  batch.Limits
		reached batch.Reached
		want    time.Duration
		binds   string
	}{
		{name: "alone", jobs: []string{"a", "b", "c", "d"}, want: 100 * second, binds: "each disk's own rate binds it"},
		{name: "total", jobs: []string{"a", "b", "c", "d"}, limits: batch.Limits{Total: 1}, want: 400 * second, binds: "limits.total, 1 disks at once, binds it"},
		{name: "per host", jobs: []string{"a h", "b h", "c h", "d i"}, limits: batch.Limits{PerHost: 1}, want: 300 * second, binds: "h's limits.per_host, 1 disks at once, binds it"},
		{name: "per server", jobs: []string{"a h s", "b i s", "c j s"}, limits: batch.Limits{PerServer: 1, PerHost: 2}, want: 300 * second, binds: "s's limits.per_server, 1 disks at once, binds it"},
		{name: "rate", jobs: []string{"a", "b", "c", "d"}, limits: batch.Limits{Rate: 2 * mib}, want: 200 * second, binds: "limits.rate, 2.0 MiB/s, binds it"},
		// 32 MiB are 8 connections of 4 MiB: two copies with 4 each.
		{name: "fixed connections", jobs: []string{"a h", "b h", "c h", "d h"}, each: batch.Expected{Connections: 4, Fixed: true, Buffers: 4 * mib},
			want: 200 * second, binds: "h's limits.nfc_buffer, 32.0 MiB, binds it"},
		// Or two each, at half the rate.
		{name: "connections that adapt", jobs: []string{"a h", "b h", "c h", "d h"}, each: batch.Expected{Connections: 4, Buffers: 4 * mib},
			want: 200 * second, binds: "h's limits.nfc_buffer, 32.0 MiB, binds it"},
		{name: "room for all", jobs: []string{"a h", "b h"}, each: batch.Expected{Connections: 4, Buffers: 4 * mib}, want: 100 * second, binds: "each disk's own rate binds it"},
		{name: "less than one has room", jobs: []string{"a h", "b h"}, each: batch.Expected{Connections: 1, Buffers: 4 * mib}, limits: batch.Limits{NFCBuffer: mib},
			want: 200 * second, binds: "h's limits.nfc_buffer, 1.0 MiB, binds it"},
		{name: "few connections", jobs: []string{"a h", "b h"}, each: batch.Expected{Connections: 2, Buffers: mib}, limits: batch.Limits{Connections: 2},
			want: 200 * second, binds: "h's limits.connections, 2, binds it"},
		{name: "a server's budget", jobs: []string{"a - s", "b - s"}, each: batch.Expected{Connections: 2, Buffers: mib}, limits: batch.Limits{Connections: 2},
			want: 200 * second, binds: "s's limits.connections, 2, binds it"},
		{name: "hosts have their own", jobs: []string{"a h", "b i"}, each: batch.Expected{Connections: 2, Buffers: mib}, limits: batch.Limits{Connections: 2}, want: 100 * second, binds: "each disk's own rate binds it"},
		{name: "a slow host", jobs: []string{"a h", "b h", "c i"}, reached: batch.Reached{ByHost: map[string]float64{"host h": mib / 2}},
			want: 400 * second, binds: "what h gives to several disks at once, 512.0 KiB/s, binds it"},
		{name: "a slow disk here", jobs: []string{"a", "b"}, reached: batch.Reached{ByHost: map[string]float64{"": mib}}, want: 200 * second, binds: "what this machine gives to several disks at once, 1.0 MiB/s, binds it"},
		{name: "a slow network", jobs: []string{"a h", "b i"}, reached: batch.Reached{All: mib}, limits: batch.Limits{Rate: 2 * mib}, want: 200 * second, binds: "what all hosts together give this machine, 1.0 MiB/s, binds it"},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := newFake(t, strings.ReplaceAll(jobsOf(c.jobs...), `"host":"-",`, "")) // no host, but a server
			var all []batch.Expected
			for _, j := range f.file.Jobs {
				e := c.each
				e.Job, e.Bytes, e.Size, e.Rate = j, 100*mib, -1, mib
				all = append(all, e)
			}
			e := batch.Estimate(all, c.limits, c.reached)
			if e.Time.Round(second) != c.want || e.Binds != c.binds || e.Last == nil {
				t.Errorf("%s, %s; want %s, %s", e.Time, e.Binds, c.want, c.binds)
			}
		})
	}
	f := newFake(t, jobsOf("a h", "b h"))
	e := batch.Expected{Job: f.file.Jobs[0], Bytes: mib, Rate: mib, Connections: 4, Buffers: 4 * mib}
	other := e
	other.Job, other.Fixed = f.file.Jobs[1], true
	if got := batch.Opening([]batch.Expected{e, other}, batch.Limits{NFCBuffer: 8 * mib}); len(got) != 1 || got[0].Job != e.Job || got[0].Rate != mib/4 {
		t.Errorf("begins with %+v", got)
	}
	if e := batch.Estimate(nil, batch.Limits{}, batch.Reached{}); e.Last != nil {
		t.Errorf("of nothing: %+v", e)
	}
}

// Which job ends last is told, by the order in which Run starts them.
func TestEstimateNamesTheLast(t *testing.T) {
	f := newFake(t, jobsOf("a", "b", "c"))
	all := func(size bool) (all []batch.Expected) {
		for i, j := range f.file.Jobs {
			e := batch.Expected{Job: j, Bytes: int64(i+1) << 20, Size: -1, Rate: 1 << 20}
			if size {
				e.Size = e.Bytes
			}
			all = append(all, e)
		}
		return all
	}
	for _, c := range []struct {
		sizes         bool
		opening, last string
		want          time.Duration
	}{{false, "ab", "c", 4 * time.Second}, {true, "cb", "a", 3 * time.Second}} {
		limits := batch.Limits{Total: 2}
		opening := ""
		for _, j := range batch.Opening(all(c.sizes), limits) {
			opening += j.Job.Name
		}
		if e := batch.Estimate(all(c.sizes), limits, batch.Reached{}); opening != c.opening || e.Last.Name != c.last || e.Time != c.want {
			t.Errorf("sizes %v: begins with %s, %+v", c.sizes, opening, e)
		}
	}
}
