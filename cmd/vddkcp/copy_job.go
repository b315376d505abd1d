package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// job is one copy under way.
type job struct {
	*copyCommand
	log      *slog.Logger
	result   transfer.Result // of the copy, as far as it came
	report   *report.Report
	counters *progress.Counters
	opener   *sourceopen.Opener
	source   source.Disk        // nil until it is open
	info     source.Info        // of the source, where it has one
	backings *sourceopen.Opener // of the backing
	backing  source.Disk        // of the target; nil: none
	overlaid *journal.Backing   // what the backing is; nil: none
	limit    *transfer.Limiter
	stdout   io.Writer     // of --dry-run
	pause    func() func() // takes the display off the terminal until what it returns is called
	need     int64         // bytes that the target will take, once that is planned
	warning  sync.Mutex
	retried  bool // who runs this copy tries again what may pass
	// whole is called with the mark of the target's file before that gets its
	// final name; nil: not.
	whole   func(mark string)
	outputs *outputs // that the files that are read must not be among; nil: none

	resumption resumption
}

// newJob returns a copy as the flags say, which tells log what happens, and
// counters how far it is.
func (c *copyCommand) newJob(log *slog.Logger, counters *progress.Counters) *job {
	j := &job{
		copyCommand: c, log: log, counters: counters,
		report: report.New(c.Src, c.Dst),
		opener: c.opener(), backings: c.opener(), stdout: textOutput,
		pause: noPause,
	}
	j.backings.SingleLink = false // that is said of SRC
	if c.RateLimit > 0 {
		j.limit = transfer.NewLimiter(int64(c.RateLimit))
	}
	j.opener.NBD.Connections, j.opener.NBD.Warn = int(c.Connections), j.warn
	v := &j.opener.VDDK.Options
	v.Connections, v.RequestSize, v.Depth, v.Log, v.Warn = int(c.Connections), int(c.RequestSize), c.Depth, log, j.warn
	j.opener.Retry.OnRetry = retryNotices(log)
	return j
}

// do copies, and fills in the report. Its error is one to be shown.
func (j *job) do(ctx context.Context) error {
	err := j.canGoOn(j.run(ctx))
	j.countSource(err)
	var resumable *transfer.ResumableError
	if errors.As(err, &resumable) {
		advice := fmt.Sprintf("with --resume the copy goes on at byte %d, where it stopped", resumable.Offset)
		if why := report.Of(err).Hint; why != "" {
			advice = why + "; then " + advice
		}
		err = &hintedError{err, advice}
	}
	if err != nil {
		// Most errors name the source already.
		if !strings.Contains(err.Error(), j.Src) {
			err = fmt.Errorf("copy %s: %w", j.Src, err)
		}
	}
	j.endReport(err)
	if d := j.result.Digest; err == nil && d != nil {
		j.log.Info("digest", d.Algorithm, d.Value)
	}
	return err
}

func (j *job) endReport(err error) {
	counts := j.result.Counts
	if counts == (progress.Snapshot{}) {
		counts = j.counters.Snapshot()
	}
	j.report.Count(counts)
	if j.result.Verify.Status != "" {
		j.report.Verify = j.result.Verify
	}
	j.report.Digest = j.result.Digest
	if end := j.report.EndWith(err); end.Done() && j.DryRun {
		j.report.End(report.StatusSkipped, end.Exit)
	}
}

// warn is called concurrently, by the connections.
func (j *job) warn(message string) {
	j.log.Warn(message)
	j.warning.Lock()
	defer j.warning.Unlock()
	j.report.Warnings = append(j.report.Warnings, message)
}

