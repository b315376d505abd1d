package main

import (
	"context"
	"errors"
	"log/slog"
	"os"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

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
