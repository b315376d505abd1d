package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/exit"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/report"
)

// A copy that a signal stops has grace for the reads in flight; those that are
// still not answered then are given up. The target lives checkpointGrace longer,
// so that it can take a last checkpoint even where the source hangs or waits to
// be opened again.
const (
	grace           = 5 * time.Second
	checkpointGrace = 5 * time.Second
)

// resumption is a copy's journal, and where in it an earlier run stopped.
type resumption struct {
	path    string // of the journal; "": the target can't be resumed
	place   sinkopen.Place
	copy    journal.Copy
	entries []journal.Entry // to go on at, the newest first; none: from the start
	newest  int64           // offset of the newest checkpoint of the journal, bytes; -1: it has none
	dropped bool            // that is not used, but the one before
	earlier bool            // an earlier run has begun the copy, and may have done nothing of it
	stale   bool            // the .partial that is there is of no use
	begun   bool            // the target is this copy's
	partial os.FileInfo     // of the .partial that is there; nil: none
	// identity is that of the device or export that an earlier run wrote to; ""
	// where no journal names one.
	identity string
	// touched is the journal by which an earlier copy may have written to the device
	// or export; "": there is none.
	touched string
}

// inPlace says whether the target is there before the copy, and keeps what it
// holds.
func (r *resumption) inPlace() bool {
	return r.place.Kind == "block device" || r.place.Kind == "NBD export"
}

