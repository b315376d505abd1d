package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"vddkcp/internal/bytesize"
	"vddkcp/sink"
	sinkopen "vddkcp/sink/open"
	"vddkcp/source"
	"vddkcp/transfer"
	"vddkcp/transfer/journal"
	"vddkcp/vddk"
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
	stale   bool            // the .partial that is there is of no use
	begun   bool            // the target is this copy's
	partial os.FileInfo     // of the .partial that is there; nil: none
}

// prepareResume finds the journal of the copy and, with --resume, what it
// holds. It changes nothing.
func (j *job) prepareResume() (err error) {
	r := &j.resumption
	r.place = sinkopen.PlaceOf(j.Dst)
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
	if sinkopen.FormatOf(j.Dst, j.Format) == "vmdk" { // is written in one go
		r.path, r.stale = "", j.Resume
		if _, err := os.Lstat(r.place.Partial); j.Resume && err == nil {
			j.warn(fmt.Sprintf("%s is of a VMDK, which can't be gone on with: the copy starts anew", r.place.Partial))
		}
		return nil
	}
	if j.Journal != "" {
		r.path = j.Journal
	}
	// A file that is no journal is refused now, and not when the target is open.
	entries, err := journal.Load(r.path)
	if err != nil || !j.Resume {
		return err
	}
	if r.place.Kind == "file" {
		if r.partial, err = os.Lstat(r.place.Partial); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	r.entries = entries
	if len(r.entries) == 0 && r.place.Kind == "file" {
		r.stale = true
		j.warn(fmt.Sprintf("%s has no journal that says how far it came: the copy starts anew", r.place.Partial))
	}
	return nil
}

// resumable describes the copy and refuses to go on with another one.
func (j *job) resumable(ctx context.Context, src source.Disk, target *sinkopen.Target) error {
	r := &j.resumption
	r.copy = journal.Copy{Proof: "none", Size: src.Size(), Target: target.String(), Options: j.decisive()}
	if i, ok := source.Ability[source.Identified](src); ok {
		var err error
		if r.copy.Source, r.copy.Proof, err = i.Identity(ctx); err != nil {
			return fmt.Errorf("identify the source: %w", err)
		}
	}
	for _, e := range r.entries {
		if diff := r.copy.Differs(e.Copy); diff != "" {
			return &usageError{
				err:  fmt.Errorf("--resume: %s is not the copy that stopped: %s", j.Dst, diff),
				hint: "--force without --resume drops what was copied and starts anew",
			}
		}
	}
	return nil
}

// decisive are the options that decide what a target holds, and how far its
// digests are.
func (j *job) decisive() map[string]string {
	options := map[string]string{}
	for name, value := range map[string]string{
		"source-format": j.SourceFormat, "digest": string(j.Digest), "preallocation": j.Preallocation,
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
	if len(r.entries) > 0 {
		o.State, o.Resume = r.entries[0].State, r.entries[0].Offset
	}
	o.DropPartial = r.stale
	return o
}

// openTarget makes the target, or opens the one to go on with and sees that it
// holds what was written last. Target is that of resumeOptions, and plan makes
// it again when they changed.
func (j *job) openTarget(ctx context.Context, src source.Disk, target *sinkopen.Target, plan func() (*sinkopen.Target, error)) (sink.Disk, error) {
	r := &j.resumption
	for {
		dst, err := target.Create(ctx)
		if err != nil || len(r.entries) == 0 {
			return dst, err
		}
		last := &r.entries[0].Checkpoint
		back, ok := sink.Ability[sink.Readback](dst)
		if !ok {
			if err := j.checkSource(ctx, src, last); err != nil {
				return nil, errors.Join(err, dst.Suspend())
			}
			return dst, nil
		}
		err = last.CheckTail(ctx, back)
		if err == nil {
			if err := j.checkSource(ctx, src, last); err != nil {
				return nil, errors.Join(err, dst.Suspend())
			}
			return dst, nil
		}
		if suspended := dst.Suspend(); suspended != nil || !errors.Is(err, transfer.ErrTail) {
			return nil, errors.Join(err, suspended)
		}
		if r.entries = r.entries[1:]; len(r.entries) == 0 {
			return nil, &hintedError{
				fmt.Errorf("--resume: %s does not hold what its journal says was written last: %w", j.Dst, err),
				"--force without --resume starts anew",
			}
		}
		j.warn(fmt.Sprintf("the checkpoint at %d is not used: %v; the one before, at %d, is", last.Offset, err, r.entries[0].Offset))
		if target, err = plan(); err != nil {
			return nil, err
		}
	}
}

// canGoOn says of a copy that failed before it began to write whether another
// run can go on: with an earlier copy, which this one left as it was, or, in a
// batch, when a server is there again.
func (j *job) canGoOn(err error) error {
	if err == nil || outcomeOf(err).exit != exitFailed {
		return err
	}
	if r := &j.resumption; len(r.entries) > 0 && !r.begun {
		if vddk.IsNoSnapshot(err) || errors.Is(err, sink.ErrUnfit) {
			return j.neverResumed(err)
		}
		return &transfer.ResumableError{Err: err, Offset: r.entries[0].Offset}
	}
	if j.retried && j.mayPass(err) {
		return &passingError{err}
	}
	return err
}

// neverResumed is the usage error of a copy that no later run can go on with
// either. What was copied is kept.
func (j *job) neverResumed(why error) error {
	e := &usageError{
		err:  fmt.Errorf("--resume: the copy to %s can't go on: %w", j.Dst, why),
		hint: "--force without --resume drops what was copied and starts anew",
	}
	if vddk.IsNoSnapshot(why) {
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
	if j.resumption.copy.Proof != "none" || last.Offset == 0 {
		return nil
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
func (j *job) keep(ctx context.Context, o *transfer.Options) (ended func(error) error, err error) {
	r := &j.resumption
	if r.path == "" {
		return func(err error) error { return err }, nil
	}
	jr, _, err := journal.Open(r.path)
	if err != nil {
		return nil, err
	}
	if len(r.entries) == 0 {
		if err := jr.Reset(); err != nil {
			return nil, errors.Join(err, jr.Remove())
		}
	} else {
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
