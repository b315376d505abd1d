package open

import (
	"context"
	"fmt"

	"vddkcp/sink"
	"vddkcp/sink/raw"
	"vddkcp/sink/vmdk"
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
	switch {
	case o.Compression != "" && o.Compression != "zlib":
		return nil, usage("%s: --compress %s: the grains of a streamOptimized VMDK are compressed by zlib, want zlib or zlib:LEVEL", address, o.Compression)
	case o.Level != 0 && (o.Level < vmdk.MinLevel || o.Level > vmdk.MaxLevel):
		return nil, usage("%s: compression level %d: want %d to %d", address, o.Level, vmdk.MinLevel, vmdk.MaxLevel)
	case o.ClusterSize != 0:
		return nil, usage("%s: --cluster-size is for qcow2: the grains of a streamOptimized VMDK have 64 KiB", address)
	case o.BackingName != "":
		return nil, usage("%s: --backing is for qcow2: a streamOptimized VMDK is always a whole disk", address)
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
		return vmdk.Create(ctx, d, address, size, vmdk.Options{Options: o.Options, Level: o.Level})
	}}, nil
}
