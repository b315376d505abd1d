package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// batchCommand is vddkcp run, which runs a batch of copies. docs/cli.md describes it.
type batchCommand struct {
	Jobs string `arg:"" name:"JOBS" optional:"" help:"Path of the job file, which is JSON, or \"-\" to read the job file from standard input."`

	Only     []string          `help:"Run only the jobs with these names (repeatable)." placeholder:"NAME,..." group:"Which jobs:"`
	Label    map[string]string `help:"Run only the jobs that have this label (repeatable: jobs must have all of the labels)." placeholder:"KEY=VALUE" group:"Which jobs:"`
	Shard    string            `help:"Divide the jobs into N shards by a hash of their names, and run only the jobs of shard I. Shards are numbered from 0." placeholder:"I/N" group:"Which jobs:"`
	Resume   bool              `help:"Continue an earlier run: skip the jobs that are done according to the state file, and continue the others." group:"Which jobs:"`
	State    string            `help:"Path of the state file, which records which jobs are done (default: JOBS.state.json, or with --shard JOBS.state.I-of-N.json)." placeholder:"FILE" type:"path" group:"Which jobs:"`
	Parallel int               `help:"Number of disks to copy at the same time, instead of limits.total in the job file." placeholder:"N" group:"Which jobs:"`

	Report       []string       `help:"Write a report of all jobs to this file, every 10 s while they run and at the end (repeatable): an HTML page if the name ends in .html, JSON otherwise." placeholder:"FILE" type:"path" sep:"none" group:"Report:"`
	Metrics      string         `help:"Write metrics to this file, every 10 s and at the end, for the textfile collector of the Prometheus node exporter. The name must end in .prom." placeholder:"FILE.prom" type:"path" group:"Report:"`
	Status       bool           `help:"Run no jobs, but print the state of a batch that another process runs. JOBS is its job file or its state file." group:"Report:"`
	JSON         bool           `name:"json" help:"With --status: print JSON." group:"Report:"`
	MergeReports string         `help:"Run no jobs, but merge the reports in this folder into one report. If a job file is given, merge only the reports of its jobs." placeholder:"DIR" type:"path" group:"Report:"`
	LogDir       string         `help:"Write a complete log of each job into this folder." placeholder:"DIR" type:"path" group:"Report:"`
	Progress     string         `help:"How to show progress: auto, bar, json or none." enum:"auto,bar,json,none" default:"auto" group:"Report:"`
	Check        bool           `help:"Open all sources and check all targets, but copy nothing." group:"Report:"`
	Probe        *bytesize.Size `help:"With --check: read this number of bytes from each disk, and estimate how long the batch will take." placeholder:"SIZE" group:"Report:"`
	Schema       bool           `help:"Print the JSON Schema of job files." group:"Report:"`

	logs *logFlags // set by Run
}

// batchError is the error of a batch with an exit status other than 0.
type batchError struct {
	message, hint string
	exit          int
}

func (e *batchError) Error() string { return e.message }
func (e *batchError) Hint() string  { return e.hint }

// ExitStatus returns the exit status for the error. Package report calls this method.
func (e *batchError) ExitStatus() int { return e.exit }

// Validate checks combinations of flags. The package kong calls it.
func (c *batchCommand) Validate() error {
	switch {
	case c.Jobs == "" && !c.Schema && c.MergeReports == "":
		return errors.New("no job file is given: want the path of a job file, or \"-\" for standard input")
	case c.JSON && !c.Status:
		return errors.New("--json needs --status; for the progress of a run as JSON, use --progress json")
	case c.Status && (c.Check || c.MergeReports != ""):
		return errors.New("--status cannot be combined with --check or --merge-reports")
	case c.Probe != nil && !c.Check:
		return errors.New("--probe needs --check")
	case c.Probe != nil && *c.Probe == 0:
		return errors.New("--probe: with 0 bytes nothing would be read: want 1 or more bytes")
	case c.Parallel < 0 || c.Parallel > 1000:
		return fmt.Errorf("--parallel: %d: want 1 to 1000 disks", c.Parallel)
	}
	return checkMetrics(c.Metrics)
}

