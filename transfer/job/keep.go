package job

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

// keeper holds the journal of a running copy. If the copy cannot be resumed, there is no
// journal, and the field journal is nil.
type keeper struct {
	j       *job
	journal *journal.Journal
	stored  bool // the journal has a checkpoint of this copy
}

// The method keep opens the journal of a copy whose target is open. It sets o, the options of
// transfer.Copy, so that checkpoints are written to the journal. If the journal cannot be opened,
// the method closes the target.
func (j *job) keep(o *transfer.Options) (*keeper, error) {
	if j.path == "" {
		return &keeper{j: j}, nil
	}
	jr, err := j.openJournal()
	if err != nil {
		return nil, errors.Join(err, j.giveUp())
	}
	if len(j.entries) > 0 {
		last := j.entries[0].Checkpoint
		o.Resume = &last
		j.report.ResumedFrom, j.report.ResumeProof = last.Offset, j.copied.Proof
		j.Log.Info("continuing an earlier copy", "from", last.Offset, "done", bytesize.Format(last.Offset), "proof", j.copied.Proof)
	}
	j.begun = true
	k := &keeper{j, jr, len(j.entries) > 0}
	o.Keep = func(c transfer.Checkpoint) error {
		if err := jr.Write(journal.Entry{Copy: j.copied, Checkpoint: c}); err != nil {
			return err
		}
		k.stored = true
		return nil
	}
	return k, nil
}

// openJournal opens the journal, and removes from it the checkpoints at which this copy cannot
// continue.
func (j *job) openJournal() (jr *journal.Journal, err error) {
	if j.copied.Identity, err = sink.IdentityOf(j.dst); err != nil {
		return nil, err
	}
	if jr, _, err = journal.Open(j.path); err != nil {
		return nil, err
	}
	if len(j.entries) > 0 {
		if j.dropped {
			err = jr.WriteBack(j.entries[0])
		}
		if err != nil {
			return nil, errors.Join(err, jr.Close())
		}
		return jr, nil
	}
	if err = j.startJournal(jr); err == nil {
		return jr, nil
	}
	if j.touched != "" {
		return nil, errors.Join(err, jr.Close()) // the journal is kept: the next run must know that the target was written to
	}
	return nil, errors.Join(err, jr.Remove())
}

// startJournal begins the journal of a copy that has copied nothing yet. If the target is a
// device or an export, it durably records in the journal that the copy has begun. This must
// happen before the first write, because the target may no longer read as zeros after it.
func (j *job) startJournal(jr *journal.Journal) error {
	if err := jr.Reset(); err != nil || !j.inPlace() {
		return err
	}
	return jr.Write(journal.Entry{Copy: j.copied})
}

// giveUp closes the target of a copy that has not written to it. If the copy continues an earlier
// one, giveUp suspends the target, which keeps it. If not, giveUp aborts the target, which
// removes everything that this run has made.
func (j *job) giveUp() error {
	if len(j.entries) > 0 {
		return j.dst.Suspend()
	}
	return j.dst.Abort()
}

// The method end closes the journal of a copy that ended with err, and returns err. If no later run
// needs the journal, end removes it.
func (k *keeper) end(err error) error {
	if k.journal == nil {
		return err
	}
	j := k.j
	switch {
	case errors.As(err, new(*transfer.ResumableError)):
		if closed := k.journal.Close(); closed != nil {
			j.Log.Warn("the journal cannot be closed", "error", closed)
		}
		return err
	case errors.Is(err, transfer.ErrSourceChanged) && j.Hold && k.stored:
		if closed := k.journal.Close(); closed != nil {
			j.Log.Warn("the journal cannot be closed", "error", closed)
		}
		return err // transfer.Copy has kept the target
	case errors.Is(err, transfer.ErrSourceChanged):
		j.dropPartial(j.Log)
	}
	if err != nil && j.inPlace() && (j.TargetIsZero || j.touched != "") {
		// The copy failed, but may have written to the device or export. The journal is kept,
		// because the next run must know that this target may no longer read as zeros.
		if kept := errors.Join(j.startJournal(k.journal), k.journal.Close()); kept != nil {
			j.Log.Warn("the journal cannot be kept: do not use --target-is-zero in the next run", "error", kept)
		}
		return err
	}
	if removed := k.journal.Remove(); removed != nil {
		j.Log.Warn("the journal cannot be removed", "error", removed)
	}
	return err
}

// dropPartial removes the .partial file of an earlier run after the source has changed: the file
// then holds parts of two states of the source. The sink, which writes the target, does not remove
// this file, because a sink removes only files that it created itself.
func (r *resumption) dropPartial(log *slog.Logger) {
	if r.partial == nil || len(r.entries) == 0 {
		return
	}
	now, err := os.Lstat(r.place.Partial)
	if err != nil || !os.SameFile(now, r.partial) {
		return // the file is gone, or belongs to another process
	}
	if err := os.Remove(r.place.Partial); err != nil {
		log.Warn("the .partial file, which holds parts of two states of the source, cannot be removed", "error", err)
	}
}

// reopenLost sets o, the options of transfer.Copy, so that an NBD export is opened again when
// its connection is lost.
func (j *job) reopenLost(o *transfer.Options) {
	if j.target.Kind != "NBD export" {
		return
	}
	o.Reopen = func(ctx context.Context, state []byte, resume int64) (sink.Disk, error) {
		to := j.targetOptions(nil)
		to.State, to.Resume, to.Identity = state, resume, j.copied.Identity
		t, err := j.place.Plan(ctx, j.source.Size(), to)
		if err != nil {
			return nil, err
		}
		return t.Create(ctx)
	}
	o.Lost = j.Opener.Retry
	o.Lost.OnRetry = func(err error, wait time.Duration) {
		j.Log.Warn("the target is opened again at the last checkpoint", "wait", wait.Round(time.Millisecond), "error", err)
	}
}
