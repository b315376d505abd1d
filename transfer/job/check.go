package job

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/fileid"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/transfer/journal"
)

// CheckTarget checks the target of a copy of a disk of the given size in bytes. It opens no source and
// writes nothing. It is for a caller that must know before it opens the source whether the target can
// be written. With drop, an existing .partial file is no error, because the caller will call Discard.
func CheckTarget(ctx context.Context, spec Spec, size int64, drop bool) error {
	j := newJob(spec)
	j.dry = true
	if err := j.Parse(); err != nil {
		return err
	}
	if err := j.findEarlier(); err != nil {
		return err
	}
	j.stale = j.stale || drop
	if _, err := os.Lstat(j.place.Path()); err == nil && j.KeepOld && j.place.Kind == "file" {
		j.Force = true // the copy will keep the file under another name
	}
	target, err := j.place.Plan(ctx, size, j.resumeOptions(j.targetOptions(func(string) {})))
	if err != nil {
		return notThisTarget(err)
	}
	j.target = target
	if err := j.verifiable(target); err != nil {
		return err
	}
	return j.checkTarget(ctx)
}

// EarlierSource returns the identity of the disk that an earlier run has copied in part, according to
// the journal of the target. It is "" if there is no such journal.
func EarlierSource(spec Spec) string {
	j := newJob(spec)
	if j.Parse() != nil {
		return ""
	}
	j.place = sinkopen.PlaceOf(j.at.target)
	if resumable, err := j.placeJournal(); err != nil || !resumable {
		return ""
	}
	entries, err := journal.Load(j.path)
	if err != nil {
		return ""
	}
	for _, e := range entries {
		if e.Offset > 0 {
			return e.Source
		}
	}
	return ""
}

// TargetOf returns the format and kind of the target of a copy, such as "raw file". It is "" if the
// address of the target is invalid.
func TargetOf(spec Spec) string {
	place := placeOf(spec.Target)
	if place.Kind == "" {
		return ""
	}
	return place.Format(spec.Format) + " " + place.Kind
}

// Discard removes the .partial file and the journal that an earlier run has left at the target. It
// does nothing if the target is not a file: the journal of a device or export is kept, because it
// says that the target may not read as zeros.
func Discard(spec Spec) error {
	j := newJob(spec)
	if err := j.Parse(); err != nil {
		return err
	}
	place := sinkopen.PlaceOf(j.at.target)
	if place.Kind != "file" {
		return nil
	}
	for _, path := range []string{place.Partial, j.journalOfFile(place)} {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// Partial returns the path of the .partial file at the target, or "" if there is no such file.
func Partial(target string) string {
	place := placeOf(target)
	if place.Kind != "file" {
		return ""
	}
	if _, err := os.Lstat(place.Partial); err != nil {
		return ""
	}
	return place.Partial
}

// Seal returns a text that changes when somebody writes to the target of a copy with Spec.Hold, or
// replaces it. It does not change when the target gets its final name. The parameter mark is what the
// copy passed to Spec.Whole. If it is "", the target is not a file, and the result is "".
func Seal(target, mark string) string {
	if mark == "" {
		return ""
	}
	place := placeOf(target)
	for _, path := range []string{place.Path(), place.Partial} {
		if fi, err := os.Stat(path); err == nil && fileid.MarkOf(path) == mark {
			return fmt.Sprintf("%d bytes, written %d", fi.Size(), fi.ModTime().UnixNano())
		}
	}
	return "missing"
}

// Published reports whether a target that was held has its final name. The parameter mark is what the
// copy passed to Spec.Whole. If it is "", the target is not a file, and the result is true.
func Published(target, mark string) bool {
	return mark == "" || mark == fileid.MarkOf(placeOf(target).Path())
}

// placeOf returns the place of a target. It is the zero value if the address is invalid.
func placeOf(target string) sinkopen.Place {
	a, err := address.Parse(target, address.Target)
	if err != nil {
		return sinkopen.Place{}
	}
	return sinkopen.PlaceOf(a)
}
