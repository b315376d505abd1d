package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	sinkraw "github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/source/raw"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

type copyCommand struct {
	Src string `arg:"" name:"SRC" help:"The disk to copy: a VMDK, a qcow2, a raw file, a block device, a disk of an appliance (x.ova#1), an NBD URI, a disk on a host ([DATASTORE] DIR/DISK.vmdk), vddk:PATH, or - for standard input."`
	Dst string `arg:"" name:"DST" help:"Where to: a new file (x.qcow2 and x.vmdk say its format), a block device, an NBD URI, - for standard output, or null: to only read."`
	copyFlags

	at addresses `kong:"-"` // by checkAddresses
}

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

func (c *copyCommand) Run(ctx context.Context, logs *logFlags) error {
	counters := new(progress.Counters)
	style := progressStyle(c.Progress)
	display := progress.NewDisplay(style, displayOutput, c.Src, counters)
	asJSON := style == progress.JSON
	outputs := c.outputs(logs)
	if err := outputs.check(); err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	log, closeLog, err := logs.open(display, asJSON)
	if err != nil {
		return &usageError{err: err}
	}
	j := c.newJob(log, counters)
	j.outputs = outputs
	j.pause = pauseOf(display)
	c.secrets.pause = j.pause
	err = shown(display, func() error { return j.do(ctx) })
	if c.Report != "" {
		// What failed may have been opened before the outputs were checked.
		reported := outputs.checkOpened(j.opener, j.backings)
		if reported == nil {
			err = errors.Join(err, writeReport(j.report, c.Report))
		} else if !errors.As(err, new(*outputError)) {
			err = errors.Join(err, reported)
		}
	}
	if closed := closeLog(); closed != nil && err == nil {
		err = fmt.Errorf("log file: %w", closed)
	}
	if err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	return nil
}

// outputs are the files that the copy writes besides DST.
func (c *copyCommand) outputs(logs *logFlags) *outputs {
	o := new(outputs)
	o.add("--report", c.Report)
	o.add("--log-file", logs.LogFile)
	o.addOwn("--journal", c.Journal)
	if c.checkAddresses() == nil { // else the copy fails before it opens anything
		c.sourceFlags.protect(o, "SRC", c.at.source)
		o.protectTarget("DST", c.at.target)
	}
	if c.Backing != "" {
		if path, err := c.backingPath(); err == nil {
			o.protect("the backing", path)
		}
	}
	return o
}

