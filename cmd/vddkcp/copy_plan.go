package main

import (
	"fmt"
	"math"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/nbd/client"
	"github.com/vddkcp/vddkcp/sink"
	sinkopen "github.com/vddkcp/vddkcp/sink/open"
	sinkraw "github.com/vddkcp/vddkcp/sink/raw"
)

// patience is how long a copy waits for the extents before it begins to read:
// on a server each query takes a while.
func (j *job) patience() time.Duration {
	if address.IsRemote(j.at.source) && !j.DryRun {
		return 100 * time.Millisecond
	}
	return math.MaxInt64
}

// verifiable refuses --verify where nothing can be read back.
func (j *job) verifiable(target *sinkopen.Target) error {
	if j.Verify && (target.Kind == "stream" || target.Kind == "null") {
		return &usageError{
			err:  fmt.Errorf("--verify: %s can't be read back", target.Address),
			hint: "--digest tells what was written, to be compared on the other side",
		}
	}
	return nil
}

// warnOfSectors warns where the disk has sectors of more than 512 bytes and the
// target cannot record them: a guest that is given others finds no partitions.
func (j *job) warnOfSectors(target *sinkopen.Target) {
	n := j.info.GuestSector
	if n <= 512 || target.Format == "vmdk" || target.Kind == "null" {
		return
	}
	j.warn(fmt.Sprintf("%s has sectors of %d bytes, which a %s cannot record: give its guest a disk with sectors of that size (libvirt: <blockio logical_block_size='%d'/>)", j.Src, n, target, n))
}

// clusterSize is that of a qcow2 target, in bytes.
func (j *job) clusterSize() int64 {
	if j.ClusterSize != nil {
		return int64(*j.ClusterSize)
	}
	return sinkopen.DefaultClusterSize
}

// targetOptions are what the flags say of the target, which will take need
// bytes.
func (j *job) targetOptions(need int64, warn func(string)) sinkopen.Options {
	cluster := int64(0)
	if j.ClusterSize != nil {
		cluster = int64(*j.ClusterSize)
	}
	return sinkopen.Options{
		Options: sink.Options{Info: j.info, Backing: j.backing}, BackingName: j.Backing, BackingFormat: j.BackingFormat,
		Format: j.Format, Compress: j.Compress, ClusterSize: cluster,
		Force: j.Force, Preallocation: sinkraw.Preallocation(j.Preallocation),
		TargetIsZero: j.TargetIsZero, DropCache: j.drop(need), Need: need,
		Source: j.uses, Warn: warn, NBD: client.Options{Connections: int(j.Connections), Timeout: time.Duration(j.Timeout)},
	}
}

// uses returns the name of the file that is read, if fi is one.
func (j *job) uses(fi os.FileInfo) (path string, ok bool) {
	if path, ok = j.opener.Uses(fi); !ok {
		path, ok = j.backings.Uses(fi)
	}
	return path, ok
}

// drop says whether a copy of n bytes is kept out of the page cache.
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
