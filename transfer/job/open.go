package job

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/observer"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/source"
	sourceopen "github.com/vddkcp/vddkcp/source/open"
	"github.com/vddkcp/vddkcp/transfer/journal"
	"github.com/vddkcp/vddkcp/transfer/progress"
)

// The type addresses holds the parsed addresses of a copy. The field source is nil if Spec.OpenDisk
// opens the source. The field backing is nil if the target has no backing disk.
type addresses struct{ source, target, backing address.Address }

// Parse parses the addresses of the copy. Run and Plan call it. A caller that needs the error of
// Parse earlier can call Parse itself. After a successful call, further calls do nothing.
func (s *Spec) Parse() (err error) {
	if s.at.target != nil {
		return nil
	}
	var at addresses
	if s.OpenDisk == nil {
		if at.source, err = address.Parse(s.Source, address.Source); err != nil {
			return err
		}
	}
	if at.target, err = address.Parse(s.Target, address.Target); err != nil {
		return err
	}
	if s.Backing != "" {
		if at.backing, err = address.Parse(s.Backing, address.Disk); err != nil {
			return fmt.Errorf("--backing: %w", err)
		}
		if address.IsRemote(at.backing) {
			return usage.New(fmt.Sprintf("--backing: %s: the backing of a qcow2 overlay must be a file", s.Backing), "for a file of that name write ./"+s.Backing)
		}
	}
	s.at = at
	return nil
}

// BackingPath returns the path of the backing disk. If Backing is a relative path, BackingPath
// resolves it from the folder of Target, and resolves the symbolic links of this folder first. The
// programs that read an overlay resolve a relative path in the same way.
func (s *Spec) BackingPath() (string, error) {
	if filepath.IsAbs(s.Backing) {
		return s.Backing, nil
	}
	dir, err := filepath.EvalSymlinks(filepath.Dir(s.Target))
	if err != nil {
		return "", fmt.Errorf("cannot resolve the folder of %s: %w", s.Target, err)
	}
	return dir + "/" + s.Backing, nil
}

// prepareOpeners sets those options of the openers that belong to this copy, such as the log.
func (j *job) prepareOpeners() {
	if j.Opener == nil {
		j.Opener = new(sourceopen.Opener)
	}
	if j.BackingOpener == nil {
		j.BackingOpener = new(sourceopen.Opener)
	}
	o := j.Opener
	o.SingleLink = j.SingleLink
	o.NBD.Connections, o.NBD.Warn, o.NBD.Log = j.Connections, j.warn, j.Log
	o.Retry.OnRetry = retry.LogTo(j.Log, "reading is tried again")
	if o.VDDK == nil {
		return
	}
	v := &o.VDDK.Options
	v.Connections, v.RequestSize, v.Depth, v.Log, v.Warn = j.Connections, j.RequestSize, j.Depth, j.Log, j.warn
}

// The method open opens the source and the backing disk. The method close closes both.
func (j *job) open(ctx context.Context) (err error) {
	ctx = j.observe(ctx)
	if j.source, err = j.openSource(ctx); err != nil {
		return err
	}
	j.report.VirtualSize = j.source.Size()
	if d, ok := source.Ability[source.Described](j.source); ok {
		j.info = d.Info()
	}
	if err = j.openBacking(ctx); err == nil && j.Opened != nil {
		err = j.Opened()
	}
	if err != nil {
		j.close()
	}
	return err
}

// The method observe returns a context for opening the source. With this context, the source
// reports its connections and its waits to the counters.
func (j *job) observe(ctx context.Context) context.Context {
	var mu sync.Mutex
	open := 0
	return observer.With(ctx, observer.Observer{
		Connections: func(n int) {
			mu.Lock()
			defer mu.Unlock()
			open += n
			j.Counters.SetConnections(open)
		},
		Waiting: func(n int) {
			if n > 0 {
				j.Counters.Begin(progress.WaitHostBudget)
			} else {
				j.Counters.End(progress.WaitHostBudget)
			}
		},
	})
}

func (j *job) openSource(ctx context.Context) (source.Disk, error) {
	if j.OpenDisk != nil {
		return j.OpenDisk(ctx, j.Opener)
	}
	return j.Opener.OpenAddress(ctx, j.at.source, j.SourceFormat)
}

// The method remote reports whether the source is on a server.
func (j *job) remote() bool { return j.OpenDisk != nil || address.IsRemote(j.at.source) }

func (j *job) close() {
	j.overlay.close()
	if j.source != nil {
		j.source.Close()
	}
}