// prepareResume finds the journal of the copy and, with --resume, what it
// holds. It changes nothing.
func (j *job) prepareResume() (err error) {
	r := &j.resumption
	r.place = sinkopen.PlaceOf(j.at.target)
	switch r.place.Kind {
	case "file":
		r.path = journal.Beside(r.place.Partial)
	case "block device", "NBD export":
		if j.Journal == "" {
			if r.path, err = journal.DefaultPath(j.Dst); err != nil {
				return err
			}
		}
	default:
		if j.Resume {
			return &usageError{err: fmt.Errorf("--resume: %s can't be resumed", j.Dst)}
		}
		return nil
	}
	if j.Journal != "" {
		r.path = j.Journal
	}
	// A file that is no journal is refused now, and not when the target is open.
	entries, err := journal.Load(r.path)
	if errors.Is(err, journal.ErrVersion) {
		if j.Resume {
			return j.neverResumed(err)
		}
		err = nil // it is in the way of nothing but --resume
	}
	if err != nil {
		return err
	}
	if j.resumption.place.Format(j.Format) == "vmdk" {
		return j.prepareVMDK(entries)
	}
	if r.inPlace() {
		if _, err := os.Lstat(r.path); err == nil {
			r.touched = r.path
		}
	}
	if !j.Resume {
		return nil
	}
	if r.place.Kind == "file" {
		if r.partial, err = os.Lstat(r.place.Partial); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	if len(entries) > 0 && r.inPlace() {
		r.identity = entries[0].Identity
	}
	none := len(entries) == 0
	if r.newest = -1; !none {
		r.newest = entries[0].Offset
	}
	r.earlier = !none
	// At offset 0 nothing was done, so there is nothing to go on with.
	r.entries = slices.DeleteFunc(entries, func(e journal.Entry) bool { return e.Offset == 0 })
	if len(r.entries) == 0 && r.place.Kind == "file" {
		r.stale = true
		if none {
			j.warn(fmt.Sprintf("%s has no journal that says how far it came: the copy starts anew", r.place.Partial))
		}
	}
	return nil
}

// prepareVMDK is prepareResume of a VMDK, which is written in one go. Entries are
// those of the journal that is there.
func (j *job) prepareVMDK(entries []journal.Entry) error {
	r := &j.resumption
	r.path, r.stale = "", j.Resume
	if _, err := os.Lstat(r.place.Partial); !j.Resume || err != nil {
		return nil
	}
	for _, e := range entries {
		if e.Offset > 0 { // the .partial is of another format, and can be gone on with
			return j.anotherCopy(fmt.Sprintf("the target is a vmdk file, and was a %s", e.Target))
		}
	}
	j.warn(fmt.Sprintf("%s is of a VMDK, which can't be gone on with: the copy starts anew", r.place.Partial))
	return nil
}

// resumable describes the copy and refuses to go on with another one.
func (j *job) resumable(ctx context.Context, src source.Disk) (err error) {
	r := &j.resumption
	format := j.resumption.place.Format(j.Format)
	r.copy = journal.Copy{Size: src.Size(), Target: format + " " + r.place.Kind, Backing: j.overlaid, Options: j.decisive(format)}
	if r.copy.Source, r.copy.Proof, err = identify(ctx, src); err != nil {
		return fmt.Errorf("identify the source: %w", err)
	}
	for _, e := range r.entries {
		if diff := r.copy.Differs(e.Copy); diff != "" {
			return j.anotherCopy(diff)
		}
	}
	return nil
}

// identify returns the identity of a disk, and by what it is proved.
func identify(ctx context.Context, d source.Disk) (id, proof string, err error) {
	i, ok := source.Ability[source.Identified](d)
	if !ok {
		return "", "none", nil
	}
	return i.Identity(ctx)
}

// decisive returns the options that decide what a target of that format holds,
// and how far its digests are. docs/journal.md has a table of all flags.
func (j *job) decisive(format string) map[string]string {
	options := map[string]string{}
	cluster, compress := "", ""
	if format == "qcow2" {
		cluster = strconv.FormatInt(j.clusterSize(), 10)
		compress, _, _ = strings.Cut(cmp.Or(j.Compress, "none"), ":") // levels may change
	}
	for name, value := range map[string]string{
		"source-format": j.SourceFormat, "digest": string(j.Digest), "preallocation": j.Preallocation,
		"cluster-size": cluster, "compress": compress,
	} {
		if value != "" {
			options[name] = value
		}
	}
	for name, set := range map[string]bool{"single-link": j.SingleLink, "target-is-zero": j.TargetIsZero} {
		if set {
			options[name] = "true"
		}
	}
	return options
}

// resumeOptions make target options those of a target to go on with.
func (r *resumption) resumeOptions(o sinkopen.Options) sinkopen.Options {
	o.Identity = r.identity
	if len(r.entries) > 0 {
		o.State, o.Resume = r.entries[0].State, r.entries[0].Offset
	}
	o.DropPartial = r.stale
	if r.touched != "" {
		o.TargetIsZero = false
	}
	return o
}

// openTarget makes the target, or opens the one to go on with and checks that it
// holds what was written last. Target is that of resumeOptions, and plan makes
// it again when they changed.
func (j *job) openTarget(ctx context.Context, src source.Disk, target *sinkopen.Target, plan func() (*sinkopen.Target, error)) (sink.Disk, error) {
	r := &j.resumption
	if err := r.untouched(); err != nil {
		return nil, err
	}
	for {
		dst, err := target.Create(ctx)
		if err != nil {
			return nil, otherTarget(err)
		}
		if len(r.entries) == 0 {
			if !j.TargetIsZero || !r.inPlace() {
				return dst, nil
			}
			if r.touched == "" && r.findTouched(dst) {
				if err := dst.Abort(); err != nil { // nothing was written
					return nil, err
				}
				if target, err = plan(); err != nil {
					return nil, err
				}
				continue
			}
			if r.touched != "" {
				j.warn(fmt.Sprintf("--target-is-zero is not believed, since by the journal %q an earlier copy wrote to this target: its holes are zeroed", r.touched))
			}
			return dst, nil
		}
		last := &r.entries[0]
		if err = j.checkTarget(ctx, dst, last); err == nil {
			if err = j.checkSource(ctx, src, &last.Checkpoint); err == nil {
				return dst, nil
			}
			if errors.As(err, new(*usageError)) {
				return nil, errors.Join(err, dst.Suspend())
			}
		}
		if suspended := dst.Suspend(); suspended != nil || !isAnother(err) {
			return nil, errors.Join(err, suspended)
		}
		if err := j.dropCheckpoint(last, err); err != nil {
			return nil, err
		}
		if target, err = plan(); err != nil {
			return nil, err
		}
	}
}

// findTouched looks for a journal of the same device or export among those of
// targets by other names, and reports whether there is one.
func (r *resumption) findTouched(dst sink.Disk) bool {
	id, err := sink.IdentityOf(dst)
	path, pathErr := journal.DefaultPath(r.place.Kind)
	if err != nil || pathErr != nil || id == "" {
		return false
	}
	paths, _ := filepath.Glob(filepath.Join(filepath.Dir(path), "*.journal"))
	for _, path := range paths {
		entries, _ := journal.Load(path) // what is no journal tells nothing
		if slices.ContainsFunc(entries, func(e journal.Entry) bool { return e.Identity == id }) {
			r.touched = path
			return true
		}
	}
	return false
}

// untouched returns an error if another run has continued the copy since the
// journal was read: the target must not be cut where that was.
func (r *resumption) untouched() error {
	if len(r.entries) == 0 {
		return nil
	}
	now, err := journal.Load(r.path)
	if err != nil {
		return err
	}
	if len(now) == 0 || now[0].Offset != r.newest {
		return fmt.Errorf("another process went on with the copy meanwhile: by the journal %q it is no longer at %d", r.path, r.newest)
	}
	return nil
}

// isAnother says whether err of checkTarget means that the target is not the one of
// the checkpoint.
func isAnother(err error) bool {
	return errors.Is(err, transfer.ErrTail) || errors.Is(err, sink.ErrUnfit) || errors.Is(err, errUnproved)
}

// dropCheckpoint makes the copy go on from the checkpoint before the last one,
// which does not hold for the target, or from the start.
func (j *job) dropCheckpoint(last *journal.Entry, why error) error {
	r := &j.resumption
	if errors.Is(why, errUnproved) {
		j.warn(fmt.Sprintf("the checkpoint at %d is not used: %v; the copy starts anew", last.Offset, why))
		r.entries, r.stale = nil, r.place.Kind == "file"
		return nil
	}
	r.dropped = true
	if r.entries = r.entries[1:]; len(r.entries) == 0 {
		r.entries = []journal.Entry{*last} // the earlier copy stays as it is
		return j.neverResumed(fmt.Errorf("the target does not hold what its journal says was written last: %w", why))
	}
	j.warn(fmt.Sprintf("the checkpoint at %d is not used: %v; the one before, at %d, is", last.Offset, why, r.entries[0].Offset))
	return nil
}

// errUnproved says that a target or a source may be another one than that of a
// checkpoint, of which nothing would be lost.
var errUnproved = errors.New("nothing proves that source and target are those of the copy that stopped")

// checkTarget compares what a target holds with a checkpoint. Where the checkpoint
// does not hold for the target, isAnother is true for the error.
func (j *job) checkTarget(ctx context.Context, dst sink.Disk, last *journal.Entry) error {
	if back, ok := sink.Ability[sink.Readback](dst); ok {
		if err := last.CheckTail(ctx, back); err != nil {
			return err
		}
	}
	id, err := sink.IdentityOf(dst)
	if err != nil {
		return err
	}
	// The identity of a device or an export was compared when it was opened, but
	// zeros are on every new disk. A file that holds what was written may have
	// been moved here. What an overlay reads as may be the backing's, which proves
	// nothing about the overlay's file.
	inPlace := j.resumption.inPlace()
	same := !inPlace && id != "" && id == last.Identity
	if !same && (!last.Proves() || j.backing != nil && !inPlace) {
		return fmt.Errorf("%w: the target is %s, and was %s, and nothing but zeros or the backing's content was written last", errUnproved, cmp.Or(id, "unknown"), cmp.Or(last.Identity, "unknown"))
	}
	return nil
}

// otherTarget makes a usage error of a target that is not that of the copy to go
// on with.
func otherTarget(err error) error {
	if errors.As(err, new(*sink.OtherError)) {
		return &usageError{
			err:  fmt.Errorf("--resume: %w", err),
			hint: "name the target of the copy that stopped, or run without --resume to start anew on this one",
		}
	}
	return err
}

// canGoOn says of a copy that failed before it began to write whether another
// run can go on: with an earlier copy, which this one left as it was, or, in a
// batch, when a server is there again.
func (j *job) canGoOn(err error) error {
	if err == nil || report.Of(err).Exit != exit.Failed {
		return err
	}
	if r := &j.resumption; r.earlier && !r.begun {
		if errors.Is(err, source.ErrGone) || errors.Is(err, sink.ErrUnfit) || errors.Is(err, fs.ErrExist) {
			return j.neverResumed(err)
		}
		offset := int64(0)
		if len(r.entries) > 0 {
			offset = r.entries[0].Offset
		}
		return &transfer.ResumableError{Err: err, Offset: offset}
	}
	if j.retried && j.mayPass(err) {
		return &passingError{err}
	}
	return err
}

// startAnew is the hint where --resume can't go on with what was copied.
const startAnew = "--force without --resume drops what was copied and starts anew"

// anotherCopy returns the usage error of a copy that differs from the one that
// stopped. The text diff says in what.
func (j *job) anotherCopy(diff string) error {
	return &usageError{err: fmt.Errorf("--resume: %s is not the copy that stopped: %s", j.Dst, diff), hint: startAnew}
}

// neverResumed is the usage error of a copy that no later run can go on with
// either. What was copied is kept.
func (j *job) neverResumed(why error) error {
	e := &usageError{
		err:  fmt.Errorf("--resume: the copy to %s can't go on: %w", j.Dst, why),
		hint: startAnew,
	}
	if errors.Is(why, fs.ErrExist) {
		e.hint = "--resume with --force goes on, and replaces what is at DST when the copy is whole"
	}
	if errors.Is(why, source.ErrGone) {
		e.hint = "the snapshot is gone, and with it the state of the disk that was copied: name a snapshot that exists, and start anew with --force without --resume"
	}
	return e
}

// sameSize refuses to go on with a disk that has another size than the one that
// was copied. It comes before the target is opened by the checkpoint of that.
func (j *job) sameSize(src source.Disk) error {
	for _, e := range j.resumption.entries {
		if e.Size != src.Size() {
			return j.neverResumed(fmt.Errorf("the source has %d bytes (%s), and had %d (%s) when the copy stopped", src.Size(), bytesize.Format(src.Size()), e.Size, bytesize.Format(e.Size)))
		}
	}
	return nil
}

// checkSource looks, where nothing proves that the source is the same, whether
// what was read last still is.
func (j *job) checkSource(ctx context.Context, src source.Disk, last *transfer.Checkpoint) error {
	if b := j.overlaid; b != nil && b.Proof == "none" {
		j.warn(fmt.Sprintf("nothing proves that the backing %q is what it was when the copy stopped", b.Path))
	}
	if j.resumption.copy.Proof != "none" || last.Offset == 0 {
		return nil
	}
	if !last.Proves() {
		return fmt.Errorf("%w: the source has no identity that proves it, and nothing but zeros was read so far", errUnproved)
	}
	err := last.CheckTail(ctx, src)
	if errors.Is(err, transfer.ErrTail) {
		return &usageError{
			err:  fmt.Errorf("--resume: the source changed since the copy stopped: %w", err),
			hint: "--force without --resume starts anew; copy from a snapshot, or with the source's user stopped",
		}
	}
	if err == nil {
		j.warn("nothing proves that the source is what it was when the copy stopped; what was read last is the same")
	}
	return err
}

// giveUp ends a target that nothing was written to. One that an earlier run has
// begun is kept.
func (j *job) giveUp(dst sink.Disk) error {
	if len(j.resumption.entries) > 0 {
		return dst.Suspend()
	}
	return dst.Abort()
}

// keep opens the journal of a copy whose target is open, and makes the options
// write to it. Ended tells it how the copy ended.
func (j *job) keep(ctx context.Context, dst sink.Disk, o *transfer.Options) (ended func(error) error, err error) {
	r := &j.resumption
	if r.path == "" {
		return func(err error) error { return err }, nil
	}
	if r.copy.Identity, err = sink.IdentityOf(dst); err != nil {
		return nil, err
	}
	jr, _, err := journal.Open(r.path)
	if err != nil {
		return nil, err
	}
	if len(r.entries) == 0 {
		if err := j.startJournal(jr); err != nil {
			if r.touched != "" {
				return nil, errors.Join(err, jr.Close()) // the next run must know that, too
			}
			return nil, errors.Join(err, jr.Remove())
		}
	} else {
		if r.dropped {
			if err := jr.WriteBack(r.entries[0]); err != nil {
				return nil, errors.Join(err, jr.Close())
			}
		}
		last := r.entries[0].Checkpoint
		o.Resume = &last
		j.report.ResumedFrom, j.report.ResumeProof = last.Offset, r.copy.Proof
		j.log.Info("going on with an earlier copy", "from", last.Offset, "done", bytesize.Format(last.Offset), "proof", r.copy.Proof)
	}
	r.begun = true
	o.Stop = ctx
	o.Keep = func(c transfer.Checkpoint) error { return jr.Write(journal.Entry{Copy: r.copy, Checkpoint: c}) }
	return func(err error) error {
		if errors.As(err, new(*transfer.ResumableError)) {
			if closed := jr.Close(); closed != nil {
				j.log.Warn("close the journal", "error", closed)
			}
			return err
		}
		if errors.Is(err, transfer.ErrSourceChanged) {
			r.dropPartial(j.log)
		}
		if err != nil && r.inPlace() && (j.TargetIsZero || r.touched != "") {
			// The next run must know that the target is no longer zero.
			if kept := errors.Join(j.startJournal(jr), jr.Close()); kept != nil {
				j.log.Warn("the journal cannot be kept: do not use --target-is-zero in the next run", "error", kept)
			}
			return err
		}
		if removed := jr.Remove(); removed != nil {
			j.log.Warn("the journal stays", "error", removed)
		}
		return err
	}, nil
}

// dropPartial removes the .partial that an earlier run made, which the sink
// leaves. It is for a source that changed: the file holds parts of two states.
func (r *resumption) dropPartial(log *slog.Logger) {
	if r.partial == nil || len(r.entries) == 0 {
		return
	}
	now, err := os.Lstat(r.place.Partial)
	if err != nil || !os.SameFile(now, r.partial) {
		return // it is gone, or another process's
	}
	if err := os.Remove(r.place.Partial); err != nil {
		log.Warn("the .partial file stays and holds parts of two states of the source", "error", err)
	}
}

// startJournal begins the journal of a copy of which nothing is done. For a target
// that is written in place it notes that durably, before the first write: from
// then on the target is not known to read as zeros.
func (j *job) startJournal(jr *journal.Journal) error {
	if err := jr.Reset(); err != nil || !j.resumption.inPlace() {
		return err
	}
	return jr.Write(journal.Entry{Copy: j.resumption.copy})
}
