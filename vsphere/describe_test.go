package vsphere

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

func ref(kind, value string) *types.ManagedObjectReference {
	return &types.ManagedObjectReference{Type: kind, Value: value}
}

func pointer[T any](v T) *T { return &v }

func testTables() *tables {
	t := newTables()
	t.folders[*ref("Datacenter", "dc-1")] = folder{name: "DC", parent: ref("Folder", "root"), center: true}
	t.folders[*ref("Folder", "vm-root")] = folder{name: "vm", parent: ref("Datacenter", "dc-1")}
	t.folders[*ref("Folder", "prod")] = folder{name: "prod/eu", parent: ref("Folder", "vm-root")}
	t.folders[*ref("VirtualApp", "app")] = folder{name: "app", parent: ref("Folder", "prod")}
	t.folders[*ref("Folder", "loop")] = folder{name: "loop", parent: ref("Folder", "loop")}
	t.hosts[*ref("HostSystem", "host-1")] = host{name: "esx1.example.com", version: "8.0.2"}
	t.stores[*ref("Datastore", "ds-1")] = inventory.Store{Name: "ds1", Moref: "ds-1", Type: "VMFS", Free: 1 << 30}
	t.stores[*ref("Datastore", "ds-2")] = inventory.Store{Name: "iso", Moref: "ds-2", Type: "NFS", Free: -1}
	t.stores[*ref("Datastore", "ds-3")] = inventory.Store{Name: "a] b", Moref: "ds-3", Type: "vsan", Free: 5}
	t.networks["network-1"] = "VM Network"
	t.networks["dvportgroup-2"] = "DMZ / 10"
	return t
}

// A server leaves out every property that has no value.
func TestDescribeNothing(t *testing.T) {
	vm := describe(&mo.VirtualMachine{}, newTables())
	want := &inventory.VM{Path: "/", Snapshots: []inventory.Node{}, NICs: []inventory.NIC{}, Disks: []inventory.Disk{}}
	want.NoConfig, want.Verdict, want.Reason = true, inventory.Never, "the server does not show the VM's configuration"
	if !reflect.DeepEqual(vm, want) {
		t.Errorf("description %+v, want %+v", vm, want)
	}
	text, err := json.Marshal(vm)
	if err != nil || string(text) != `{"name":"","path":"/","moref":"","instance_uuid":"","power":"","host":"","template":false,"guest":"","version":"",`+
		`"firmware":"","tools":"","change_tracking":{"supported":false,"enabled":false},"consolidation_needed":false,"snapshots":[],"nics":[],"disks":[]}` {
		t.Errorf("JSON %s, error %v", text, err)
	}
}

