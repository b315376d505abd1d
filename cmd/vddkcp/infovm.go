package main

import (
	"context"

	"github.com/vddkcp/vddkcp/internal/address"
	"github.com/vddkcp/vddkcp/internal/usage"
	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// unknownSize is the value of imageInfo.Allocated for a disk that was not opened.
const unknownSize = -1

// describeVM describes a disk of a VM, or all its disks if the address names none and the VM has
// several. It asks only the server's inventory, and makes no snapshot.
func (c *infoCommand) describeVM(ctx context.Context, a address.VM, logs *logFlags) (*imageInfo, error) {
	outputs := new(outputs)
	outputs.add("--log-file", logs.LogFile)
	outputs.add("--nfc-trace", c.NFCTrace)
	if err := outputs.check(); err != nil {
		return nil, err
	}
	log, closeLog, err := logs.open(errorOutput, false)
	if err != nil {
		return nil, usage.Wrap(err)
	}
	defer closeLog()
	v, err := c.findVM(ctx, a.Name, c.sessionOptions(log))
	if err != nil {
		return nil, err
	}
	vm, err := v.vm.Describe(ctx)
	if err != nil {
		return nil, err
	}
	info := &imageInfo{Source: c.Src, Format: "vm", Allocated: unknownSize, HWVersion: vm.Version}
	if a.Disk == "" && len(vm.Disks) != 1 {
		for i := range vm.Disks {
			d := &vm.Disks[i]
			info.VirtualSize += d.Size
			shown := applianceDisk{Number: d.N, Name: d.Label, File: d.File, System: vm.Name, Format: string(d.Backing), Capacity: d.Size, Size: unknownSize}
			if !d.Verdict.CopyableIn(vm.Power) {
				shown.Error = d.Reason
			}
			info.Disks = append(info.Disks, shown)
		}
		return info, nil
	}
	d, err := inventory.FindDisk(vm, a.Disk)
	if err != nil {
		return nil, err
	}
	info.Subformat, info.VirtualSize, info.SectorSize = string(d.Backing), d.Size, 512
	info.UUID, info.AdapterType, info.Chain = d.UUID, d.Controller, []string{d.File}
	info.Identity = &diskIdentity{machine.Identity(v.server(), vm, d, nil), "none"}
	if !d.Verdict.CopyableIn(vm.Power) {
		info.Disks = []applianceDisk{{Number: d.N, Name: d.Label, File: d.File, System: vm.Name, Format: string(d.Backing), Capacity: d.Size, Size: unknownSize, Error: d.Reason}}
	}
	return info, nil
}
