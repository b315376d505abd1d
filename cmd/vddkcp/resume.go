package main

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
	"time"

	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer/journal"
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
