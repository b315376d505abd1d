package job

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	"github.com/vddkcp/vddkcp/source"
	"github.com/vddkcp/vddkcp/transfer"
)

// planCopy plans the target and the source. It returns all errors that can be found before data
// is read or written.
func (j *job) planCopy(ctx context.Context) (err error) {
	if err := j.matchEarlier(ctx); err != nil {
		return err
	}
	// The target is planned first, because querying the extents of the source can take minutes.
	// After this query it is known how much space the copy needs. The call of j.reserve below
	// then tells the target.
	if err := j.planTarget(ctx); err != nil {
		return notThisTarget(err)
	}
	if err := j.planSource(ctx); err != nil {
		return err
	}
	if err := j.reserve(); err != nil {
		return err
	}
	j.report.Format = j.target.Format
	j.warnOfSectors()
	return j.verifiable(j.target)
}

// planSource finds out how much data the source has, and how much of this data needs no copying,
// because the target can share blocks with the source.
func (j *job) planSource(ctx context.Context) (err error) {
	if j.plan, err = transfer.NewPlanWithin(ctx, j.source, j.patience(), j.Counters); err != nil {
		return err
	}
	if id := j.plan.Identity(); id != j.copied.Source {
		return fmt.Errorf("%w: its identity was %s and is now %s", transfer.ErrSourceChanged, j.copied.Source, id)
	}
	if j.plan.Inherited > 0 && j.overlay.disk == nil {
		return usage.New(fmt.Sprintf("--single-link: %d bytes of %s are only in its parents, and a target without --backing cannot refer to the parents", j.plan.Inherited, j.Source),
			"copy without --single-link to read them from the parents")
	}
	j.describeSource()
	j.shared, err = transfer.Shared(ctx, j.source, j.plan, j.Reflink, j.target.CloneUnit)
	if errors.Is(err, transfer.ErrNotShared) {
		return hinted.Error(err, "use --reflink auto, which shares what can be shared and copies the rest")
	}
	return err
}

// The method patience returns how long a copy may query the extents of the source before it begins
// to read. If this time is too short for all extents, the copy queries the remaining ones later,
// while it reads. A server takes some time for each query, and the copy must not wait for all of
// them.
func (j *job) patience() time.Duration {
	if j.remote() && !j.dry {
		return 100 * time.Millisecond
	}
	return math.MaxInt64
}

// planTarget plans the target. If j.entries has checkpoints, the copy continues at the newest of
// them. If it has none, the copy starts from the beginning.
func (j *job) planTarget(ctx context.Context) (err error) {
	j.target, err = j.place.Plan(ctx, j.source.Size(), j.resumeOptions(j.targetOptions(j.warn)))
	return err
}

// reserve tells the planned target how many bytes the copy will write. The target returns an
// error if the file system has too little space for them.
func (j *job) reserve() error {
	data := j.plan.Data - j.shared
	j.need = data
	if len(j.entries) > 0 {
		j.need = min(data, j.plan.DataFrom(j.entries[0].Offset))
	}
	if j.drop(data) {
		j.target.DropCache()
	}
	return j.target.Reserve(data)
}

// targetOptions returns the options of the target, except those for continuing an earlier copy.
func (j *job) targetOptions(warn func(string)) sinkopen.Options {
	o := sinkopen.Options{
		Options: sink.Options{Info: j.info, Backing: j.overlay.disk}, BackingName: j.Backing, BackingFormat: j.BackingFormat,
		Format: j.Format, Compress: j.Compress, ClusterSize: j.ClusterSize,
		Force: j.Force, Preallocation: j.Preallocation, TargetIsZero: j.TargetIsZero, Source: j.uses, Warn: warn,
	}
	o.NBD.Connections, o.NBD.Timeout = j.Connections, j.Timeout
	return o
}

// clusterSize returns the cluster size of a qcow2 target, in bytes.
func (j *job) clusterSize() int64 { return cmp.Or(j.ClusterSize, sinkopen.DefaultClusterSize) }

// The method uses reports whether a file is one of those that the copy reads. The parameter fi is
// the result of a Stat of the file. If the copy reads the file, the result path is the path by which
// the copy reads it.
func (j *job) uses(fi os.FileInfo) (path string, ok bool) {
	if path, ok = j.Opener.Uses(fi); !ok {
		path, ok = j.BackingOpener.Uses(fi)
	}
	return path, ok
}

// The method drop reports whether a copy of n bytes removes its data from the page cache.
// Spec.Cache decides this. If Spec.Cache is "", the data is removed if n is more than a quarter of
// the machine's memory.
func (j *job) drop(n int64) bool {
	if j.Cache != "" {
		return j.Cache == "drop"
	}
	var memory unix.Sysinfo_t
	if err := unix.Sysinfo(&memory); err != nil {
		return false
	}
	return n > int64(memory.Totalram)*int64(memory.Unit)/4
}

// readUncached makes the source bypass the page cache if the copy must leave no data in the page
// cache.
func (j *job) readUncached() {
	if !j.drop(j.plan.Data - j.shared) {
		return
	}
	if u, ok := source.Ability[source.Uncached](j.source); ok {
		u.ReadUncached()
	}
}

// warnOfSectors warns if the disk has sectors of more than 512 bytes and the target cannot
// record their size. A guest that gets the disk with another sector size finds no partitions.
func (j *job) warnOfSectors() {
	n := j.info.GuestSector
	if n <= 512 || j.target.Format == "vmdk" || j.target.Kind == "null" {
		return
	}
	j.warn(fmt.Sprintf("%s has sectors of %d bytes, which a %s cannot record: attach it to its guest with sectors of that size (libvirt: <blockio logical_block_size='%d'/>)", j.Source, n, j.target, n))
}

// verifiable returns an error if Verify is set for a target that cannot be read back.
func (j *job) verifiable(target *sinkopen.Target) error {
	if j.Verify && (target.Kind == "stream" || target.Kind == "null") {
		return usage.New(fmt.Sprintf("--verify: %s cannot be read back", target.Address), "use --digest, which prints a digest of the data that can be compared with that of the target")
	}
	return nil
}

// checkTarget checks a planned target as far as this is possible without creating it.
func (j *job) checkTarget(ctx context.Context) error {
	err := j.target.Check(ctx)
	if errors.Is(err, errors.ErrUnsupported) {
		j.warn(fmt.Sprintf("the target is not checked: %v", err))
		return nil
	}
	return err
}
