package open

import (
	"context"
	"errors"
	"os"

	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/qcow2"
	"github.com/vddkcp/vddkcp/sink/raw"
)

// DefaultClusterSize is the cluster size of a qcow2 target in bytes, if
// Options.ClusterSize is 0.
const DefaultClusterSize = qcow2.DefaultClusterSize

// planQcow2 plans an image in a file or on a block device.
func (p Place) planQcow2(size int64, o Options) (*Target, error) {
	path := p.Address.String()
	switch {
	case p.Kind != "file" && p.Kind != "block device" && p.Kind != "":
		return nil, usage.Errorf("%s: a qcow2 image can be written only to a file or a block device, not to this kind of target (%s), because the header of the image is written last", path, p.Kind)
	case size == sink.UnknownSize:
		return nil, usage.Errorf("%s: a disk of unknown size cannot be written to a qcow2 image: give the size with --size", path)
	case o.Preallocation != "" && o.Preallocation != raw.PreallocateOff:
		return nil, usage.Errorf("%s: --preallocation %s is for raw disks only", path, o.Preallocation)
	}
	method, level, err := "none", 0, error(nil)
	if o.Compress != "" {
		if method, level, err = parseCompress(o.Compress); err != nil {
			return nil, err
		}
	}
	// The size of a compressed image or an overlay is not known in advance,
	// so the free space is not checked.
	plain := method == "none" && o.BackingName == ""
	if !plain {
		o.Need = 0
	}
	options := func() qcow2.Options {
		return qcow2.Options{
			Options: o.raw(), ClusterSize: o.ClusterSize, Compression: qcow2.Compression(method), Level: level,
			BackingName: o.BackingName, BackingFormat: o.BackingFormat,
		}
	}
	if err := qcow2.Check(path, size, options()); err != nil {
		if errors.As(err, new(*qcow2.OptionError)) {
			return nil, usage.Errorf("%v", err)
		}
		return nil, err
	}
	t := &Target{
		Place: p, Format: "qcow2", Zeroed: o.BackingName == "", options: &o,
		CloneUnit: func(f *os.File) int64 { return qcow2.CloneUnit(path, f, options()) },
		create: func(ctx context.Context) (sink.Disk, error) {
			o.Warn = nil // Plan has warned already
			return qcow2.Create(ctx, path, size, options())
		},
	}
	if plain && p.Kind == "file" {
		t.reserve = func() error { return raw.CheckSpace(path, sink.UnknownSize, o.raw()) }
	}
	return t, nil
}