func (j *job) run(ctx context.Context) error {
	if err := j.checkAddresses(); err != nil {
		return err
	}
	if _, ok := j.at.source.(address.Stream); ok {
		return j.runStream(ctx)
	}
	if j.Size != nil {
		return &usageError{err: fmt.Errorf("--size is for a stream on standard input, and %s has its own", j.Src)}
	}
	if err := j.prepareResume(); err != nil {
		return err
	}
	// What is copied can go on later if it is finished in order, and a signal
	// leaves it time for that: to what is read until the grace is over, to the
	// target a while longer.
	reading, work := ctx, ctx
	if j.resumption.path != "" {
		var endReading, endWork context.CancelFunc
		reading, endReading = drain(ctx, grace)
		defer endReading()
		work, endWork = drain(ctx, grace+checkpointGrace)
		defer endWork()
	}
	src, err := j.opener.OpenAddress(reading, j.at.source, j.SourceFormat)
	if err != nil {
		return err
	}
	defer src.Close()
	j.source = src
	j.report.VirtualSize = src.Size()
	if d, ok := source.Ability[source.Described](src); ok {
		j.info = d.Info()
	}
	closeBacking, err := j.openBacking(reading)
	if err != nil {
		return err
	}
	defer closeBacking()
	if err := j.outputs.checkOpened(j.opener, j.backings); err != nil {
		return err
	}
	if err := j.sameSize(src); err != nil {
		return err
	}
	if err := j.resumable(ctx, src); err != nil {
		return err
	}
	// First without the space it takes: what can be refused at once is.
	target, err := sinkopen.PlaceOf(j.at.target).Plan(ctx, src.Size(), j.resumption.resumeOptions(j.targetOptions(0, nil)))
	if err != nil {
		return otherTarget(err)
	}
	plan, err := transfer.NewPlanWithin(ctx, src, j.patience(), j.counters)
	if err != nil {
		return err
	}
	if id := plan.Identity(); id != j.resumption.copy.Source {
		return fmt.Errorf("%w: it was %s, it is %s", transfer.ErrSourceChanged, j.resumption.copy.Source, id)
	}
	if plan.Inherited > 0 && j.backing == nil {
		return &usageError{
			err:  fmt.Errorf("--single-link: %s has %d bytes that only its parents have, and a target without --backing can't say so", j.Src, plan.Inherited),
			hint: "without --single-link they are read from the parents",
		}
	}
	j.describeSource(src, plan)
	shared, err := transfer.Shared(ctx, src, plan, reflinks[j.Reflink], target.CloneUnit)
	if errors.Is(err, transfer.ErrNotShared) {
		return &hintedError{err, "--reflink auto shares what it can and copies the rest"}
	}
	if err != nil {
		return err
	}
	need := plan.Data - shared
	j.need = need
	if entries := j.resumption.entries; len(entries) > 0 {
		j.need = min(need, plan.DataFrom(entries[0].Offset))
	}
	planTarget := func() (*sinkopen.Target, error) {
		return sinkopen.PlaceOf(j.at.target).Plan(work, src.Size(), j.resumption.resumeOptions(j.targetOptions(need, j.warn)))
	}
	if target, err = planTarget(); err != nil {
		return err
	}
	j.report.Format = target.Format
	j.warnOfSectors(target)
	if err := j.verifiable(target); err != nil {
		return err
	}
	if j.DryRun {
		if err := target.Check(ctx); errors.Is(err, errors.ErrUnsupported) {
			j.warn(fmt.Sprintf("the target is not checked: %v", err))
		} else if err != nil {
			return err
		}
		return j.printPlan(j.stdout, plan, shared, target)
	}
	if j.drop(need) {
		if u, ok := source.Ability[source.Uncached](src); ok {
			u.ReadUncached()
		}
	}
	if err := j.verifyManifest(ctx, src); err != nil {
		return err
	}
	dst, err := j.openTarget(work, src, target, planTarget)
	if err != nil {
		return err
	}
	o := j.options()
	o.Requests = requests(j.Depth, src)
	if c, ok := sink.Ability[sink.Connected](dst); ok {
		// A read becomes a write to a target that takes them at once.
		o.Requests = max(o.Requests, j.Depth*c.Connections())
	}
	ended, err := j.keep(ctx, dst, &o)
	if err != nil {
		return errors.Join(err, j.giveUp(dst))
	}
	if target.Kind == "NBD export" {
		o.Reopen = func(ctx context.Context, state []byte, resume int64) (sink.Disk, error) {
			to := j.targetOptions(need, nil)
			to.State, to.Resume, to.Identity = state, resume, j.resumption.copy.Identity
			t, err := sinkopen.PlaceOf(j.at.target).Plan(ctx, src.Size(), to)
			if err != nil {
				return nil, err
			}
			return t.Create(ctx)
		}
		o.Lost = j.opener.Retry
		o.Lost.OnRetry = func(err error, wait time.Duration) {
			j.log.Warn("the target is opened again, from the last checkpoint on", "wait", wait.Round(time.Millisecond), "error", err)
		}
	}
	j.result, err = transfer.Copy(work, src, dst, plan, o)
	return ended(err)
}

func (j *job) options() transfer.Options {
	o := transfer.Options{
		RequestSize: int(j.RequestSize), Requests: j.Depth, Reflink: reflinks[j.Reflink],
		Digest: digest.Algorithm(j.Digest), Verify: j.Verify, Counters: j.counters, Backing: j.backing, Limit: j.limit,
	}
	if j.whole != nil {
		o.Whole = func() { j.whole(fileid.MarkOf(j.resumption.place.Partial)) }
	}
	if j.overlaid != nil {
		o.BackingIdentity = j.overlaid.Identity
		o.ReopenBacking = j.reopenBacking
	}
	if j.Sparse != nil {
		o.Sparse, o.KeepZeros = int64(*j.Sparse), *j.Sparse == 0
	}
	return o
}
