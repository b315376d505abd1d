package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/usage"
	sinkraw "github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/job"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// copyCommand is vddkcp copy, which copies one disk. docs/cli.md describes it.
type copyCommand struct {
	Src string `arg:"" name:"SRC" help:"The disk to copy: the path of a VMDK, qcow2 or raw file or of a block device, a disk of an appliance (x.ova#1), an NBD URI, a disk on a VMware host ([DATASTORE] DIR/DISK.vmdk), vddk:PATH for any disk that VDDK opens, or \"-\" for standard input."`
	Dst string `arg:"" name:"DST" help:"Where to copy the disk: a new file (a name such as x.qcow2 or x.vmdk sets the format), a block device, an NBD URI, \"-\" for standard output, or \"null:\" to read SRC without writing anything."`
	snapshotFlags
	copyFlags
}

func (c *copyCommand) Run(ctx context.Context, logs *logFlags, notice *stopping, service *service) error {
	counters := new(progress.Counters)
	style, asJSON := logs.style(c.Progress)
	display := progress.NewDisplay(displayTo(style), c.Src, counters)
	notice.over(display, asJSON, readsOf(display))
	if err := c.chooseWay(); err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	spec := c.spec()
	outputs := c.outputs(logs)
	if err := outputs.check(); err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	log, closeLog, err := logs.open(display, asJSON)
	if err != nil {
		return usage.Wrap(err)
	}
	spec.Log, spec.Counters = log, counters
	spec.Opened = func() error { return outputs.checkOpened(spec.Opener, spec.BackingOpener) }
	pause := pauseOf(display)
	c.login.pause = pause
	watched := newCopyWatch("copy", c.Metrics)
	watched.add(counters)
	end := watched.watch(ctx, log, service, display)
	var r *report.Report
	err = shown(display, func() (err error) {
		if r, err = c.run(ctx, spec, pause); report.Of(err).Done() && !c.DryRun {
			display.End(c.closing(r))
		}
		return err
	})
	watched.addRetries(r)
	written := end(err)
	if c.Report != "" {
		// The report is one of the outputs of the command, and must not overwrite a file
		// that the copy has read. The copy itself checks that no output is a file that it
		// has opened. A copy that failed may have returned before this check. Therefore the
		// check is repeated here.
		reported := spec.Opened()
		if reported == nil {
			err = errors.Join(err, writeReport(r, c.Report))
		} else if !errors.As(err, new(*outputError)) {
			err = errors.Join(err, reported)
		}
	}
	err = errors.Join(err, written)
	if closed := closeLog(); closed != nil && err == nil {
		err = fmt.Errorf("log file: %w", closed)
	}
	if err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	return nil
}

// The method run copies the disk. With --dry-run it only prints what a copy would do.
func (c *copyCommand) run(ctx context.Context, spec job.Spec, pause func() func()) (*report.Report, error) {
	a, ofVM := addressOrPath(c.Src, address.Source).(address.VM)
	switch {
	case !c.DryRun && ofVM:
		return c.copyDiskOfVM(ctx, a, spec)
	case !c.DryRun:
		return job.Run(ctx, spec)
	}
	var p *job.Planned
	var err error
	if ofVM {
		p, err = c.planDiskOfVM(ctx, a, spec)
	} else {
		p, err = job.Plan(ctx, spec)
	}
	if err != nil {
		return p.Report, err
	}
	if err := c.printPlan(p, pause); err != nil {
		err = fmt.Errorf("copy %s: %w", c.Src, err)
		p.Report.EndWith(err)
		return p.Report, err
	}
	return p.Report, nil
}

// The method closing returns the last line of a copy that is done.
func (c *copyCommand) closing(r *report.Report) string {
	switch addressOrPath(c.Dst, address.Target).(type) {
	case address.Stream:
		return "standard output: " + closingOf(r).String()
	case address.Null:
		return printable.Name(c.Src) + ": " + closingOf(r).String() + ", nothing written"
	}
	return printable.Name(c.Dst) + ": " + closingOf(r).String()
}

// closingOf returns what the last line of a copy with the given report says.
func closingOf(r *report.Report) progress.Closing {
	end := progress.Closing{
		Copied: r.BytesRead, Shared: r.BytesCloned, Earlier: r.ResumedFrom, Took: time.Duration(r.Seconds * float64(time.Second)),
		Verified: r.Verify.Status == report.VerifyOK, Places: r.PlacesAgain,
	}
	if r.Digest != nil { // data with shared blocks was read too
		end.Copied = max(0, end.Copied-end.Shared)
	}
	return end
}