// writeReport writes the report of one copy: JSON, or a page for people.
func writeReport(r *report.Report, path string) error {
	if isPage(path) {
		return batch.Single(r).Write(path)
	}
	return r.Write(path)
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

// progressStyle is what --progress asks for.
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

// shown runs work while the display shows it.
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

// addresses are the parsed addresses of a copy. backing is nil without --backing.
type addresses struct{ source, target, backing address.Address }

// checkAddresses parses the addresses of the copy, once.
func (c *copyCommand) checkAddresses() (err error) {
	if c.at.target != nil {
		return nil
	}
	var at addresses
	if at.source, err = address.Parse(c.Src, address.Source); err != nil {
		return err
	}
	if at.target, err = address.Parse(c.Dst, address.Target); err != nil {
		return err
	}
	if c.Backing != "" {
		if at.backing, err = address.Parse(c.Backing, address.Disk); err != nil {
			return fmt.Errorf("--backing: %w", err)
		}
		if address.IsRemote(at.backing) {
			return &usageError{err: fmt.Errorf("--backing: %s: a qcow2 overlay names a file as its backing", c.Backing), hint: "a file of that name is ./" + c.Backing}
		}
	}
	c.at = at
	return nil
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

// backingPath returns the path of --backing, which a relative one starts from the
// folder of DST for.
func (c *copyCommand) backingPath() (string, error) {
	if filepath.IsAbs(c.Backing) {
		return c.Backing, nil
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(c.Dst))
	if err != nil {
		return "", fmt.Errorf("the folder of %s: %w", c.Dst, err)
	}
	return dir + "/" + c.Backing, nil
}

// openBacking opens the disk of --backing, which a reader of the target will
// find by the same name. It fills in its format where that was not said.
func (j *job) openBacking(ctx context.Context) (done func(), err error) {
	if j.Backing == "" {
		return func() {}, nil
	}
	path, err := j.backingPath()
	if err != nil {
		return nil, err
	}
	d, err := j.backings.Open(ctx, path, j.BackingFormat)
	if err != nil {
		return nil, fmt.Errorf("--backing: %w", err)
	}
	if i, ok := source.Ability[source.Described](d); ok && j.BackingFormat == "" {
		j.BackingFormat = i.Info().Format
	}
	if w, ok := source.Ability[sourceopen.Warned](d); ok {
		for _, message := range w.Warnings() {
			j.warn(message)
		}
	}
	j.backing = d
	if j.overlaid, err = describeBacking(ctx, d, path, j.BackingFormat); err != nil {
		return nil, errors.Join(fmt.Errorf("--backing: %w", err), d.Close())
	}
	return func() { d.Close() }, nil
}

// reopenBacking opens what --backing names now.
func (j *job) reopenBacking(ctx context.Context) (source.Disk, error) {
	path, err := j.backingPath()
	if err != nil {
		return nil, err
	}
	return j.backings.Open(ctx, path, j.BackingFormat)
}

// describeBacking says which disk the backing at path is.
func describeBacking(ctx context.Context, d source.Disk, path, format string) (*journal.Backing, error) {
	b := &journal.Backing{Format: format}
	var err error
	if b.Identity, b.Proof, err = identify(ctx, d); err != nil {
		return nil, err
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return nil, err
	}
	b.Path, err = filepath.Abs(path)
	return b, err
}

// patience is how long a copy waits for the extents before it begins to read:
// on a server each query takes a while.
func (j *job) patience() time.Duration {
	if address.IsRemote(j.at.source) && !j.DryRun {
		return 100 * time.Millisecond
	}
	return math.MaxInt64
}

func (j *job) runStream(ctx context.Context) error {
	switch {
	case j.SourceFormat != "" && j.SourceFormat != "raw":
		return &usageError{err: fmt.Errorf("standard input is a raw stream, not %s: save it in a file first", j.SourceFormat)}
	case j.DryRun:
		return &usageError{err: errors.New("--dry-run can't look into standard input")}
	case j.Reflink == "always":
		return &usageError{err: errors.New("--reflink always: a stream on standard input has no blocks to share")}
	}
	size := int64(sink.UnknownSize)
	if j.Size != nil {
		size = int64(*j.Size)
		j.report.VirtualSize = size
	}
	closeBacking, err := j.openBacking(ctx)
	if err != nil {
		return err
	}
	defer closeBacking()
	if err := j.outputs.checkOpened(j.opener, j.backings); err != nil {
		return err
	}
	target, err := sinkopen.PlaceOf(j.at.target).Plan(ctx, size, j.targetOptions(0, j.warn))
	if err != nil {
		return err
	}
	j.report.Format, j.report.Transport, j.report.ExtentsSource = target.Format, "stream", "full"
	if err := j.verifiable(target); err != nil {
		return err
	}
	reading, interrupt := context.WithCancelCause(ctx)
	defer interrupt(nil)
	stream, err := j.openStream(reading, size)
	if err != nil {
		return err
	}
	dst, err := target.Create(ctx)
	if err != nil {
		return err
	}
	o := j.options()
	o.Interrupt = interrupt
	j.result, err = transfer.CopyStream(ctx, stream, size, dst, o)
	if err == nil {
		j.report.VirtualSize = j.result.Size
	}
	return err
}

// openStream returns standard input, a disk of size bytes, and waits for its
// first bytes. An empty stream is an error unless the size says so: a command
// that failed leaves one behind.
func (j *job) openStream(ctx context.Context, size int64) (io.Reader, error) {
	stdin := raw.Stream(ctx, os.Stdin)
	if size == 0 {
		return stdin, nil
	}
	const name = "standard input"
	if j.SourceFormat == "raw" {
		b := bufio.NewReader(stdin)
		if _, err := b.Peek(1); errors.Is(err, io.EOF) {
			return nil, emptyStream(fmt.Errorf("%s: %w", name, sourceopen.ErrEmptyStream))
		}
		return b, nil
	}
	r, luks, err := sourceopen.RawStream(stdin, name)
	if luks {
		j.warn(name + " is encrypted (LUKS): it is taken as it is, and only its passphrase opens the copy")
	}
	return r, emptyStream(err)
}

// emptyStream adds to the error of an empty stream what the user can do.
func emptyStream(err error) error {
	if errors.Is(err, sourceopen.ErrEmptyStream) {
		return &hintedError{err, "--size 0 takes it for a disk of 0 bytes"}
	}
	return err
}

// verifiable refuses --verify where nothing can be read back.
func (j *job) verifiable(target *sinkopen.Target) error {
	if j.Verify && (target.Kind == "stream" || target.Kind == "null") {
		return &usageError{
			err:  fmt.Errorf("--verify: %s can't be read back", target.Address),
			hint: "--digest tells what was written, to be compared on the other side",
		}
	}
	return nil
}

// verifyManifest holds a disk of an appliance against the manifest, with
// --verify: before the copy, which need not begin when the appliance is damaged.
func (j *job) verifyManifest(ctx context.Context, src source.Disk) error {
	m, ok := source.Ability[sourceopen.Manifest](src)
	if !j.Verify || !ok {
		return nil
	}
	j.counters.Enter(progress.Verify)
	err := m.VerifyManifest(ctx)
	if errors.Is(err, sourceopen.ErrNoManifest) {
		j.warn(fmt.Sprintf("the source can't be verified, only the copy of it: %v", err))
		return nil
	}
	if err != nil {
		return fmt.Errorf("verify the source: %w", err)
	}
	j.log.Debug("the manifest agrees")
	return nil
}

// describeSource fills in what the report says of the source.
func (j *job) describeSource(src source.Disk, plan *transfer.Plan) {
	j.report.Transport, j.report.Connections = "file", 1
	j.report.ExtentsSource = "map"
	if plan.Data == plan.Size {
		j.report.ExtentsSource = "full"
	}
	if w, ok := source.Ability[sourceopen.Warned](src); ok {
		for _, message := range w.Warnings() {
			j.warn(message)
		}
	}
	if d, ok := source.Ability[source.Described](src); ok {
		info := d.Info()
		if what := namedLike(j.at.source); info.Format == "raw" && j.SourceFormat == "" && what != "" {
			j.warn(fmt.Sprintf("%s is named like %s and is none: it is copied as a raw disk (--source-format raw says that this is right)", j.Src, what))
		}
		j.log.Debug("source", "format", info.Format, "subformat", info.Subformat, "size", src.Size(), "chain", strings.Join(info.Chain, " <- "))
	}
	j.log.Debug("plan", "data", plan.Data, "zero", plan.Zero, "extents", plan.Extents)
}

// warnOfSectors warns where the disk has sectors of more than 512 bytes and the
// target cannot record them: a guest that is given others finds no partitions.
func (j *job) warnOfSectors(target *sinkopen.Target) {
	n := j.info.GuestSector
	if n <= 512 || target.Format == "vmdk" || target.Kind == "null" {
		return
	}
	j.warn(fmt.Sprintf("%s has sectors of %d bytes, which a %s cannot record: give its guest a disk with sectors of that size (libvirt: <blockio logical_block_size='%d'/>)", j.Src, n, target, n))
}

// flatExtent is how VMware calls the files that hold nothing but a disk's
// bytes: vm-flat.vmdk, vm-f001.vmdk.
var flatExtent = regexp.MustCompile(`(?i)-(flat|f[0-9]{3,})\.vmdk$`)

// namedLike says what the name of a local source promises, "" for a disk of any
// kind. A fixed VHD that is cut has nothing else that tells it from a raw disk.
func namedLike(a address.Address) string {
	path := a.String()
	if address.IsRemote(a) || flatExtent.MatchString(path) {
		return ""
	}
	switch strings.ToLower(filepath.Ext(path)) {
	case ".vmdk":
		return "a VMDK"
	case ".qcow2", ".qcow":
		return "a qcow2 image"
	case ".vhd":
		return "a VHD"
	case ".vhdx":
		return "a VHDX"
	case ".vdi":
		return "a VirtualBox image"
	case ".gz", ".xz", ".zst", ".bz2", ".lz4":
		return "a compressed file"
	case ".zip", ".7z", ".tar", ".tgz":
		return "an archive"
	}
	return ""
}

// clusterSize is that of a qcow2 target, in bytes.
func (j *job) clusterSize() int64 {
	if j.ClusterSize != nil {
		return int64(*j.ClusterSize)
	}
	return sinkopen.DefaultClusterSize
}

// targetOptions are what the flags say of the target, which will take need
// bytes.
func (j *job) targetOptions(need int64, warn func(string)) sinkopen.Options {
	cluster := int64(0)
	if j.ClusterSize != nil {
		cluster = int64(*j.ClusterSize)
	}
	return sinkopen.Options{
		Options: sink.Options{Info: j.info, Backing: j.backing}, BackingName: j.Backing, BackingFormat: j.BackingFormat,
		Format: j.Format, Compress: j.Compress, ClusterSize: cluster,
		Force: j.Force, Preallocation: sinkraw.Preallocation(j.Preallocation),
		TargetIsZero: j.TargetIsZero, DropCache: j.drop(need), Need: need,
		Source: j.uses, Warn: warn, NBD: client.Options{Connections: int(j.Connections), Timeout: time.Duration(j.Timeout)},
	}
}

// uses returns the name of the file that is read, if fi is one.
func (j *job) uses(fi os.FileInfo) (path string, ok bool) {
	if path, ok = j.opener.Uses(fi); !ok {
		path, ok = j.backings.Uses(fi)
	}
	return path, ok
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

// drop says whether a copy of n bytes is kept out of the page cache.
func (j *job) drop(n int64) bool {
	if j.Cache != "" {
		return j.Cache == "drop"
	}
	var memory unix.Sysinfo_t
	if err := unix.Sysinfo(&memory); err != nil {
		return false
	}
	return n > int64(memory.Totalram)*int64(memory.Unit)/4
}

func (j *job) printPlan(w io.Writer, plan *transfer.Plan, shared int64, target *sinkopen.Target) error {
	text := fmt.Sprintf("source: %s\ntarget: %s (%s)\nsize: %d bytes (%s)\nto copy: %d bytes (%s) in %d extents\n",
		printable.Name(j.Src), printable.Name(j.Dst), target, plan.Size, bytesize.Format(plan.Size), plan.Data, bytesize.Format(plan.Data), plan.Extents)
	if shared > 0 {
		text += fmt.Sprintf("of these shared: %d bytes (%s)\n", shared, bytesize.Format(shared))
	}
	holes := plan.Zero + plan.Inherited
	defer j.pause()()
	_, err := fmt.Fprintf(w, "%sholes: %d bytes (%s)\n", text, holes, bytesize.Format(holes))
	return err
}
