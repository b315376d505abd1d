package open

import (
	"context"
	"fmt"

	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/sink/vmdk"
)

// planVMDK plans an image whose bytes go where those of a raw disk of unknown
// size would.
func planVMDK(address string, size int64, o Options) (*Target, error) {
	if size == sink.UnknownSize {
		return nil, usage("%s: %v", address, vmdk.CheckSize(size))
	}
	if err := vmdk.CheckSize(size); err != nil {
		return nil, fmt.Errorf("%s: %w", address, err)
	}
	level, err := zlibLevel(o.Compress)
	if err != nil {
		return nil, err
	}
	switch {
	case o.ClusterSize != 0:
		return nil, usage("%s: --cluster-size is of qcow2: the grains of a streamOptimized VMDK have 64KiB", address)
	case o.BackingName != "":
		return nil, usage("%s: --backing is of qcow2: a streamOptimized VMDK is always whole", address)
	case o.Preallocation != "" && o.Preallocation != raw.PreallocateOff:
		return nil, usage("%s: --preallocation %s is for raw targets: a streamOptimized VMDK has nothing but compressed grains", address, o.Preallocation)
	case o.State != nil:
		return nil, usage("%s: a streamOptimized VMDK is written in one go and can't be resumed", address)
	}
	switch kind := PlaceOf(address).Kind; kind {
	case "block device", "NBD export":
		return nil, usage("%s: a streamOptimized VMDK is a file or a stream, not the content of this kind of target (%s)", address, kind)
	}
	out := o
	out.Format = "raw"
	// How much the compressed disk will take is not known.
	out.Options, out.Need = sink.Options{}, 0
	t, err := planRaw(address, sink.UnknownSize, out)
	if err != nil {
		return nil, err
	}
	create := t.create
	return &Target{Address: address, Format: "vmdk", Kind: t.Kind, Zeroed: true, create: func(ctx context.Context) (sink.Disk, error) {
		d, err := create(ctx)
		if err != nil {
			return nil, err
		}
		return vmdk.Create(ctx, d, address, size, vmdk.Options{Options: o.Options, Level: level})
	}}, nil
}

// zlibLevel is the level of a VMDK's compression, 0 for the default one.
func zlibLevel(compress string) (int, error) {
	if compress == "" {
		return 0, nil
	}
	method, level, err := parseCompress(compress)
	if err != nil {
		return 0, err
	}
	if method != "zlib" {
		return 0, usage("--compress %s: the grains of a streamOptimized VMDK are compressed by zlib, want zlib or zlib:LEVEL", compress)
	}
	if level != 0 && (level < vmdk.MinLevel || level > vmdk.MaxLevel) {
		return 0, usage("--compress %s: want a level from %d to %d", compress, vmdk.MinLevel, vmdk.MaxLevel)
	}
	return level, nil
}
