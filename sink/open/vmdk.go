package open

import (
	"context"
	"fmt"

	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/sink"
	"github.com/vddkcp/vddkcp/sink/raw"
	"github.com/vddkcp/vddkcp/sink/vmdk"
)

// planVMDK plans a streamOptimized image. The file of the image is planned like a
// raw disk of unknown size.
func (p Place) planVMDK(size int64, o Options) (*Target, error) {
	address := p.Address.String()
	if size == sink.UnknownSize {
		return nil, usage.Errorf("%s: %v", address, vmdk.CheckSize(size))
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
		return nil, usage.Errorf("%s: --cluster-size is for qcow2 only: the grains of a streamOptimized VMDK always have 64KiB", address)
	case o.BackingName != "":
		return nil, usage.Errorf("%s: --backing is for qcow2 only: a streamOptimized VMDK always contains the whole disk", address)
	case o.Preallocation != "" && o.Preallocation != raw.PreallocateOff:
		return nil, usage.Errorf("%s: --preallocation %s is for raw targets only: a streamOptimized VMDK consists of compressed grains", address, o.Preallocation)
	case o.State != nil:
		return nil, usage.Errorf("%s: a streamOptimized VMDK cannot be resumed", address)
	}
	switch p.Kind {
	case "block device", "NBD export":
		return nil, usage.Errorf("%s: a streamOptimized VMDK is written to a file or a stream, not to this kind of target (%s)", address, p.Kind)
	}
	out := o
	out.Format = "raw"
	// The size of the compressed disk is not known in advance, so the free
	// space is not checked.
	out.Options, out.Need = sink.Options{}, 0
	t, err := p.planRaw(sink.UnknownSize, out)
	if err != nil {
		return nil, err
	}
	return &Target{Place: p, Format: "vmdk", Zeroed: true, options: t.options, create: func(ctx context.Context) (sink.Disk, error) {
		d, err := t.create(ctx)
		if err != nil {
			return nil, err
		}
		return vmdk.Create(ctx, d, address, size, vmdk.Options{Options: o.Options, Level: level})
	}}, nil
}

// zlibLevel returns the requested compression level for a VMDK. It returns 0 if
// no level is requested, which makes vmdk.Create use its default level.
func zlibLevel(compress string) (int, error) {
	if compress == "" {
		return 0, nil
	}
	method, level, err := parseCompress(compress)
	if err != nil {
		return 0, err
	}
	if method != "zlib" {
		return 0, usage.Errorf("--compress %s: the grains of a streamOptimized VMDK are compressed by zlib: want zlib or zlib:LEVEL", compress)
	}
	if level != 0 && (level < vmdk.MinLevel || level > vmdk.MaxLevel) {
		return 0, usage.Errorf("--compress %s: want a level from %d to %d", compress, vmdk.MinLevel, vmdk.MaxLevel)
	}
	return level, nil
}
