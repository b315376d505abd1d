package open

import (
	"context"
	"errors"
	"os"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/qcow2"
	"github.com/vddkcp/vddkcp/sink/raw"
)

// DefaultClusterSize is the cluster size of a qcow2 target where Options have
// none, in bytes.
const DefaultClusterSize = qcow2.DefaultClusterSize

// planQcow2 plans an image in a file or on a block device.
func planQcow2(address string, size int64, o Options) (*Target, error) {
	kind := PlaceOf(address).Kind
	switch {
	case kind != "file" && kind != "block device" && kind != "":
		return nil, usage("%s: qcow2 is written to files and block devices only, not to this kind of target (%s): its header is the last to be written", address, kind)
	case size == sink.UnknownSize:
		return nil, usage("%s: a qcow2 image takes no stream whose size is not known: say --size", address)
	case o.Preallocation != "" && o.Preallocation != raw.PreallocateOff:
		return nil, usage("%s: --preallocation %s is for raw disks", address, o.Preallocation)
	}
	method, level, err := "none", 0, error(nil)
	if o.Compress != "" {
		if method, level, err = parseCompress(o.Compress); err != nil {
			return nil, err
		}
	}
	q := qcow2.Options{
		Options: o.raw(), ClusterSize: o.ClusterSize, Compression: qcow2.Compression(method), Level: level,
		BackingName: o.BackingName, BackingFormat: o.BackingFormat,
	}
	if q.Compression != "" && q.Compression != qcow2.None || q.BackingName != "" {
		q.Need = 0 // how much that takes is not known
	}
	if err := qcow2.Check(address, size, q); err != nil {
		var option *qcow2.OptionError
		if errors.As(err, &option) {
			return nil, usage("%v", err)
		}
		return nil, err
	}
	return &Target{
		Address: address, Format: "qcow2", Kind: kind, Zeroed: q.BackingName == "",
		CloneUnit: func(f *os.File) int64 { return qcow2.CloneUnit(address, f, q) },
		create: func(ctx context.Context) (sink.Disk, error) {
			q.Warn = nil // Plan has said it
			return qcow2.Create(ctx, address, size, q)
		},
	}, nil
}
