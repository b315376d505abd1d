package vsphere

import (
	"fmt"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// describeDisks returns the disks among the devices of a VM or of a snapshot, without verdicts. The
// numbers of the disks follow the order of the devices.
func describeDisks(devices []types.BaseVirtualDevice, known *tables) []inventory.Disk {
	buses := make(map[int32]bus)
	for _, device := range devices {
		if b, ok := describeBus(device); ok {
			buses[device.GetVirtualDevice().Key] = b
		}
	}
	disks := []inventory.Disk{}
	for _, device := range devices {
		v, ok := device.(*types.VirtualDisk)
		if !ok {
			continue
		}
		d := inventory.Disk{N: len(disks) + 1, Key: v.Key, Unit: -1, Size: v.CapacityInBytes}
		if d.Size == 0 {
			d.Size = v.CapacityInKB * 1024 // servers before vSphere 5.5 do not know the capacity in bytes
		}
		if v.UnitNumber != nil {
			d.Unit = *v.UnitNumber
		}
		if v.DeviceInfo != nil {
			d.Label = v.DeviceInfo.GetDescription().Label
		}
		b := buses[v.ControllerKey]
		d.Controller, d.Sharing = b.name, b.sharing
		if describeBacking(&d, v.Backing, known) == string(types.VirtualDiskSharingSharingMultiWriter) {
			d.Sharing = inventory.MultiWriter
		}
		disks = append(disks, d)
	}
	return disks
}

// bus is a controller of disks.
type bus struct {
	name    string // such as "scsi0"
	sharing inventory.Sharing
}

// describeBus describes a device that is a controller of disks.
func describeBus(device types.BaseVirtualDevice) (bus, bool) {
	controller, ok := device.(types.BaseVirtualController)
	if !ok {
		return bus{}, false
	}
	number := controller.GetVirtualController().BusNumber
	named := func(kind string) string { return fmt.Sprintf("%s%d", kind, number) }
	switch c := device.(type) {
	case types.BaseVirtualSCSIController:
		return bus{named("scsi"), describeSharedBus(string(c.GetVirtualSCSIController().SharedBus))}, true
	case types.BaseVirtualSATAController:
		return bus{name: named("sata")}, true
	case *types.VirtualNVMEController:
		return bus{named("nvme"), describeSharedBus(c.SharedBus)}, true
	case *types.VirtualIDEController:
		return bus{name: named("ide")}, true
	}
	return bus{name: named("controller")}, true
}

func describeSharedBus(mode string) inventory.Sharing {
	switch types.VirtualSCSISharing(mode) {
	case types.VirtualSCSISharingVirtualSharing:
		return inventory.VirtualBus
	case types.VirtualSCSISharingPhysicalSharing:
		return inventory.PhysicalBus
	}
	return inventory.NotShared
}

// describeBacking sets the fields of d that the backing of the disk decides. It returns the mode in
// which the backing is shared.
func describeBacking(d *inventory.Disk, backing types.BaseVirtualDeviceBackingInfo, known *tables) (sharing string) {
	var key *types.CryptoKeyId
	d.Backing = inventory.Unknown
	switch b := backing.(type) {
	case *types.VirtualDiskFlatVer2BackingInfo:
		d.Backing, d.Mode, d.UUID, d.ChangeID, key, sharing = inventory.Flat, b.DiskMode, b.Uuid, b.ChangeId, b.KeyId, b.Sharing
	case *types.VirtualDiskSparseVer2BackingInfo:
		d.Backing, d.Mode, d.UUID, d.ChangeID, key = inventory.Sparse, b.DiskMode, b.Uuid, b.ChangeId, b.KeyId
	case *types.VirtualDiskSeSparseBackingInfo:
		d.Backing, d.Mode, d.UUID, d.ChangeID, key = inventory.SeSparse, b.DiskMode, b.Uuid, b.ChangeId, b.KeyId
	case *types.VirtualDiskFlatVer1BackingInfo: // versions 1 have neither a UUID nor a change ID
		d.Backing, d.Mode = inventory.Flat, b.DiskMode
	case *types.VirtualDiskSparseVer1BackingInfo:
		d.Backing, d.Mode = inventory.Sparse, b.DiskMode
	case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
		d.Backing, d.Mode, d.UUID, d.ChangeID, sharing = inventory.RDMPhysical, b.DiskMode, b.Uuid, b.ChangeId, b.Sharing
		if b.CompatibilityMode == string(types.VirtualDiskCompatibilityModeVirtualMode) {
			d.Backing = inventory.RDMVirtual
		}
		if d.LUN = b.LunUuid; d.LUN == "" {
			d.LUN = b.DeviceName
		}
	case *types.VirtualDiskLocalPMemBackingInfo:
		d.Backing, d.Mode, d.UUID = inventory.PMem, b.DiskMode, b.Uuid
	case *types.VirtualDiskRawDiskVer2BackingInfo: // a device of a hosted product, without the name of a datastore
		d.UUID, d.ChangeID, d.File, sharing = b.Uuid, b.ChangeId, b.DescriptorFileName, b.Sharing
	}
	d.Encrypted = key != nil
	if file, ok := backing.(types.BaseVirtualDeviceFileBackingInfo); ok {
		info := file.GetVirtualDeviceFileBackingInfo()
		d.File = info.FileName
		store := known.store(info.Datastore, info.FileName)
		d.Datastore, d.DatastoreType = store.Name, store.Type
	}
	return sharing
}

// describeNICs returns the network adapters among the devices of a VM.
func describeNICs(devices []types.BaseVirtualDevice, known *tables) []inventory.NIC {
	nics := []inventory.NIC{}
	for _, device := range devices {
		card, ok := device.(types.BaseVirtualEthernetCard)
		if !ok {
			continue
		}
		v := card.GetVirtualEthernetCard()
		nics = append(nics, inventory.NIC{MAC: v.MacAddress, Network: describeNetwork(v.Backing, known), Type: describeAdapter(device)})
	}
	return nics
}

// describeNetwork returns the name of the network of a network adapter, or the server's ID of it if
// the name is unknown.
func describeNetwork(backing types.BaseVirtualDeviceBackingInfo, known *tables) string {
	var id, fallback string
	switch b := backing.(type) {
	case *types.VirtualEthernetCardNetworkBackingInfo:
		fallback = b.DeviceName
		if b.Network != nil {
			id = b.Network.Value
		}
	case *types.VirtualEthernetCardDistributedVirtualPortBackingInfo:
		id, fallback = b.Port.PortgroupKey, b.Port.PortgroupKey // the key of a port group is its moref
	case *types.VirtualEthernetCardOpaqueNetworkBackingInfo:
		id, fallback = b.OpaqueNetworkId, b.OpaqueNetworkId
	}
	if name, ok := known.networks[id]; ok {
		return name
	}
	return decodeName(fallback)
}

// describeAdapter returns the type of a network adapter, as the files of VMs name it.
func describeAdapter(device types.BaseVirtualDevice) string {
	switch device.(type) {
	case *types.VirtualVmxnet3, *types.VirtualVmxnet3Vrdma:
		return "vmxnet3"
	case *types.VirtualVmxnet2:
		return "vmxnet2"
	case *types.VirtualVmxnet:
		return "vmxnet"
	case *types.VirtualE1000e:
		return "e1000e"
	case *types.VirtualE1000:
		return "e1000"
	case *types.VirtualPCNet32:
		return "pcnet32"
	case *types.VirtualSriovEthernetCard:
		return "sriov"
	}
	return "unknown"
}
