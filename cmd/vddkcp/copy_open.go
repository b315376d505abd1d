package main

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// addresses are the parsed addresses of a copy. backing is nil without --backing.
type addresses struct{ source, target, backing address.Address }

// checkAddresses parses the addresses of the copy, once.
func (c *copyCommand) checkAddresses() (err error) {
	if c.at.target != nil {
		return nil
	}
	var at addresses
	if at.source, err = address.Parse(c.Src, address.Source); err != nil {
		return err
	}
	if at.target, err = address.Parse(c.Dst, address.Target); err != nil {
		return err
	}
	if c.Backing != "" {
		if at.backing, err = address.Parse(c.Backing, address.Disk); err != nil {
			return fmt.Errorf("--backing: %w", err)
		}
		if address.IsRemote(at.backing) {
			return &usageError{err: fmt.Errorf("--backing: %s: a qcow2 overlay names a file as its backing", c.Backing), hint: "a file of that name is ./" + c.Backing}
		}
	}
	c.at = at
	return nil
}

// backingPath returns the path of --backing, which a relative one starts from the
// folder of DST for.
func (c *copyCommand) backingPath() (string, error) {
	if filepath.IsAbs(c.Backing) {
		return c.Backing, nil
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(c.Dst))
	if err != nil {
		return "", fmt.Errorf("the folder of %s: %w", c.Dst, err)
	}
	return dir + "/" + c.Backing, nil
}

// openBacking opens the disk of --backing, which a reader of the target will
// find by the same name. It fills in its format where that was not said.
func (j *job) openBacking(ctx context.Context) (done func(), err error) {
	if j.Backing == "" {
		return func() {}, nil
	}
	path, err := j.backingPath()
	if err != nil {
		return nil, err
	}
	d, err := j.backings.Open(ctx, path, j.BackingFormat)
	if err != nil {
		return nil, fmt.Errorf("--backing: %w", err)
	}
	if i, ok := source.Ability[source.Described](d); ok && j.BackingFormat == "" {
		j.BackingFormat = i.Info().Format
	}
	if w, ok := source.Ability[sourceopen.Warned](d); ok {
		for _, message := range w.Warnings() {
			j.warn(message)
		}
	}
	j.backing = d
	if j.overlaid, err = describeBacking(ctx, d, path, j.BackingFormat); err != nil {
		return nil, errors.Join(fmt.Errorf("--backing: %w", err), d.Close())
	}
	return func() { d.Close() }, nil
}

// reopenBacking opens what --backing names now.
func (j *job) reopenBacking(ctx context.Context) (source.Disk, error) {
	path, err := j.backingPath()
	if err != nil {
		return nil, err
	}
	return j.backings.Open(ctx, path, j.BackingFormat)
}

// describeBacking says which disk the backing at path is.
func describeBacking(ctx context.Context, d source.Disk, path, format string) (*journal.Backing, error) {
	b := &journal.Backing{Format: format}
	var err error
	if b.Identity, b.Proof, err = identify(ctx, d); err != nil {
		return nil, err
	}
	if path, err = filepath.EvalSymlinks(path); err != nil {
		return nil, err
	}
	b.Path, err = filepath.Abs(path)
	return b, err
}

// verifyManifest holds a disk of an appliance against the manifest, with
// --verify: before the copy, which need not begin when the appliance is damaged.
func (j *job) verifyManifest(ctx context.Context, src source.Disk) error {
	m, ok := source.Ability[sourceopen.Manifest](src)
	if !j.Verify || !ok {
		return nil
	}
	j.counters.Enter(progress.Verify)
	err := m.VerifyManifest(ctx)
	if errors.Is(err, sourceopen.ErrNoManifest) {
		j.warn(fmt.Sprintf("the source can't be verified, only the copy of it: %v", err))
		return nil
	}
	if err != nil {
		return fmt.Errorf("verify the source: %w", err)
	}
	j.log.Debug("the manifest agrees")
	return nil
}

// describeSource fills in what the report says of the source.
func (j *job) describeSource(src source.Disk, plan *transfer.Plan) {
	j.report.Transport, j.report.Connections = "file", 1
	j.report.ExtentsSource = "map"
	if plan.Data == plan.Size {
		j.report.ExtentsSource = "full"
	}
	if w, ok := source.Ability[sourceopen.Warned](src); ok {
		for _, message := range w.Warnings() {
			j.warn(message)
		}
	}
	if d, ok := source.Ability[source.Described](src); ok {
		info := d.Info()
		if what := namedLike(j.at.source); info.Format == "raw" && j.SourceFormat == "" && what != "" {
			j.warn(fmt.Sprintf("%s is named like %s and is none: it is copied as a raw disk (--source-format raw says that this is right)", j.Src, what))
		}
		j.log.Debug("source", "format", info.Format, "subformat", info.Subformat, "size", src.Size(), "chain", strings.Join(info.Chain, " <- "))
	}
	j.log.Debug("plan", "data", plan.Data, "zero", plan.Zero, "extents", plan.Extents)
}

// identify returns the identity of a disk, and by what it is proved.
func identify(ctx context.Context, d source.Disk) (id, proof string, err error) {
	i, ok := source.Ability[source.Identified](d)
	if !ok {
		return "", "none", nil
	}
	return i.Identity(ctx)
}

// countSource fills in what the report says of how the source was read, and
// shows what VDDK warned of before a copy failed with err.
func (j *job) countSource(err error) {
	if j.source == nil {
		return
	}
	if c, ok := source.Ability[source.Counted](j.source); ok {
		s := c.Stats()
		j.report.Transport, j.report.VDDKVersion, j.report.Connections = s.Transport, s.Library, s.Connections
		j.report.Retries, j.report.WorkerRestarts = s.Retries, s.Restarts
		if s.ExtentsSource != "" {
			j.report.ExtentsSource = s.ExtentsSource
		}
	}
	if err == nil {
		return
	}
	if l, ok := source.Ability[interface{ LastWarnings() []string }](j.source); ok {
		for _, line := range l.LastWarnings() {
			j.log.Warn("VDDK said: " + line)
		}
	}
}
