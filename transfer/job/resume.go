package job

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	sinkraw "github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

// resumption is what an earlier run of the copy left behind.
type resumption struct {
	path    string // of the journal; "": the target cannot be resumed
	place   sinkopen.Place
	copied  journal.Copy    // describes this copy
	entries []journal.Entry // checkpoints to continue at, the newest first; none: from the start
	newest  int64           // offset of the newest checkpoint in the journal, bytes; -1: it has none
	dropped bool            // the newest checkpoint is not used, but the one before it
	earlier bool            // an earlier run began the copy; it may have copied nothing
	stale   bool            // the existing .partial file is of no use
	begun   bool            // the target belongs to this copy
	partial os.FileInfo     // of the existing .partial file; nil: none
	// identity is that of the device or export that an earlier run wrote to; "" if
	// no journal names one.
	identity string
	// touched is the path of a journal which says that an earlier copy may have
	// written to the device or export; "": there is none.
	touched string
}

// inPlace reports whether the target exists before the copy and keeps its content
// where nothing is written.
func (r *resumption) inPlace() bool {
	return r.place.Kind == "block device" || r.place.Kind == "NBD export"
}

// findEarlier finds the journal of the copy and, with Resume, the checkpoints in it.
// It changes nothing.
func (j *job) findEarlier() error {
	j.place = sinkopen.PlaceOf(j.at.target)
	resumable, err := j.placeJournal()
	if err != nil || !resumable {
		return err
	}
	// A file that is no journal is refused now, and not when the target is open.
	entries, err := journal.Load(j.path)
	if errors.Is(err, journal.ErrVersion) {
		if j.Resume {
			return j.neverResumed(err)
		}
		err = nil // the journal of another version prevents nothing but resuming
	}
	if err != nil {
		return err
	}
	if j.place.Format(j.Format) == "vmdk" {
		return j.findEarlierVMDK(entries)
	}
	if j.inPlace() {
		if _, err := os.Lstat(j.path); err == nil {
			j.touched = j.path
		}
	}
	if !j.Resume {
		return nil
	}
	return j.useEntries(entries)
}

// placeJournal sets the path of the journal. It returns false if the target is of a
// kind that cannot be resumed.
func (j *job) placeJournal() (resumable bool, err error) {
	switch j.place.Kind {
	case "file":
		j.path = journal.Beside(j.place.Partial)
	case "block device", "NBD export":
		if j.Journal == "" {
			if j.path, err = journal.DefaultPath(j.Target); err != nil {
				return false, err
			}
		}
	default:
		if j.Resume {
			return false, usage.Errorf("--resume: %s cannot be resumed", j.Target)
		}
		return false, nil
	}
	j.path = cmp.Or(j.Journal, j.path)
	return true, nil
}

// useEntries decides at which of the checkpoints of a journal the copy continues.
func (j *job) useEntries(entries []journal.Entry) (err error) {
	if j.place.Kind == "file" {
		if j.partial, err = os.Lstat(j.place.Partial); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
	}
	if len(entries) > 0 && j.inPlace() {
		j.identity = entries[0].Identity
	}
	none := len(entries) == 0
	if j.newest = -1; !none {
		j.newest = entries[0].Offset
	}
	j.earlier = !none
	// At offset 0 nothing was copied, so there is nothing to continue.
	j.entries = slices.DeleteFunc(entries, func(e journal.Entry) bool { return e.Offset == 0 })
	if len(j.entries) == 0 && j.place.Kind == "file" {
		j.stale = true
		if none {
			j.warn(fmt.Sprintf("%s has no journal that says how much of it is copied: the copy starts over", j.place.Partial))
		}
	}
	return nil
}

// findEarlierVMDK is findEarlier for a VMDK, which is written in one go and never
// resumed. entries are those of the existing journal.
func (j *job) findEarlierVMDK(entries []journal.Entry) error {
	j.path, j.stale = "", j.Resume
	if _, err := os.Lstat(j.place.Partial); !j.Resume || err != nil {
		return nil
	}
	for _, e := range entries {
		if e.Offset > 0 { // the .partial file is of another format, which can be resumed
			return j.anotherCopy(fmt.Sprintf("the target is a vmdk file, and was a %s", e.Target))
		}
	}
	j.warn(fmt.Sprintf("%s belongs to a VMDK target, which cannot be resumed: the copy starts over", j.place.Partial))
	return nil
}

// matchEarlier describes this copy, and refuses to continue a different one.
func (j *job) matchEarlier(ctx context.Context) (err error) {
	// The size comes first: a target cannot be opened by the checkpoint of a disk of
	// another size.
	for _, e := range j.entries {
		if size := j.source.Size(); e.Size != size {
			return j.neverResumed(fmt.Errorf("the source has %d bytes (%s), and had %d (%s) when the copy stopped", size, bytesize.Format(size), e.Size, bytesize.Format(e.Size)))
		}
	}
	format := j.place.Format(j.Format)
	j.copied = journal.Copy{Size: j.source.Size(), Target: format + " " + j.place.Kind, Backing: j.overlay.identity, Options: j.decisive(format)}
	if j.copied.Source, j.copied.Proof, err = identify(ctx, j.source); err != nil {
		return fmt.Errorf("identify the source: %w", err)
	}
	for _, e := range j.entries {
		if diff := j.copied.Differs(e.Copy); diff != "" {
			return j.anotherCopy(diff)
		}
	}
	return nil
}

// decisive returns the options that decide what a target of that format holds, and
// how far its digests are. docs/journal.md has a table of all flags.
func (j *job) decisive(format string) map[string]string {
	options := map[string]string{}
	cluster, compress := "", ""
	if format == "qcow2" {
		cluster = strconv.FormatInt(j.clusterSize(), 10)
		compress, _, _ = strings.Cut(cmp.Or(j.Compress, "none"), ":") // the level may change
	}
	for name, value := range map[string]string{
		"source-format": j.SourceFormat, "digest": string(j.Digest), "preallocation": string(cmp.Or(j.Preallocation, sinkraw.PreallocateOff)),
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

// resumeOptions changes the options of a target to those of a target that is
// continued at the newest checkpoint.
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

// startAnew is the hint if --resume cannot continue the earlier copy.
const startAnew = "run again with --force and without --resume, which drops what was copied and starts over"

// anotherCopy returns the usage error of a copy that differs from the one that
// stopped. diff says in what they differ.
func (j *job) anotherCopy(diff string) error {
	return usage.New(fmt.Sprintf("--resume: this is not the copy to %s that stopped: %s", j.Target, diff), startAnew)
}

// neverResumed returns the usage error of a copy that no later run can continue
// either. What was copied is kept.
func (j *job) neverResumed(why error) error {
	hint := startAnew
	if errors.Is(why, fs.ErrExist) {
		hint = "run again with --resume and --force, which replaces the file at DST when the copy is whole"
	}
	if errors.Is(why, source.ErrGone) {
		hint = "the snapshot no longer exists, and with it the state of the disk that was copied: name another snapshot, and start over with --force and without --resume"
	}
	return usage.WithHint(fmt.Errorf("--resume: the copy to %s cannot be continued: %w", j.Target, why), hint)
}

// notThisTarget makes a usage error of a target that is not the one of the copy
// that is to be continued. Other errors are returned as they are.
func notThisTarget(err error) error {
	if errors.As(err, new(*sink.OtherError)) {
		return usage.WithHint(fmt.Errorf("--resume: %w", err), "name the target of the copy that stopped, or run without --resume to start over on this one")
	}
	return err
}