func (c *batchCommand) Run(ctx context.Context, logs *logFlags, secrets *secretEnvironment, servers *servers, commands *spawned, notice *stopping, service *service) error {
	c.logs = logs
	parser, err := newJobParser(servers)
	if err != nil {
		return err
	}
	switch {
	case c.Schema:
		spec, err := parser.spec()
		if err != nil {
			return err
		}
		_, err = textOutput.Write(batch.Schema(spec))
		return err
	case c.MergeReports != "":
		return c.merge(ctx, parser)
	case c.Status:
		return c.printStatus(ctx, parser)
	}
	file, jobs, err := c.load(ctx, parser)
	if err != nil {
		return err
	}
	outputs, err := c.outputs(logs, file, parser)
	if err != nil {
		return err
	}
	if err := c.makeLogDir(); err != nil {
		return usage.Wrap(err)
	}
	style, asJSON := logs.style(c.Progress)
	if c.Check {
		style = progress.None
	}
	b := &batchRun{
		batchCommand: c, file: file, parser: parser, asJSON: asJSON,
		display:  progress.NewBatchDisplay(displayTo(style), len(jobs)),
		commands: commands, servers: servers, service: service, outputs: outputs, refused: map[string]bool{},
	}
	if file.Limits.Rate > 0 {
		b.limit = transfer.NewLimiter(file.Limits.Rate)
	}
	notice.over(b.display, asJSON, readsOf(b.display))
	log, closeLog, err := logs.open(b.display, b.asJSON)
	if err != nil {
		return usage.Wrap(err)
	}
	b.log = log
	spec, err := parser.spec()
	if err != nil {
		return err
	}
	b.texts = newJobTexts(spec)
	servers.serveBatch(file.Limits, log)
	for _, w := range file.Warnings {
		log.Warn(w)
	}
	b.assignSecrets(secrets)
	if c.Check {
		err = b.check(ctx, jobs)
	} else {
		err = b.run(ctx, jobs)
	}
	if closed := closeLog(); closed != nil && err == nil {
		err = fmt.Errorf("log file: %w", closed)
	}
	if err != nil {
		fail(errorOutput, b.asJSON, err)
		return &reportedError{err}
	}
	return nil
}

// The method load reads the job file, and returns the file and the jobs that the flags
// select.
func (c *batchCommand) load(ctx context.Context, parser *jobParser) (*batch.File, []*batch.Job, error) {
	file, err := parser.jobsFile(ctx, c.Jobs, c.notice)
	if ctx.Err() != nil {
		return nil, nil, context.Cause(ctx)
	}
	if err != nil {
		return nil, nil, usage.Wrap(err)
	}
	jobs, err := c.selected(file)
	if err != nil {
		return nil, nil, usage.Wrap(err)
	}
	file.Limits = file.Limits.WithDefaults()
	if c.Parallel > 0 {
		file.Limits.Total = c.Parallel
	}
	return file, jobs, nil
}

// The method notice prints a message about the progress on standard error. It is for the
// times when no progress display is shown.
func (c *batchCommand) notice(text string) {
	if c.Progress == "auto" || c.Progress == "bar" {
		c.logs.early().Info(text)
	}
}

// The method selected returns the jobs that the flags select.
func (c *batchCommand) selected(f *batch.File) ([]*batch.Job, error) {
	s := batch.Selection{Names: c.Only, Labels: c.Label}
	if c.Shard != "" {
		var err error
		if s.Shard, s.Shards, err = batch.ParseShard(c.Shard); err != nil {
			return nil, fmt.Errorf("--shard: %w", err)
		}
	}
	return f.Select(s)
}

// makeLogDir creates the folder for logs.
func (c *batchCommand) makeLogDir() error {
	if c.LogDir != "" {
		if err := os.MkdirAll(c.LogDir, 0o777); err != nil {
			return fmt.Errorf("--log-dir: %w", err)
		}
	}
	return nil
}

// The method outputs returns the files that the batch writes, except targets, journals and
// the logs of jobs. The error is an *outputError if two files that the batch writes are the
// same file, or if one of them is a file that the batch reads.
func (c *batchCommand) outputs(logs *logFlags, file *batch.File, parser *jobParser) (*outputs, error) {
	o := new(outputs)
	for _, path := range c.Report {
		o.add("--report", path)
	}
	o.add("--metrics", c.Metrics)
	o.add("--log-file", logs.LogFile)
	if state, err := c.statePath(); err == nil && !c.Check {
		for _, end := range []string{"", ".lock", ".changes", ".new", ".now", ".now.new"} {
			o.addOwn("--state", state+end)
		}
	}
	all := &outputs{list: slices.Clone(o.list), folder: c.LogDir}
	if c.Jobs == "-" {
		all.protect("the job file, standard input", standardInput)
	} else {
		all.protect("the job file", c.Jobs)
	}
	for _, p := range parser.profiles(file.Jobs) {
		all.protectProfile(p)
	}
	for _, j := range file.Jobs {
		protectJob(all, j)
		if c.LogDir != "" {
			all.addLog(fmt.Sprintf("--log-dir, the log of jobs[%d]", j.Index), c.logPath(j))
		}
	}
	return o, all.check()
}

