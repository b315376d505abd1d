package job

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/vddkcp/vddkcp/internal/fileid"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/source"
)

// OpenSource opens the source of a copy in the same way as Run. It is for a caller that only
// reads the source. The caller closes the disk.
func OpenSource(ctx context.Context, spec Spec) (source.Disk, error) {
	j := newJob(spec)
	if err := j.Parse(); err != nil {
		return nil, err
	}
	return j.openSource(ctx)
}

// DescribeBacking returns a text that identifies the backing disk of the target. The text
// changes when the content of that disk changes. If the target is not an overlay, the text is
// "".
func DescribeBacking(ctx context.Context, spec Spec) string {
	if spec.Backing == "" {
		return ""
	}
	j := newJob(spec)
	defer j.close()
	if err := j.openBacking(ctx); err != nil {
		return fmt.Sprintf("cannot be read: %v", err)
	}
	b := j.overlay.identity
	return fmt.Sprintf("%s, %s, %s", b.Path, b.Format, b.Identity)
}

// CanResume reports whether a copy to this target can be resumed. It can if the target is a file, a
// block device or an NBD export.
func (s *Spec) CanResume() bool {
	if s.Parse() != nil {
		return false
	}
	switch sinkopen.PlaceOf(s.at.target).Kind {
	case "file", "block device", "NBD export":
		return true
	}
	return false
}

// WritesFile reports whether the target is a file that the copy creates.
func (s *Spec) WritesFile() bool {
	return s.Parse() == nil && sinkopen.PlaceOf(s.at.target).Kind == "file"
}

// Tidy removes the files that a killed process left next to a complete target. One of them is the
// journal. The other is the .partial file, if that file is only a second name of the complete
// target. If Tidy cannot remove a file, it logs a warning.
func Tidy(spec Spec) {
	j := newJob(spec)
	if !j.WritesFile() {
		return
	}
	place := sinkopen.PlaceOf(j.at.target)
	if id := fileid.MarkOf(place.Partial); id != "" && id == fileid.MarkOf(place.Path()) {
		if err := os.Remove(place.Partial); err != nil {
			j.Log.Warn("the .partial name of the target cannot be removed", "error", err)
		}
	}
	if err := os.Remove(j.journalOfFile(place)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		j.Log.Warn("the journal cannot be removed", "error", err)
	}
}

// keepOld keeps a file that already is at the path of the target. It gives this file a second name,
// TARGET.old, with a hard link, and allows the copy to replace the file. The data of the file then
// remains under the second name. If keepOld cannot make the link, it does not allow the copy to
// replace the file. The copy then fails later, with the error that the target exists.
func (j *job) keepOld() {
	place := sinkopen.PlaceOf(j.at.target)
	if place.Kind != "file" {
		return
	}
	path := place.Path()
	existing, err := os.Lstat(path)
	if err != nil {
		return
	}
	old := path + ".old"
	err = os.Link(path, old)
	if kept, _ := os.Lstat(old); kept != nil && os.SameFile(kept, existing) {
		err = nil // an earlier attempt made the link
	}
	if err != nil {
		j.warn(fmt.Sprintf("the file at the target cannot be kept as %s: %v", old, err))
		return
	}
	j.warn("the file that was at the target is kept as " + old)
	j.Force = true
}