func TestDescribe(t *testing.T) {
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	mark := inventory.Mark{Version: 1, ID: "0123456789abcdef", Round: 2, Host: "proxy", Started: created}
	m := &mo.VirtualMachine{
		Datastore:  []types.ManagedObjectReference{*ref("Datastore", "ds-2"), *ref("Datastore", "ds-1")},
		Capability: types.VirtualMachineCapability{ChangeTrackingSupported: true},
		Guest:      &types.GuestInfo{ToolsRunningStatus: "guestToolsRunning"},
		Runtime: types.VirtualMachineRuntimeInfo{
			PowerState: types.VirtualMachinePowerStateSuspended, Host: ref("HostSystem", "host-1"), ConnectionState: "connected", ConsolidationNeeded: true,
			FaultToleranceState: "notConfigured", Question: &types.VirtualMachineQuestionInfo{Id: "1", Text: "msg.disk: full?"},
		},
		Config: &types.VirtualMachineConfigInfo{
			Uuid: "bios", InstanceUuid: "instance", Version: "vmx-19", GuestId: "debian11_64Guest", Firmware: "efi", ChangeVersion: "7",
			ChangeTrackingEnabled: pointer(true), Files: types.VirtualMachineFileInfo{VmPathName: "[ds1] web/web.vmx"},
			Hardware: types.VirtualHardware{Device: []types.BaseVirtualDevice{
				&types.VirtualVmxnet3{VirtualVmxnet: types.VirtualVmxnet{VirtualEthernetCard: types.VirtualEthernetCard{MacAddress: "00:50:56:00:00:01",
					VirtualDevice: types.VirtualDevice{Backing: &types.VirtualEthernetCardDistributedVirtualPortBackingInfo{
						Port: types.DistributedVirtualSwitchPortConnection{PortgroupKey: "dvportgroup-2"}}}}}},
				&types.VirtualE1000{VirtualEthernetCard: types.VirtualEthernetCard{VirtualDevice: types.VirtualDevice{
					Backing: &types.VirtualEthernetCardNetworkBackingInfo{Network: ref("Network", "network-1"),
						VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: "old name"}}}}},
				&types.VirtualE1000e{VirtualEthernetCard: types.VirtualEthernetCard{VirtualDevice: types.VirtualDevice{
					Backing: &types.VirtualEthernetCardNetworkBackingInfo{VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: "gone"}}}}},
				&types.VirtualPCNet32{},
				&types.VirtualDisk{VirtualDevice: types.VirtualDevice{Key: 2000, Backing: &types.VirtualDiskFlatVer2BackingInfo{
					VirtualDeviceFileBackingInfo: types.VirtualDeviceFileBackingInfo{FileName: "[ds1] web/web.vmdk", Datastore: ref("Datastore", "ds-1")},
				}}},
			}},
		},
		Snapshot: &types.VirtualMachineSnapshotInfo{RootSnapshotList: []types.VirtualMachineSnapshotTree{
			{Name: "before 1%2f2", Snapshot: *ref("VirtualMachineSnapshot", "snapshot-1"), CreateTime: created,
				ChildSnapshotList: []types.VirtualMachineSnapshotTree{
					{Name: "vddkcp-0123456789abcdef%2f2", Description: mark.String(), Snapshot: *ref("VirtualMachineSnapshot", "snapshot-2")},
				}},
			{Name: "other", Snapshot: *ref("VirtualMachineSnapshot", "snapshot-3")},
		}},
	}
	m.Name, m.Parent, m.Self = "web%2f01", ref("Folder", "prod"), *ref("VirtualMachine", "vm-16")
	want := &inventory.VM{
		Name: "web/01", Path: "/DC/vm/prod%2feu/web%2f01", Moref: "vm-16", InstanceUUID: "instance", Power: inventory.Suspended, Host: "esx1.example.com",
		Guest: "debian11_64Guest", Version: "vmx-19", Firmware: "efi", Tools: "guestToolsRunning", ConsolidationNeeded: true,
		Tracking: inventory.Tracking{Supported: true, Enabled: true},
		Snapshots: []inventory.Node{
			{Name: "before 1/2", Moref: "snapshot-1", Created: created},
			{Name: "vddkcp-0123456789abcdef/2", Moref: "snapshot-2", Parent: "snapshot-1", Ours: true, Mark: &mark},
			{Name: "other", Moref: "snapshot-3"},
		},
		NICs: []inventory.NIC{{MAC: "00:50:56:00:00:01", Network: "DMZ / 10", Type: "vmxnet3"}, {Network: "VM Network", Type: "e1000"},
			{Network: "gone", Type: "e1000e"}, {Type: "pcnet32"}},
		Disks: []inventory.Disk{{N: 1, Key: 2000, Unit: -1, Backing: inventory.Flat, File: "[ds1] web/web.vmdk", Datastore: "ds1", DatastoreType: "VMFS",
			Verdict: inventory.Running}},
		Details: inventory.Details{
			Verdict: inventory.Running, FaultTolerance: "notConfigured", BIOSUUID: "bios", HostMoref: "host-1", HostVersion: "8.0.2", Connection: "connected",
			ChangeVersion: "7", Question: "msg.disk: full?", Folder: "prod%2feu", Stores: []inventory.Store{{Name: "ds1", Moref: "ds-1", Type: "VMFS", Free: 1 << 30}},
		},
	}
	if got := describe(m, testTables()); !reflect.DeepEqual(got, want) {
		t.Errorf("description\n%+v\nwant\n%+v", got, want)
	}

	m.Parent, m.ParentVApp = nil, ref("VirtualApp", "app")
	if got := describe(m, testTables()); got.Path != "/DC/vm/prod%2feu/app/web%2f01" || got.Folder != "prod%2feu/app" {
		t.Errorf("in a vApp: path %s, folder %s", got.Path, got.Folder)
	}
	m.Parent, m.ParentVApp = ref("Folder", "unseen"), nil
	if got := describe(m, testTables()); got.Path != "/web%2f01" || got.Folder != "" {
		t.Errorf("in a folder that the user cannot see: path %s, folder %s", got.Path, got.Folder)
	}
	m.Parent = ref("Folder", "loop")
	describe(m, testTables()) // must return

	m.Config.Template, m.Runtime.PowerState = true, types.VirtualMachinePowerStatePoweredOff
	if got := describe(m, testTables()); got.Verdict != inventory.WhenOff || got.Disks[0].Verdict != inventory.WhenOff || !got.Template || got.Power != inventory.Off {
		t.Errorf("template: %+v", got)
	}
}