// protectJob adds the files of a job to the files that no output may overwrite. The paths
// of these files are absolute. protectJob does not resolve symbolic links, because this
// would take long for many jobs. The method outputs.check finds files behind links anyway,
// because it compares inodes as well as paths.
func protectJob(o *outputs, j *batch.Job) {
	of := fmt.Sprintf(" of jobs[%d]", j.Index)
	o.addLater("the journal"+of, j.Text("journal")) // a missing folder is an error of this job only
	if a, err := address.Parse(j.Source, address.Disk); err == nil {
		o.protectSource("the source"+of, a)
	}
	if a, err := address.Parse(j.Target, address.Target); err == nil && !address.IsRemote(a) {
		partial := j.Target + ".partial"
		o.protect("the target"+of, j.Target)
		o.protect("the unfinished target"+of, partial)
		o.protect("the journal"+of, journal.Beside(partial))
	}
	if backing := j.Text("backing"); filepath.IsAbs(backing) {
		o.protect("the backing"+of, backing)
	} else if backing != "" {
		o.protect("the backing"+of, filepath.Join(filepath.Dir(j.Target), backing))
	}
	for _, field := range []string{"password", "cookie"} {
		if file, ok := strings.CutPrefix(j.Text(field), "+"); ok {
			o.protect("the file of the "+field+of, file)
		}
	}
}

// logPath returns the path of the log of a job, or "" without --log-dir.
func (c *batchCommand) logPath(j *batch.Job) string {
	if c.LogDir == "" {
		return ""
	}
	return filepath.Join(c.LogDir, batch.LogName(j.Name))
}

// statePath returns the path of the state file.
func (c *batchCommand) statePath() (string, error) {
	if c.State != "" {
		return c.State, nil
	}
	if c.Jobs == "-" {
		return "", usage.Errorf("a job file on standard input has no default state file: name one with --state FILE")
	}
	base := strings.TrimSuffix(c.Jobs, ".json") + ".state"
	if c.Shard != "" {
		i, n, err := batch.ParseShard(c.Shard)
		if err != nil {
			return "", err
		}
		base += fmt.Sprintf(".%d-of-%d", i, n)
	}
	return base + ".json", nil
}

// The method merge merges the reports in a folder. If a job file is given, the merged
// report has exactly the jobs of this file.
func (c *batchCommand) merge(ctx context.Context, parser *jobParser) error {
	var jobs []*batch.Job
	if c.Jobs != "" {
		var err error
		if _, jobs, err = c.load(ctx, parser); err != nil {
			return err
		}
	}
	outputs := new(outputs)
	for _, path := range c.Report {
		outputs.add("--report", path)
	}
	outputs.protect("the job file", c.Jobs)
	if err := outputs.check(); err != nil {
		return err
	}
	r, notes, err := batch.Merge(c.MergeReports, jobs)
	if err != nil {
		return err
	}
	for _, note := range notes {
		c.logs.warn(note)
	}
	reports := c.Report
	if len(reports) == 0 {
		reports = []string{"/dev/stdout"}
	}
	for _, path := range reports {
		if err := r.Write(path); err != nil {
			return err
		}
	}
	return batchEnd(r)
}

// batchEnd returns the error of a batch that has the given report. It returns nil if all
// jobs are done.
func batchEnd(r *batch.Report) error {
	if r.Exit == 0 {
		return nil
	}
	c := r.Counts
	if c.Done == len(r.Jobs) {
		return &batchError{"all jobs are done, but some of them need attention: the messages above name them", "vddkcp cleanup lists the snapshots that are still on the server", r.Exit}
	}
	e := &batchError{exit: r.Exit, hint: "run again with --resume to continue the jobs that are not done"}
	e.message = fmt.Sprintf("%d of %d jobs failed, %d are done", c.Failed, len(r.Jobs), c.Done)
	if c.Done == 1 {
		e.message = fmt.Sprintf("%d of %d jobs failed, 1 is done", c.Failed, len(r.Jobs))
	}
	if c.Failed == 0 {
		e.message = fmt.Sprintf("%d of %d jobs are done", c.Done, len(r.Jobs))
	}
	if c.Interrupted > 0 {
		e.message += fmt.Sprintf(", %d were interrupted", c.Interrupted)
	}
	if c.Skipped > 0 {
		e.message += fmt.Sprintf(", %d were not started", c.Skipped)
	}
	return e
}

