// Package job copies one disk from one address to another: it opens the source, plans
// the copy, opens the target, continues an earlier copy, copies, verifies and reports.
//
// A [Spec] says what to copy. A field with the zero value stands for a default. [Run] copies.
// [Plan] opens the source, checks the target and says what Run would do, without writing anything:
//
//	r, err := job.Run(ctx, job.Spec{Source: "vm.vmdk", Target: "vm.qcow2"})
//
// Run and Plan return a report even if they fail. [report.Of] says what an error means:
// whether the copy can be resumed, and whether another try may help.
//
// The steps of a copy have a file each: open.go, plan.go, resume.go (what an
// earlier run left), target.go (create the target or open the earlier one), keep.go
// (the journal during the copy), end.go. stream.go copies standard input, which
// has no plan and cannot be resumed. publish.go gives a target its final name after a copy with
// Spec.Hold.
package job

import (
	"context"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/vddkcp/vddkcp/internal/fileid"
	"github.com/vddkcp/vddkcp/internal/grace"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	sinkraw "github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/digest"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// Spec says what is copied, to where and how. Source and Target are required. The zero value of
// every other field stands for a useful default. The flag with the same name may have another
// default, which docs/cli.md describes.
type Spec struct {
	// Source is the address of the disk that is read: a path, PATH.ova#DISK, an
	// NBD URI, a disk on a VMware host, or "-" for Stdin. If OpenDisk is set, Source may be any
	// text. It then only names the disk in the report and in messages.
	Source string
	// Target is the address of the disk that is written: a path, an NBD URI, "-" for standard
	// output, or "null:", which discards the data.
	Target string

	// OpenDisk opens the disk that is read. If it is nil, the disk is the one at the address
	// Source. The argument is the field Opener, whose options are set for this copy already, so
	// that OpenDisk can open the disk with Opener.OpenAddress. Such a disk counts as one on a
	// server. The copy closes the disk.
	OpenDisk func(context.Context, *sourceopen.Opener) (source.Disk, error)

	SourceFormat string   // "raw", "vmdk" or "qcow2"; "": found by probing
	SingleLink   bool     // read Source without its parents
	Size         *int64   // size of the disk that a stream holds, in bytes; nil: unknown
	Stdin        *os.File // the stream that the address "-" names; nil: os.Stdin
	// Opener opens Source, and BackingOpener opens Backing. If one of them is nil, an Opener
	// without options is used. Run sets those options of Opener that belong to one copy:
	// SingleLink, the number of NBD connections, the tuning of VDDK, the log and the warnings.
	// So an Opener must not be used for two copies at the same time.
	Opener, BackingOpener *sourceopen.Opener

	Format        string                // "raw", "qcow2" or "vmdk"; "": decided by the name of Target
	Force         bool                  // replace an existing file
	KeepOld       bool                  // keep an existing file under a second name, TARGET.old, and replace it
	Compress      string                // METHOD or METHOD:LEVEL; "": the format's default
	ClusterSize   int64                 // of a qcow2, bytes; 0: 64 KiB
	Backing       string                // path of the disk that a qcow2 overlay is written over; "": no overlay
	BackingFormat string                // "raw", "qcow2" or "vmdk"; "": found by probing
	Preallocation sinkraw.Preallocation // "": holes take no space
	Sparse        int64                 // runs of zeros of at least this many bytes become holes; 0: 4 KiB, or more if holes are expensive
	KeepZeros     bool                  // write zeros that the source stores as data; false: make holes of them
	Reflink       transfer.Reflink      // 0: share no blocks with the source
	TargetIsZero  bool                  // the target already reads as zeros
	Verify        bool                  // read the target back and compare it before it gets its name

	RequestSize int               // bytes read at once; 0: 1 MiB
	Depth       int               // concurrent reads on each connection; 0: 4
	Connections int               // to the server of the source; 0: chosen automatically
	Timeout     time.Duration     // limit for a request to an NBD target; 0: 2 minutes
	Limit       *transfer.Limiter // limits the bytes read per second; nil: no limit
	Cache       string            // "keep" or "drop" copied data in the page cache; "": drop it if the copy is large

	// Hold keeps the target file under its .partial name when the target is complete and durable.
	// The caller records this durably in Whole, and calls Publish later. With Hold a failed copy
	// also keeps the target if the source has changed (see transfer.Options.Hold). Targets that are
	// not files need no Publish.
	Hold    bool
	Resume  bool             // continue an earlier copy to Target, if there is one
	Journal string           // path of the journal; "": next to Target, or in the user's state folder
	Digest  digest.Algorithm // digest of the content, for the report; "": none

	// Batch says that the caller tries the copy again after a transient error. Such an error
	// then has the exit status of a copy that can be resumed, even if nothing was copied yet.
	Batch bool

	Way report.Way // how Source is read, for the report

	Log      *slog.Logger       // nil: nothing is logged
	Counters *progress.Counters // counts the progress; nil: nobody reads it
	// Opened is called when the source and the backing are open, before the target is opened.
	// If Opened returns an error, the copy ends with that error. Opened may be nil.
	Opened func() error
	// Whole is called when the target is complete and durable, before it gets its final name. The
	// argument mark identifies the file of the target (see fileid.MarkOf). It is "" if the target
	// is not a file. The journal is removed only after Whole has returned. Whole may be nil.
	Whole func(mark string)

	at addresses // set by Parse
}

// Run copies the disk. The report is never nil. After an error there is no new file at the path of
// the target. If the copy can be resumed, its data is in the .partial file next to that path. When
// ctx ends, Run finishes the reads in progress, writes a last checkpoint and returns the cause of
// ctx. From the end of ctx to the return of Run, at most ten seconds pass.
func Run(ctx context.Context, spec Spec) (*report.Report, error) {
	j := newJob(spec)
	err := j.end(j.copy(ctx))
	j.report.EndWith(err)
	return j.report, err
}

// Planned is the result of Plan. It says what Run would do.
type Planned struct {
	Report  *report.Report // with StatusSkipped, or with the error
	Target  string         // format and kind of the target, such as "raw file"; "" if it was not planned
	Size    int64          // of the disk, bytes
	Data    int64          // bytes that are not holes
	Shared  int64          // bytes of Data that source and target will share on their file system
	Holes   int64          // bytes that need not be read
	Extents int64          // runs of data and holes
	// Need is the number of bytes that a copy would write: the field Data minus the field Shared.
	// If the copy continues where an earlier run has stopped, Need does not include what that run
	// has written.
	Need int64
}

// Plan opens the source, plans the copy and checks the target. It writes nothing. The result is
// never nil. After an error it holds what Plan has found out before the error.
func Plan(ctx context.Context, spec Spec) (*Planned, error) {
	j := newJob(spec)
	j.dry = true
	err := j.end(j.check(ctx))
	if end := j.report.EndWith(err); end.Done() {
		j.report.End(report.StatusSkipped, end.Exit)
	}
	p := &Planned{Report: j.report, Size: j.report.VirtualSize, Shared: j.shared, Need: j.need}
	if j.plan != nil {
		p.Data, p.Holes, p.Extents = j.plan.Data, j.plan.Zero+j.plan.Inherited, j.plan.Extents
	}
	if j.target != nil {
		p.Target = j.target.String()
	}
	return p, err
}

// job is the state of one call of Run or Plan.
type job struct {
	Spec
	report  *report.Report
	warning sync.Mutex // guards report.Warnings
	dry     bool       // only plan, write nothing

	source  source.Disk // nil until the source is open
	info    source.Info // about the source; zero if its reader has none
	overlay overlay
	resumption

	plan   *transfer.Plan // nil until the source is planned
	shared int64          // bytes that source and target can share
	need   int64          // see Planned.Need; 0 until that is known
	target *sinkopen.Target
	dst    sink.Disk
	result transfer.Result // of the engine, complete after success
}

func newJob(spec Spec) *job {
	j := &job{Spec: spec, report: report.New(spec.Source, spec.Target)}
	j.report.Way = spec.Way
	if j.Log == nil {
		j.Log = slog.New(slog.DiscardHandler)
	}
	if j.Counters == nil {
		j.Counters = new(progress.Counters)
	}
	if j.Depth == 0 {
		j.Depth = 4
	}
	if j.Stdin == nil {
		j.Stdin = os.Stdin
	}
	j.prepareOpeners()
	return j
}

// The method copy runs all steps of a copy.
func (j *job) copy(ctx context.Context) error {
	if err := j.Parse(); err != nil {
		return err
	}
	if j.isStream() {
		return j.copyStream(ctx)
	}
	if j.KeepOld && !j.Force {
		j.keepOld()
	}
	return j.planned(ctx, func(writing context.Context) error {
		j.readUncached()
		if err := j.verifyManifest(ctx); err != nil {
			return err
		}
		if err := j.openTarget(writing); err != nil {
			return err
		}
		return j.transfer(ctx, writing)
	})
}

// The method check runs those steps of a copy that write nothing.
func (j *job) check(ctx context.Context) error {
	if err := j.Parse(); err != nil {
		return err
	}
	if j.isStream() {
		return j.checkStream()
	}
	return j.planned(ctx, func(context.Context) error { return j.checkTarget(ctx) })
}

// The method planned opens the disks, plans the copy, calls the function next, and closes the
// disks. The argument of next is the context for calls to the target.
func (j *job) planned(ctx context.Context, next func(writing context.Context) error) error {
	contexts, err := j.begin(ctx)
	if err != nil {
		return err
	}
	defer contexts.end()
	defer j.Counters.Background(progress.WaitSource)()
	j.Limit = j.Limit.Until(contexts.reading)
	if err := j.open(contexts.reading); err != nil {
		return err
	}
	defer j.close()
	if err := j.planCopy(ctx); err != nil {
		return err
	}
	return next(contexts.writing)
}

// The method begin finds the files that an earlier run left, and makes the contexts of the copy. It
// is called before any disk is opened.
func (j *job) begin(ctx context.Context) (*contexts, error) {
	if j.Size != nil {
		return nil, usage.Errorf("--size is for a stream on standard input, but %s has a size of its own", j.Source)
	}
	if err := j.findEarlier(); err != nil {
		return nil, err
	}
	return newContexts(ctx, j.path != ""), nil
}

// When a signal stops a copy that can be resumed, the copy waits for the reads in progress, but at
// most for the duration readingGrace. After that, the target stays open for the further duration
// checkpointGrace. So a last checkpoint can be written even if the source hangs or waits to be
// opened again.
const (
	readingGrace    = 5 * time.Second
	checkpointGrace = 5 * time.Second
)

// The type contexts holds the contexts for reading the source and for writing the target. If the
// copy can be resumed, these contexts end some time after the context of the caller.
type contexts struct {
	reading, writing context.Context
	end              func()
}

func newContexts(ctx context.Context, resumable bool) *contexts {
	if !resumable {
		return &contexts{ctx, ctx, func() {}}
	}
	reading, endReading := grace.Prolong(ctx, readingGrace)
	writing, endWriting := grace.Prolong(ctx, readingGrace+checkpointGrace)
	return &contexts{reading, writing, func() { endReading(); endWriting() }}
}

// The method transfer copies the data with package transfer, and writes checkpoints to the journal.
func (j *job) transfer(ctx, writing context.Context) error {
	o := j.options()
	o.Requests = transfer.Requests(j.Depth, j.source)
	if c, ok := sink.Ability[sink.Connected](j.dst); ok {
		// Each read is followed by a write, so all connections of the target are busy only if
		// there are at least as many concurrent reads as connections.
		o.Requests = max(o.Requests, j.Depth*c.Connections())
	}
	k, err := j.keep(&o)
	if err != nil {
		return err
	}
	o.Stop = ctx
	j.reopenLost(&o)
	j.result, err = transfer.Copy(writing, j.source, j.dst, j.plan, o)
	return k.end(err)
}

func (j *job) options() transfer.Options {
	o := transfer.Options{
		RequestSize: j.RequestSize, Requests: j.Depth, Reflink: j.Reflink, Digest: j.Digest, Verify: j.Verify,
		Counters: j.Counters, Backing: j.overlay.disk, Limit: j.Limit, Sparse: j.Sparse, KeepZeros: j.KeepZeros, Hold: j.Hold,
		Reread: j.copied.Doubtful,
	}
	if j.Whole != nil {
		o.Whole = func() { j.Whole(fileid.MarkOf(j.place.Partial)) }
	}
	if j.overlay.identity != nil {
		o.BackingIdentity = j.overlay.identity.Identity
		o.ReopenBacking = j.reopenBacking
	}
	return o
}

// warn logs a warning and adds it to the report. The connections of a disk call it
// concurrently.
func (j *job) warn(message string) {
	j.Log.Warn(message)
	j.warning.Lock()
	defer j.warning.Unlock()
	j.report.Warnings = append(j.report.Warnings, message)
}
