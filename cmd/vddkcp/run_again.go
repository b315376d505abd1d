package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"

	"github.com/vddkcp/vddkcp/internal/fileid"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// backing describes the disk that the target of a job is an overlay of; "" where
// it is none.
func (b *batchRun) backing(j *batch.Job) string {
	if j.Text("backing") == "" {
		return ""
	}
	c := b.newJob(j)
	done, err := c.openBacking(context.Background())
	if err != nil {
		return fmt.Sprintf("cannot be read: %v", err)
	}
	defer done()
	o := c.overlaid
	return fmt.Sprintf("%s, %s, %s", o.Path, o.Format, o.Identity)
}

// newJob returns the copy of a job, which only looks at disks.
func (b *batchRun) newJob(j *batch.Job) *job {
	return b.command(j).newJob(slog.New(slog.DiscardHandler), new(progress.Counters))
}

// removeJournal removes what is left beside the target of a copy that is whole:
// its journal, and its first name where the second one was given by a link.
func (b *batchRun) removeJournal(j *batch.Job) {
	c := b.command(j)
	place := sinkopen.PlaceOf(c.at.target)
	if place.Kind != "file" {
		return
	}
	if id := fileid.MarkOf(place.Partial); id != "" && id == fileid.MarkOf(place.Path()) {
		if err := os.Remove(place.Partial); err != nil {
			b.log.Warn("the first name of the target stays", "job", j.Name, "error", err)
		}
	}
	path := c.Journal
	if path == "" {
		path = journal.Beside(place.Partial)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		b.log.Warn("the journal stays", "job", j.Name, "error", err)
	}
}

// keepOld gives the file that is at the target another name besides, so that it can
// be replaced and nothing is lost of it. Where it can't, the copy finds it in the
// way.
func (j *job) keepOld(place sinkopen.Place) {
	if place.Kind != "file" {
		return
	}
	path := place.Path()
	there, err := os.Lstat(path)
	if err != nil {
		return
	}
	old := path + ".old"
	err = os.Link(path, old)
	if kept, _ := os.Lstat(old); kept != nil && os.SameFile(kept, there) {
		err = nil // by an earlier attempt
	}
	if err != nil {
		j.warn(fmt.Sprintf("what is at the target can't be kept as %s: %v", old, err))
		return
	}
	j.warn("what was at the target stays as " + old)
	j.Force = true
}