// The method chooseWay decides how the source is read if it is on a server.
func (c *copyCommand) chooseWay() error {
	return c.choose(c.reads(), addressOrPath(c.Src, address.Source))
}

// The method spec returns the job.Spec of the copy that the flags describe. The caller calls
// chooseWay before, and sets the log and the counters in the result.
func (c *copyCommand) spec() job.Spec {
	s := c.addresses()
	s.SourceFormat, s.SingleLink, s.Opener, s.BackingOpener = c.SourceFormat, c.SingleLink, c.opener(), c.opener()
	s.BackingOpener.SingleLink = false // --single-link applies only to SRC
	s.Size = (*int64)(c.Size)
	s.Format, s.Force, s.Compress, s.BackingFormat = c.Format, c.Force, c.Compress, c.BackingFormat
	if c.ClusterSize != nil {
		s.ClusterSize = int64(*c.ClusterSize)
	}
	if c.Sparse != nil {
		s.Sparse, s.KeepZeros = int64(*c.Sparse), *c.Sparse == 0
	}
	s.Preallocation, s.Reflink, s.TargetIsZero, s.Verify = sinkraw.Preallocation(c.Preallocation), reflinks[c.Reflink], c.TargetIsZero, c.Verify
	s.RequestSize, s.Depth, s.Connections, s.Timeout, s.Cache = int(c.RequestSize), c.nfcDepth(c.Depth), int(c.Connections), time.Duration(c.Timeout), c.Cache
	s.Way = c.chosen.report()
	if c.RateLimit > 0 {
		s.Limit = transfer.NewLimiter(int64(c.RateLimit))
	}
	s.Resume, s.Journal, s.Digest = c.Resume, c.Journal, digest.Algorithm(c.Digest)
	return s
}

// The method addresses returns a job.Spec that contains nothing except the addresses of the
// copy. That is enough for its method Parse, which checks these addresses.
func (c *copyCommand) addresses() job.Spec {
	return job.Spec{Source: c.Src, Target: c.Dst, Backing: c.Backing}
}

// The method outputs returns the files that the copy writes in addition to DST.
func (c *copyCommand) outputs(logs *logFlags) *outputs {
	o := new(outputs)
	o.add("--report", c.Report)
	o.add("--metrics", c.Metrics)
	o.add("--log-file", logs.LogFile)
	o.add("--nfc-trace", c.NFCTrace)
	o.addOwn("--journal", c.Journal)
	src := addressOrPath(c.Src, address.Source)
	c.sourceFlags.protect(o, "SRC", src)
	if _, ofVM := src.(address.VM); ofVM {
		o.protect("the state file of the copy", stateBeside(c.Dst))
	}
	o.protectTarget("DST", addressOrPath(c.Dst, address.Target))
	spec := c.addresses()
	if c.Backing != "" {
		if path, err := spec.BackingPath(); err == nil {
			o.protect("the backing", path)
		}
	}
	return o
}

// writeReport writes the report of one copy: an HTML page if the name ends in .html, JSON
// otherwise.
func writeReport(r *report.Report, path string) error {
	if batch.IsPage(path) {
		return batch.Single(r).Write(path)
	}
	return r.Write(path)
}

// progressStyle returns the style of the display for a value of --progress.
func progressStyle(flag string) progress.Style {
	switch {
	case flag == "none":
		return progress.None
	case flag == "json":
		return progress.JSON
	case flag == "bar" || errorTerminal():
		return progress.Bar
	}
	return progress.Lines
}

// The function shown calls the function work and returns its error. While work runs, the
// display shows the progress.
func shown(display interface{ Run(done <-chan struct{}) }, work func() error) error {
	done, drawn := make(chan struct{}), make(chan struct{})
	go func() {
		display.Run(done)
		close(drawn)
	}()
	defer func() {
		close(done)
		<-drawn
	}()
	return work()
}

// printPlan prints what a copy would do, with the display of progress paused.
func (c *copyCommand) printPlan(p *job.Planned, pause func() func()) error {
	text := fmt.Sprintf("source: %s\ntarget: %s (%s)\nsize: %d bytes (%s)\nto copy: %d bytes (%s) in %d extents\n",
		printable.Name(c.Src), printable.Name(c.Dst), p.Target, p.Size, bytesize.Format(p.Size), p.Data, bytesize.Format(p.Data), p.Extents)
	if p.Shared > 0 {
		text += fmt.Sprintf("of these shared: %d bytes (%s)\n", p.Shared, bytesize.Format(p.Shared))
	}
	text += fmt.Sprintf("holes: %d bytes (%s)\n", p.Holes, bytesize.Format(p.Holes))
	text += c.planLines()
	defer pause()()
	_, err := io.WriteString(textOutput, text)
	return err
}
