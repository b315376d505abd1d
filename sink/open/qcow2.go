package open

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"vddkcp/nbd"
	"vddkcp/sink"
	"vddkcp/sink/qcow2"
	"vddkcp/sink/raw"
)

// ofImages names an option that is there and does not go with raw disks.
func (o Options) ofImages() string {
	switch {
	case o.Compression != "" && o.Compression != "none":
		return "--compress " + o.Compression
	case o.ClusterSize != 0:
		return "--cluster-size"
	case o.BackingName != "":
		return "--backing"
	}
	return ""
}

func planQcow2(address string, size int64, o Options) (*Target, error) {
	kind := "file"
	info, err := os.Stat(address)
	switch {
	case address == "null:" || address == "-" || nbd.IsURI(address):
		return nil, usage("%s: qcow2 is written to files and block devices only, since its header is the last to be written", address)
	case size == sink.UnknownSize:
		return nil, usage("%s: a qcow2 image takes no stream whose size is not known: say --size", address)
	case o.Preallocation != "" && o.Preallocation != raw.PreallocateOff:
		return nil, usage("%s: --preallocation %s is for raw disks", address, o.Preallocation)
	case err == nil && info.Mode().Type() == fs.ModeDevice:
		kind = "block device"
	case err == nil && info.Mode().Type()&(fs.ModeNamedPipe|fs.ModeCharDevice) != 0:
		return nil, usage("%s: qcow2 can't be written to a stream, since its header is the last to be written; want a file or a block device", address)
	}
	q := qcow2.Options{
		Options: o.raw(), ClusterSize: o.ClusterSize, Compression: qcow2.Compression(o.Compression), Level: o.Level,
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
