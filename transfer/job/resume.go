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
	"github.com/vddkcp/vddkcp/internal/fileversion"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	sinkraw "github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

// resumption says what an earlier run of the copy left behind, and how this run uses it.
type resumption struct {
	path    string // of the journal; "": a copy to this target cannot be resumed
	place   sinkopen.Place
	copied  journal.Copy    // description of this copy
	entries []journal.Entry // checkpoints to continue at, the newest first; none: from the start
	newest  int64           // offset of the newest checkpoint in the journal, bytes; -1: it has none
	dropped bool            // the newest checkpoint does not describe the target, so the one before it is used
	earlier bool            // an earlier run has begun the copy, but may have copied nothing
	stale   bool            // the existing .partial file cannot be used and will be replaced
	begun   bool            // the journal describes this copy, which may write to the target
	partial os.FileInfo     // of the existing .partial file; nil: there is none
	// identity identifies the device or export that the earlier run wrote to. It is "" if the
	// target is a file, or if no journal records the identity.
	identity string
	// The field touched is the path of a journal that says that an earlier copy may have written
	// to the device or export. If no journal says so, it is "".
	touched string
}

// inPlace reports whether the target is a device or an export. Such a target exists before the
// copy, and keeps its old content where the copy writes nothing.
func (r *resumption) inPlace() bool {
	return r.place.Kind == "block device" || r.place.Kind == "NBD export"
}

// findEarlier finds the journal of an earlier copy to the target. With Spec.Resume it also
// selects the checkpoints at which this copy can continue. It writes nothing.
func (j *job) findEarlier() error {
	j.place = sinkopen.PlaceOf(j.at.target)
	resumable, err := j.placeJournal()
	if err != nil || !resumable {
		return err
	}
	// The journal is read before the target is opened, so that the copy fails early if the file
	// at the path of the journal is not a journal.
	entries, err := journal.Load(j.path)
	if version := (*fileversion.Error)(nil); errors.As(err, &version) {
		if j.Resume {
			return j.neverResumed(err)
		}
		err = nil // a journal of an unknown version matters only for resuming
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

// placeJournal sets the path of the journal. If a copy to this kind of target cannot be
// resumed, it returns false.
func (j *job) placeJournal() (resumable bool, err error) {
	switch j.place.Kind {
	case "file":
		j.path = j.journalOfFile(j.place)
	case "block device", "NBD export":
		if j.Journal == "" {
			if j.path, err = journal.DefaultPath(j.Target); err != nil {
				return false, err
			}
		}
	default:
		if j.Resume {
			return false, usage.Errorf("--resume: a copy to %s cannot be resumed", j.Target)
		}
		return false, nil
	}
	j.path = cmp.Or(j.Journal, j.path)
	return true, nil
}

// journalOfFile returns the path of the journal of a copy to a file at the given place.
func (j *job) journalOfFile(place sinkopen.Place) string {
	return cmp.Or(j.Journal, journal.Beside(place.Partial))
}

// useEntries selects from the entries of a journal the checkpoints at which this copy can
// continue.
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
	// A checkpoint at offset 0 says that nothing was copied, so it is not needed.
	j.entries = slices.DeleteFunc(entries, func(e journal.Entry) bool { return e.Offset == 0 })
	if len(j.entries) == 0 && j.place.Kind == "file" {
		j.stale = true
		if none {
			j.warn(fmt.Sprintf("no checkpoint of %s was found: the copy starts over", j.place.Partial))
		}
	}
	return nil
}

// findEarlierVMDK does the work of findEarlier for a VMDK target. Such a target is written from the
// beginning to the end. A copy to it has no journal and cannot be resumed. But an earlier copy to
// the same path, in another format, may have left a journal. The parameter entries holds the
// entries of that journal. If --resume is set and the earlier copy can be resumed, findEarlierVMDK
// returns an error. In all other cases the copy to the VMDK target starts over.
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

// matchEarlier composes the description of this copy. If the earlier copy has another
// description, matchEarlier returns a usage error.
func (j *job) matchEarlier(ctx context.Context) (err error) {
	// The sizes are compared first, because the error about a size is the easiest to
	// understand. A source of another size differs in other parts of the description too.
	for _, e := range j.entries {
		if size := j.source.Size(); e.Size != size {
			return j.neverResumed(fmt.Errorf("the source has %d bytes (%s), but had %d bytes (%s) when the earlier copy stopped", size, bytesize.Format(size), e.Size, bytesize.Format(e.Size)))
		}
	}
	format := j.place.Format(j.Format)
	j.copied = journal.Copy{Size: j.source.Size(), Target: format + " " + j.place.Kind, Backing: j.overlay.identity, Options: j.decisive(format)}
	if j.copied.Source, j.copied.Proof, err = identify(ctx, j.source); err != nil {
		return fmt.Errorf("cannot identify the source: %w", err)
	}
	_, j.copied.Doubtful = source.Ability[source.Rereadable](j.source)
	for _, e := range j.entries {
		if diff := j.copied.Differs(e.Copy); diff != "" {
			return j.anotherCopy(diff)
		}
		j.copied.Doubtful = j.copied.Doubtful || e.Doubtful
	}
	return nil
}

// The method decisive returns the values of some flags: those that decide the content of a target
// with this format, and those that decide which digests a checkpoint has. A copy with other values
// of these flags cannot continue the earlier one. docs/journal.md has a table of all flags.
func (j *job) decisive(format string) map[string]string {
	options := map[string]string{}
	cluster, compress := "", ""
	if format == "qcow2" {
		cluster = strconv.FormatInt(j.clusterSize(), 10)
		compress, _, _ = strings.Cut(cmp.Or(j.Compress, "none"), ":") // the level of compression may change
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

// resumeOptions returns the options of a target together with those for continuing at the
// newest checkpoint.
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

// startOver is the hint for a user whose earlier copy cannot be continued with --resume.
const startOver = "run again with --force and without --resume, which drops what was copied and starts over"

// anotherCopy returns the usage error for a run with --resume that is not the same copy as the
// earlier one. The parameter diff is a text about the first difference between the two copies.
func (j *job) anotherCopy(diff string) error {
	return usage.New(fmt.Sprintf("--resume: this is not the copy to %s that stopped: %s", j.Target, diff), startOver)
}

// neverResumed returns the usage error for an earlier copy that no run can continue. The parameter
// cause is the reason. The data that the earlier copy has written is kept.
func (j *job) neverResumed(cause error) error {
	hint := startOver
	if errors.Is(cause, fs.ErrExist) {
		hint = "run again with --resume and --force, which replaces the file at DST when the copy is whole"
	}
	if version := (*fileversion.Error)(nil); errors.As(cause, &version) {
		hint = version.Hint()
	}
	if errors.Is(cause, source.ErrGone) {
		hint = "the snapshot no longer exists, so the rest of the disk cannot be read in the state that the earlier copy read: name another snapshot, and start over with --force and without --resume"
	}
	return usage.WithHint(fmt.Errorf("--resume: the copy to %s cannot be continued: %w", j.Target, cause), hint)
}

// notThisTarget makes a usage error of a sink.OtherError, which says that the target is not
// that of the earlier copy. It returns any other error unchanged.
func notThisTarget(err error) error {
	if errors.As(err, new(*sink.OtherError)) {
		return usage.WithHint(fmt.Errorf("--resume: %w", err), "name the target of the copy that stopped, or run without --resume to start over on this one")
	}
	return err
}
