package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/bytesize"
	"github.com/vddkcp/vddkcp/internal/printable"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/batch"
	"github.com/vddkcp/vddkcp/transfer/progress"
	"github.com/vddkcp/vddkcp/transfer/report"
)

type copyCommand struct {
	Src string `arg:"" name:"SRC" help:"The disk to copy: a VMDK, a qcow2, a raw file, a block device, a disk of an appliance (x.ova#1), an NBD URI, a disk on a host ([DATASTORE] DIR/DISK.vmdk), vddk:PATH, or - for standard input."`
	Dst string `arg:"" name:"DST" help:"Where to: a new file (x.qcow2 and x.vmdk say its format), a block device, an NBD URI, - for standard output, or null: to only read."`
	copyFlags

	at addresses `kong:"-"` // by checkAddresses
}

func (c *copyCommand) Run(ctx context.Context, logs *logFlags) error {
	counters := new(progress.Counters)
	style := progressStyle(c.Progress)
	display := progress.NewDisplay(style, displayOutput, c.Src, counters)
	asJSON := style == progress.JSON
	outputs := c.outputs(logs)
	if err := outputs.check(); err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	log, closeLog, err := logs.open(display, asJSON)
	if err != nil {
		return &usageError{err: err}
	}
	j := c.newJob(log, counters)
	j.outputs = outputs
	j.pause = pauseOf(display)
	c.secrets.pause = j.pause
	err = shown(display, func() error { return j.do(ctx) })
	if c.Report != "" {
		// What failed may have been opened before the outputs were checked.
		reported := outputs.checkOpened(j.opener, j.backings)
		if reported == nil {
			err = errors.Join(err, writeReport(j.report, c.Report))
		} else if !errors.As(err, new(*outputError)) {
			err = errors.Join(err, reported)
		}
	}
	if closed := closeLog(); closed != nil && err == nil {
		err = fmt.Errorf("log file: %w", closed)
	}
	if err != nil {
		fail(errorOutput, asJSON, err)
		return &reportedError{err}
	}
	return nil
}

// outputs are the files that the copy writes besides DST.
func (c *copyCommand) outputs(logs *logFlags) *outputs {
	o := new(outputs)
	o.add("--report", c.Report)
	o.add("--log-file", logs.LogFile)
	o.addOwn("--journal", c.Journal)
	if c.checkAddresses() == nil { // else the copy fails before it opens anything
		c.sourceFlags.protect(o, "SRC", c.at.source)
		o.protectTarget("DST", c.at.target)
	}
	if c.Backing != "" {
		if path, err := c.backingPath(); err == nil {
			o.protect("the backing", path)
		}
	}
	return o
}

// writeReport writes the report of one copy: JSON, or a page for people.
func writeReport(r *report.Report, path string) error {
	if isPage(path) {
		return batch.Single(r).Write(path)
	}
	return r.Write(path)
}

// progressStyle is what --progress asks for.
func progressStyle(flag string) progress.Style {
	switch {
	case flag == "none":
		return progress.None
	case flag == "json":
		return progress.JSON
	case flag == "bar" || errorTerminal():
		return progress.Bar
	}
	return progress.Lines
}

// shown runs work while the display shows it.
func shown(display interface{ Run(done <-chan struct{}) }, work func() error) error {
	done, drawn := make(chan struct{}), make(chan struct{})
	go func() {
		display.Run(done)
		close(drawn)
	}()
	defer func() {
		close(done)
		<-drawn
	}()
	return work()
}

// flatExtent is how VMware calls the files that hold nothing but a disk's
// bytes: vm-flat.vmdk, vm-f001.vmdk.
var flatExtent = regexp.MustCompile(`(?i)-(flat|f[0-9]{3,})\.vmdk$`)

// namedLike says what the name of a local source promises, "" for a disk of any
// kind. A fixed VHD that is cut has nothing else that tells it from a raw disk.
func namedLike(a address.Address) string {
	path := a.String()
	if address.IsRemote(a) || flatExtent.MatchString(path) {
		return ""
	}
	switch strings.ToLower(filepath.Ext(path)) {
	case ".vmdk":
		return "a VMDK"
	case ".qcow2", ".qcow":
		return "a qcow2 image"
	case ".vhd":
		return "a VHD"
	case ".vhdx":
		return "a VHDX"
	case ".vdi":
		return "a VirtualBox image"
	case ".gz", ".xz", ".zst", ".bz2", ".lz4":
		return "a compressed file"
	case ".zip", ".7z", ".tar", ".tgz":
		return "an archive"
	}
	return ""
}

func (j *job) printPlan(w io.Writer, plan *transfer.Plan, shared int64, target *sinkopen.Target) error {
	text := fmt.Sprintf("source: %s\ntarget: %s (%s)\nsize: %d bytes (%s)\nto copy: %d bytes (%s) in %d extents\n",
		printable.Name(j.Src), printable.Name(j.Dst), target, plan.Size, bytesize.Format(plan.Size), plan.Data, bytesize.Format(plan.Data), plan.Extents)
	if shared > 0 {
		text += fmt.Sprintf("of these shared: %d bytes (%s)\n", shared, bytesize.Format(shared))
	}
	holes := plan.Zero + plan.Inherited
	defer j.pause()()
	_, err := fmt.Fprintf(w, "%sholes: %d bytes (%s)\n", text, holes, bytesize.Format(holes))
	return err
}
