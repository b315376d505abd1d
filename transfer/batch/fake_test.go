package batch_test

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// errStop is the cause of a context that a signal has ended.
var errStop = stopped{}

type stopped struct{}

func (stopped) Error() string   { return "stopped" }
func (stopped) ExitStatus() int { return 130 }

// fake is a batch whose copies only pretend to copy.
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

// fate says how an attempt at a copy ends.
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

// newFake returns a batch with a job file. The argument has all members of the file
// except the version.
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

// fakeRunner is the Runner of a job of a fake.
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

// run runs the batch with its state file. It returns an error if the batch cannot
// start.
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

// mustRun calls run in a synctest bubble, whose clock jumps, until f.stop is called.
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

// jobsOf returns the jobs array of a job file. Each line is NAME, NAME HOST or NAME
// HOST SERVER.
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