func TestDescribeDisks(t *testing.T) {
	file := func(name string) types.VirtualDeviceFileBackingInfo {
		return types.VirtualDeviceFileBackingInfo{FileName: name}
	}
	key := &types.CryptoKeyId{KeyId: "k"}
	controller := func(key, number int32) types.VirtualController {
		return types.VirtualController{VirtualDevice: types.VirtualDevice{Key: key}, BusNumber: number}
	}
	controllers := []types.BaseVirtualDevice{
		&types.ParaVirtualSCSIController{VirtualSCSIController: types.VirtualSCSIController{VirtualController: controller(1000, 0), SharedBus: "noSharing"}},
		&types.VirtualLsiLogicSASController{VirtualSCSIController: types.VirtualSCSIController{VirtualController: controller(1001, 1), SharedBus: "physicalSharing"}},
		&types.VirtualLsiLogicController{VirtualSCSIController: types.VirtualSCSIController{VirtualController: controller(1002, 2), SharedBus: "virtualSharing"}},
		&types.VirtualIDEController{VirtualController: controller(200, 1)},
		&types.VirtualAHCIController{VirtualSATAController: types.VirtualSATAController{VirtualController: controller(15000, 3)}},
		&types.VirtualNVMEController{VirtualController: controller(31000, 0), SharedBus: "physicalSharing"},
		&types.VirtualUSBController{VirtualController: controller(7000, 0)},
	}
	for _, test := range []struct {
		name       string
		controller int32
		backing    types.BaseVirtualDeviceBackingInfo
		want       inventory.Disk
	}{
		{name: "no backing", want: inventory.Disk{Backing: inventory.Unknown}},
		{name: "flat", controller: 1000,
			backing: &types.VirtualDiskFlatVer2BackingInfo{VirtualDeviceFileBackingInfo: file("[ds1] a.vmdk"), DiskMode: "persistent", Uuid: "u", ChangeId: "c/1"},
			want: inventory.Disk{Backing: inventory.Flat, Mode: "persistent", UUID: "u", ChangeID: "c/1", File: "[ds1] a.vmdk", Datastore: "ds1",
				DatastoreType: "VMFS", Controller: "scsi0"}},
		{name: "multi-writer", controller: 1002,
			backing: &types.VirtualDiskFlatVer2BackingInfo{Sharing: "sharingMultiWriter"},
			want:    inventory.Disk{Backing: inventory.Flat, Controller: "scsi2", Sharing: inventory.MultiWriter}},
		{name: "bus sharing, sharingNone", controller: 1001,
			backing: &types.VirtualDiskFlatVer2BackingInfo{Sharing: "sharingNone"},
			want:    inventory.Disk{Backing: inventory.Flat, Controller: "scsi1", Sharing: inventory.PhysicalBus}},
		{name: "virtual bus sharing", controller: 1002, backing: &types.VirtualDiskSparseVer2BackingInfo{KeyId: key},
			want: inventory.Disk{Backing: inventory.Sparse, Controller: "scsi2", Sharing: inventory.VirtualBus, Encrypted: true}},
		{name: "sesparse", controller: 200, backing: &types.VirtualDiskSeSparseBackingInfo{ChangeId: "c/2", KeyId: key},
			want: inventory.Disk{Backing: inventory.SeSparse, Controller: "ide1", ChangeID: "c/2", Encrypted: true}},
		{name: "flat, encrypted", controller: 15000, backing: &types.VirtualDiskFlatVer2BackingInfo{KeyId: key},
			want: inventory.Disk{Backing: inventory.Flat, Controller: "sata3", Encrypted: true}},
		{name: "flat 1", backing: &types.VirtualDiskFlatVer1BackingInfo{DiskMode: "undoable"}, want: inventory.Disk{Backing: inventory.Flat, Mode: "undoable"}},
		{name: "sparse 1", backing: &types.VirtualDiskSparseVer1BackingInfo{}, want: inventory.Disk{Backing: inventory.Sparse}},
		{name: "virtual RDM", controller: 31000,
			backing: &types.VirtualDiskRawDiskMappingVer1BackingInfo{CompatibilityMode: "virtualMode", LunUuid: "lun", DeviceName: "vml.1", DiskMode: "persistent"},
			want:    inventory.Disk{Backing: inventory.RDMVirtual, LUN: "lun", Mode: "persistent", Controller: "nvme0", Sharing: inventory.PhysicalBus}},
		{name: "physical RDM", backing: &types.VirtualDiskRawDiskMappingVer1BackingInfo{CompatibilityMode: "physicalMode", DeviceName: "vml.1", Uuid: "u",
			Sharing: "sharingMultiWriter"},
			want: inventory.Disk{Backing: inventory.RDMPhysical, LUN: "vml.1", UUID: "u", Sharing: inventory.MultiWriter}},
		{name: "RDM of an unknown mode", backing: &types.VirtualDiskRawDiskMappingVer1BackingInfo{}, want: inventory.Disk{Backing: inventory.RDMPhysical}},
		{name: "pmem", backing: &types.VirtualDiskLocalPMemBackingInfo{DiskMode: "independent_persistent", Uuid: "u"},
			want: inventory.Disk{Backing: inventory.PMem, Mode: "independent_persistent", UUID: "u"}},
		{name: "raw device", controller: 7000, backing: &types.VirtualDiskRawDiskVer2BackingInfo{DescriptorFileName: "x.vmdk", Uuid: "u", ChangeId: "c/3"},
			want: inventory.Disk{Backing: inventory.Unknown, File: "x.vmdk", UUID: "u", ChangeID: "c/3", Controller: "controller0"}},
		{name: "datastore with a bracket", backing: &types.VirtualDiskFlatVer2BackingInfo{VirtualDeviceFileBackingInfo: file("[a] b] c.vmdk")},
			want: inventory.Disk{Backing: inventory.Flat, File: "[a] b] c.vmdk", Datastore: "a] b", DatastoreType: "vsan"}},
		{name: "unknown datastore", backing: &types.VirtualDiskFlatVer2BackingInfo{VirtualDeviceFileBackingInfo: file("[x] c.vmdk")},
			want: inventory.Disk{Backing: inventory.Flat, File: "[x] c.vmdk", Datastore: "x"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			devices := append([]types.BaseVirtualDevice{
				&types.VirtualDisk{CapacityInKB: 4, VirtualDevice: types.VirtualDevice{Key: 1, DeviceInfo: &types.Description{Label: "Hard disk 1"}}},
				&types.VirtualCdrom{},
				&types.VirtualDisk{CapacityInKB: 1, CapacityInBytes: 1536, VirtualDevice: types.VirtualDevice{Key: 2, ControllerKey: test.controller,
					UnitNumber: pointer(int32(5)), Backing: test.backing}},
			}, controllers...) // the order of devices is the server's
			disks := describeDisks(devices, testTables())
			if len(disks) != 2 || disks[0].N != 1 || disks[0].Size != 4096 || disks[0].Label != "Hard disk 1" || disks[0].Unit != -1 {
				t.Fatalf("disks %+v", disks)
			}
			want := test.want
			want.N, want.Key, want.Size, want.Unit = 2, 2, 1536, 5
			if disks[1] != want {
				t.Errorf("disk %+v, want %+v", disks[1], want)
			}
		})
	}
}