// closingOfBatch returns the last line of a batch whose jobs are all done. It returns "" for other
// batches, whose error is their last line.
func closingOfBatch(r *batch.Report) string {
	if r.Exit != 0 {
		return ""
	}
	end := progress.Closing{Copied: r.Totals.BytesRead, Shared: r.Totals.BytesCloned, Took: r.Finished.Sub(r.Started)}
	if len(r.Jobs) == 1 {
		return "batch: 1 job is done: " + end.String()
	}
	return fmt.Sprintf("batch: all %d jobs are done: %s", len(r.Jobs), end)
}

// outcomeWord returns the word by which a progress.BatchDisplay counts jobs that ended in this way.
func outcomeWord(s report.Status) string {
	switch s {
	case report.StatusOK:
		return "done"
	case report.StatusInterrupted:
		return "interrupted"
	}
	return "failed"
}

// batchRun is a batch that runs or is checked.
type batchRun struct {
	*batchCommand
	file    *batch.File
	parser  *jobParser
	log     *slog.Logger
	asJSON  bool
	display *progress.BatchDisplay
	limit   *transfer.Limiter

	commands *spawned
	servers  *servers
	service  *service

	texts *jobTexts

	outputs *outputs // outputs of the whole batch, not of a single job

	checked atomic.Int64 // number of jobs that --check has checked

	mu      sync.Mutex
	refused map[string]bool // paths of outputs that are files of a source, and must not be written; guarded by mu
}

// assignSecrets lets all jobs use the secrets from environment variables. If VDDKCP_SERVER does
// not say for which server they are, and the jobs use several servers, no job gets these secrets,
// and a warning is logged.
func (b *batchRun) assignSecrets(secrets *secretEnvironment) {
	if os.Getenv("VDDKCP_SERVER") != "" {
		b.parser.environment = *secrets // a login uses them only for that server
		return
	}
	var servers []string
	for _, j := range b.file.Jobs {
		if s := j.Server(); s != "" && !slices.Contains(servers, s) {
			servers = append(servers, s)
		}
	}
	if len(servers) > 1 {
		if secrets.password.IsSet() || secrets.cookie.IsSet() {
			b.log.Warn(fmt.Sprintf("VDDKCP_PASSWORD and VDDKCP_COOKIE are ignored: they are for one server, and the jobs name %d servers", len(servers)))
		}
		return
	}
	b.parser.environment = *secrets
}

func (b *batchRun) run(ctx context.Context, jobs []*batch.Job) error {
	path, err := b.statePath()
	if err != nil {
		return err
	}
	accesses := b.expectDisks(jobs)
	defer accesses.wait()
	store, err := batch.OpenStore(path)
	if err != nil {
		if errors.Is(err, fs.ErrPermission) || errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.EROFS) {
			return usage.WithHint(err, "name another file with --state")
		}
		return usage.Wrap(err)
	}
	var whole *batch.Report
	err = shown(b.display, func() (err error) {
		whole, err = batch.Run(ctx, jobs, batch.Options{
			Limits: b.file.Limits, ContinueOnError: b.file.ContinueOnError, Resume: b.Resume, Store: store,
			Runner: b.diskJobs().Runner, Log: b.log, JobLog: b.jobLog, Spawn: b.commands.spawn,
			Ended: func(j *batch.Job, r *batch.JobReport) {
				accesses.done(j)
				b.display.Ended(outcomeWord(r.Status))
			},
			Waiting: b.display.Waiting,
			Watch: func(m *batch.Monitor) func() {
				watched := b.watch(store, m)
				served := b.service.begin(ctx, b.log, func() string {
					_, _ = b.display.Write(nil) // waits for the lock of the display, which every message needs
					return batchStatus(m.Now(), len(jobs))
				})
				return func() {
					served()
					watched()
				}
			},
		})
		if whole != nil {
			b.display.End(closingOfBatch(whole))
		}
		return err
	})
	err = errors.Join(err, store.Close())
	if whole == nil {
		return usage.Wrap(err)
	}
	for _, path := range b.Report {
		if b.isRefused(path) {
			err = errors.Join(err, fmt.Errorf("--report %s: the report is not written, because it would overwrite a file of a source", path))
			continue
		}
		err = errors.Join(err, b.named(whole).Write(path))
	}
	if b.Metrics != "" && !b.isRefused(b.Metrics) {
		err = errors.Join(err, batchMetrics(whole, b.Metrics).Write(b.Metrics))
	}
	if text := closingOfBatch(whole); text != "" && (b.Progress == "none" || b.asJSON || b.logs.LogFile != "") {
		b.log.Info(text) // the display has not shown it, or the log is in a file
	}
	if o := batchEnd(whole); o != nil {
		return errors.Join(o, err)
	}
	return err
}