// The type overlay holds the open backing disk of a target that is an overlay. For any other target
// it is the zero value.
type overlay struct {
	disk     source.Disk
	identity *journal.Backing
}

func (o *overlay) close() {
	if o.disk != nil {
		o.disk.Close()
	}
}

// openBacking opens the backing disk, by the path that a reader of the target will use. If
// Spec.BackingFormat is empty, openBacking sets it.
func (j *job) openBacking(ctx context.Context) error {
	if j.Backing == "" {
		return nil
	}
	path, err := j.BackingPath()
	if err != nil {
		return err
	}
	d, err := j.BackingOpener.Open(ctx, path, j.BackingFormat)
	if err != nil {
		return fmt.Errorf("--backing: %w", err)
	}
	if i, ok := source.Ability[source.Described](d); ok && j.BackingFormat == "" {
		j.BackingFormat = i.Info().Format
	}
	j.warnOf(d)
	j.overlay.disk = d
	if j.overlay.identity, err = describeBacking(ctx, d, path, j.BackingFormat); err != nil {
		return fmt.Errorf("--backing: %w", err)
	}
	return nil
}

// reopenBacking opens the file that is now at the path of the backing disk. Since the beginning of
// the copy, another file may have taken this path.
func (j *job) reopenBacking(ctx context.Context) (source.Disk, error) {
	path, err := j.BackingPath()
	if err != nil {
		return nil, err
	}
	return j.BackingOpener.Open(ctx, path, j.BackingFormat)
}

// describeBacking returns a description of an open backing disk. The journal stores this
// description.
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

// identify returns the identity of a disk. The result proof says why a disk with an unchanged
// identity also has unchanged content: "snapshot", "mtime", or "none" if the content may have
// changed (see source.Identified).
func identify(ctx context.Context, d source.Disk) (id, proof string, err error) {
	i, ok := source.Ability[source.Identified](d)
	if !ok {
		return "", "none", nil
	}
	return i.Identity(ctx)
}

// warnOf logs a warning for each fault that was found when the disk d was opened, and adds these
// warnings to the report.
func (j *job) warnOf(d source.Disk) {
	if w, ok := source.Ability[sourceopen.Warned](d); ok {
		for _, message := range w.Warnings() {
			j.warn(message)
		}
	}
}

// describeSource sets the fields of the report that are known before data is read. It warns
// about a raw source whose name has the ending of another format.
func (j *job) describeSource() {
	j.report.Transport, j.report.Connections = "file", 1
	j.report.ExtentsSource = "map"
	if j.plan.Data == j.plan.Size {
		j.report.ExtentsSource = "full"
	}
	j.warnOf(j.source)
	if d, ok := source.Ability[source.Described](j.source); ok {
		info := d.Info()
		if what := j.formatByName(); info.Format == "raw" && j.SourceFormat == "" && what != "" {
			j.warn(fmt.Sprintf("%s has the name of %s but is none: it is copied as a raw disk (confirm with --source-format raw)", j.Source, what))
		}
		j.Log.Debug("source", "format", info.Format, "subformat", info.Subformat, "size", j.source.Size(), "chain", strings.Join(info.Chain, " <- "))
	}
	j.Log.Debug("plan", "data", j.plan.Data, "zero", j.plan.Zero, "extents", j.plan.Extents)
}

// formatByName returns the format that the name of the source file suggests, or "" if the name
// suggests none or the source is on a server.
func (j *job) formatByName() string {
	if j.remote() {
		return ""
	}
	return sourceopen.FormatByName(j.at.source)
}

// verifyManifest compares a disk of an appliance with the checksum in the appliance's manifest,
// if Verify is set. This is done before the copy, because a copy of a damaged appliance is
// useless.
func (j *job) verifyManifest(ctx context.Context) error {
	m, ok := source.Ability[sourceopen.Manifest](j.source)
	if !j.Verify || !ok {
		return nil
	}
	j.Counters.Enter(progress.Verify)
	err := m.VerifyManifest(ctx)
	if errors.Is(err, sourceopen.ErrNoManifest) {
		j.warn(fmt.Sprintf("the source cannot be verified, only the copy: %v", err))
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot verify the source: %w", err)
	}
	j.Log.Debug("the disk matches the manifest")
	return nil
}

// countSource sets the fields of the report that say how the source was read. After a failure
// it also logs the last warnings that the VDDK library gave.
func (j *job) countSource(failed bool) {
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
	if !failed {
		return
	}
	if l, ok := source.Ability[interface{ LastWarnings() []string }](j.source); ok {
		for _, line := range l.LastWarnings() {
			j.Log.Warn("VDDK said: " + line)
		}
	}
}