// The configuration of a real snapshot has all devices of the VM.
func TestSnapshotDisks(t *testing.T) {
	devices := []types.BaseVirtualDevice{
		&types.VirtualDisk{VirtualDevice: types.VirtualDevice{Key: 2000, Backing: &types.VirtualDiskFlatVer2BackingInfo{DiskMode: "independent_persistent"}}},
		&types.VirtualDisk{VirtualDevice: types.VirtualDevice{Key: 2001, Backing: &types.VirtualDiskFlatVer2BackingInfo{DiskMode: "persistent"}}},
		&types.VirtualDisk{VirtualDevice: types.VirtualDevice{Key: 2002, Backing: &types.VirtualDiskRawDiskMappingVer1BackingInfo{CompatibilityMode: "physicalMode"}}},
		&types.VirtualDisk{VirtualDevice: types.VirtualDevice{Key: 2003, Backing: &types.VirtualDiskLocalPMemBackingInfo{}}},
		&types.VirtualDisk{VirtualDevice: types.VirtualDevice{Key: 2004, Backing: &types.VirtualDiskRawDiskMappingVer1BackingInfo{CompatibilityMode: "virtualMode"}}},
	}
	disks := snapshotDisks(devices, testTables())
	if len(disks) != 2 || disks[0].Key != 2001 || disks[0].N != 2 || disks[1].Key != 2004 || disks[0].Verdict != inventory.Running {
		t.Errorf("disks %+v", disks)
	}
}
