package vspheretest

import (
	"crypto/sha1"
	"fmt"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// machine is what the server knows about a VM besides the simulator's object. It is guarded by the
// lock of that object.
type machine struct {
	ref        types.ManagedObjectReference
	dir        string // of the VM's files on its datastore
	datacenter *simulator.Datacenter

	current map[int32]*node                                  // files that the VM writes, by the key of the disk
	frozen  map[types.ManagedObjectReference]map[int32]*node // files that a snapshot keeps
	links   map[string]string                                // paths in the folder of the stand-in library, and the images there
	waiting []map[int32]*node                                // files that a removed snapshot has left
	keeps   bool                                             // the next removal of a snapshot leaves its files
	quiesce types.BaseMethodFault                            // fault of the task of a quiesced snapshot
}

// node is a file of a disk: the disk itself, or the changes that were made after a snapshot.
type node struct {
	store, path string // datastore and path of the descriptor, as the server writes them
	parent      *node
	facts       *facts // of the disk
	image       string // raw image with the content of the disk as this file and its parents hold it; "": none
	tracked     string // UUID of the change tracking; "": none
	round       int    // of the change tracking: grows with each snapshot
	written     []span // by the VM into this file
}

// span is an area of a disk that the VM wrote in a round of the change tracking.
type span struct {
	from, to int64
	round    int
}

// changeID returns the ID that stands for the content of n as it will be when a snapshot is made.
func (n *node) changeID() string {
	if n.tracked == "" {
		return ""
	}
	return fmt.Sprintf("%s/%d", n.tracked, n.round)
}

// trackingID returns a UUID in the form that change IDs have.
func trackingID(text string) string {
	h := sha1.Sum([]byte(text))
	return fmt.Sprintf("% x-% x", h[:8], h[8:16])
}

func (n *node) name() string { return "[" + n.store + "] " + n.path }

// Keys of controllers and disks as vCenter numbers them.
var buses = map[string]struct{ controller, disk, each int32 }{
	"scsi": {1000, 2000, 16},
	"sata": {15000, 16000, 30},
	"nvme": {31000, 32000, 15},
	"ide":  {200, 3000, 2},
}

// buildDisks adds the controllers, the disks and a network adapter to a new VM.
func (s *Server) buildDisks(vm *simulator.VirtualMachine, m *machine, v VM, p place) error {
	b := builder{s: s, vm: vm, m: m, v: v}
	for i, d := range v.Disks {
		if err := b.add(i, d); err != nil {
			return fmt.Errorf("disk %d: %w", i+1, err)
		}
	}
	nic := &types.VirtualVmxnet3{VirtualVmxnet: types.VirtualVmxnet{VirtualEthernetCard: types.VirtualEthernetCard{
		VirtualDevice: types.VirtualDevice{Key: 4000, DeviceInfo: &types.Description{Label: "Network adapter 1", Summary: "VM Network"},
			Backing: &types.VirtualEthernetCardNetworkBackingInfo{VirtualDeviceDeviceBackingInfo: types.VirtualDeviceDeviceBackingInfo{DeviceName: "VM Network"}}},
		MacAddress: macOf(vm.Config.InstanceUuid), AddressType: "assigned",
	}}}
	vm.Config.Hardware.Device = append(b.devices, nic)
	s.layout(vm, m)
	return s.link(m)
}

func macOf(uuid string) string {
	return fmt.Sprintf("00:50:56:%s:%s:%s", uuid[0:2], uuid[2:4], uuid[4:6])
}

// builder adds the disks of a VM.
type builder struct {
	s       *Server
	vm      *simulator.VirtualMachine
	m       *machine
	v       VM
	devices []types.BaseVirtualDevice
	buses   []*bus
}

// bus is a controller with its disks.
type bus struct {
	kind, sharing string
	key, first    int32 // keys of the controller and of its first disk
	units         int32 // in use
}

// bus returns a controller that has room for another disk, and the unit number of the disk.
func (b *builder) bus(kind, sharing string) (*bus, int32, error) {
	keys, ok := buses[kind]
	if !ok {
		return nil, 0, fmt.Errorf("no type of controller is called %q", kind)
	}
	var n int32
	for _, have := range b.buses {
		if have.kind != kind {
			continue
		}
		n++
		if have.sharing == sharing && have.units < keys.each {
			unit := have.units
			have.units++
			if kind == "scsi" && unit == 7 { // the controller's own
				unit = have.units
				have.units++
			}
			return have, unit, nil
		}
	}
	c := &bus{kind: kind, sharing: sharing, key: keys.controller + n, first: keys.disk + n*keys.each, units: 1}
	b.buses = append(b.buses, c)
	b.devices = append(b.devices, controller(c, n))
	return c, 0, nil
}

func controller(c *bus, n int32) types.BaseVirtualDevice {
	base := types.VirtualController{BusNumber: n}
	base.Key = c.key
	switch c.kind {
	case "sata":
		base.DeviceInfo = &types.Description{Label: fmt.Sprintf("SATA controller %d", n)}
		return &types.VirtualAHCIController{VirtualSATAController: types.VirtualSATAController{VirtualController: base}}
	case "nvme":
		base.DeviceInfo = &types.Description{Label: fmt.Sprintf("NVME controller %d", n)}
		return &types.VirtualNVMEController{VirtualController: base}
	case "ide":
		base.DeviceInfo = &types.Description{Label: fmt.Sprintf("IDE %d", n)}
		return &types.VirtualIDEController{VirtualController: base}
	}
	base.DeviceInfo = &types.Description{Label: fmt.Sprintf("SCSI controller %d", n)}
	sharing := types.VirtualSCSISharingNoSharing
	if c.sharing != "" {
		sharing = types.VirtualSCSISharing(c.sharing)
	}
	return &types.ParaVirtualSCSIController{VirtualSCSIController: types.VirtualSCSIController{VirtualController: base, SharedBus: sharing, ScsiCtlrUnitNumber: 7}}
}

func (b *builder) add(i int, d Disk) error {
	kind := d.Controller
	if kind == "" {
		kind = "scsi"
	}
	c, unit, err := b.bus(kind, d.Bus)
	if err != nil {
		return err
	}
	n := &node{store: encode(d.Datastore), path: d.File}
	if d.Datastore == "" {
		n.store = encode(b.v.Datastore)
	}
	if n.path == "" {
		n.path = b.m.dir + "/" + path.Base(b.m.dir)
		if i > 0 {
			n.path += fmt.Sprintf("_%d", i)
		}
		n.path += ".vmdk"
	}
	size, err := b.s.makeImage(n, b.v, i, d)
	if err != nil {
		return err
	}
	uuid := d.UUID
	switch uuid {
	case "":
		uuid = uuidOf(fmt.Sprintf("disk %d %s", i, b.vm.Config.InstanceUuid))
		if d.File != "" { // several VMs can have the file, which has one UUID
			uuid = uuidOf(fmt.Sprintf("disk %s %s", b.m.datacenter.Self.Value, n.name()))
		}
	case NoUUID:
		uuid = ""
	}
	mode := d.Mode
	if mode == "" {
		mode = "persistent"
	}
	backing, err := newBacking(d, uuid, mode)
	if err != nil {
		return err
	}
	label := d.Label
	if label == "" {
		label = fmt.Sprintf("Hard disk %d", i+1)
	}
	disk := &types.VirtualDisk{CapacityInBytes: size, CapacityInKB: (size + 1023) / 1024}
	disk.Key, disk.ControllerKey, disk.UnitNumber = c.first+unit, c.key, &unit
	disk.DeviceInfo = &types.Description{Label: label, Summary: fmt.Sprintf("%d KB", disk.CapacityInKB)}
	if b.v.ChangeTracking && hasChangeID(backing) {
		n.tracked, n.round = trackingID(fmt.Sprintf("%s %d", b.m.dir, i)), 1
	}
	ds := b.s.datastore(b.m, n.store)
	disk.Backing = rendered(backing, n, func(string) *types.ManagedObjectReference { return &ds.Self })
	if d.Edit != nil {
		d.Edit(disk)
	}
	if d.KeyID != "" {
		b.vm.Config.KeyId = &types.CryptoKeyId{KeyId: d.KeyID, ProviderId: &types.KeyProviderId{Id: "kms"}}
	}
	n.facts = factsOf(disk, kind, b.v.Version)
	b.m.current[disk.Key] = n
	b.devices = append(b.devices, disk)
	return nil
}

// newBacking returns the backing of a new disk, without names of files.
func newBacking(d Disk, uuid, mode string) (types.BaseVirtualDeviceBackingInfo, error) {
	var key *types.CryptoKeyId
	if d.KeyID != "" {
		key = &types.CryptoKeyId{KeyId: d.KeyID, ProviderId: &types.KeyProviderId{Id: "kms"}}
	}
	lun := d.LUN
	if lun == "" {
		lun = "naa.60003ff44dc75adc"
	}
	switch d.Backing {
	case "", "flat":
		return &types.VirtualDiskFlatVer2BackingInfo{DiskMode: mode, Uuid: uuid, Sharing: d.Sharing, KeyId: key, ThinProvisioned: types.NewBool(true)}, nil
	case "sparse":
		return &types.VirtualDiskSparseVer2BackingInfo{DiskMode: mode, Uuid: uuid, KeyId: key}, nil
	case "sesparse":
		return &types.VirtualDiskSeSparseBackingInfo{DiskMode: mode, Uuid: uuid, KeyId: key}, nil
	case "rdm-virtual", "rdm-physical":
		return &types.VirtualDiskRawDiskMappingVer1BackingInfo{DiskMode: mode, Uuid: uuid, Sharing: d.Sharing, LunUuid: lun, DeviceName: "vml." + lun,
			CompatibilityMode: strings.TrimPrefix(d.Backing, "rdm-") + "Mode"}, nil
	case "rdm-raw":
		b := &types.VirtualDiskRawDiskVer2BackingInfo{Uuid: uuid, Sharing: d.Sharing}
		b.DeviceName = "vml." + lun
		return b, nil
	case "pmem":
		return &types.VirtualDiskLocalPMemBackingInfo{DiskMode: mode, Uuid: uuid}, nil
	}
	return nil, fmt.Errorf("no backing is called %q", d.Backing)
}

// rendered returns a copy of a backing with the files and the change ID of n. The function store
// returns the reference of a datastore.
func rendered(b types.BaseVirtualDeviceBackingInfo, n *node, store func(name string) *types.ManagedObjectReference) types.BaseVirtualDeviceBackingInfo {
	file := types.VirtualDeviceFileBackingInfo{FileName: n.name(), Datastore: store(n.store)}
	switch b := b.(type) {
	case *types.VirtualDiskFlatVer2BackingInfo:
		c := *b
		c.VirtualDeviceFileBackingInfo, c.ChangeId, c.Parent = file, n.changeID(), nil
		if n.parent != nil {
			c.Parent = rendered(b, n.parent, store).(*types.VirtualDiskFlatVer2BackingInfo)
		}
		return &c
	case *types.VirtualDiskSparseVer2BackingInfo:
		c := *b
		c.VirtualDeviceFileBackingInfo, c.ChangeId, c.Parent = file, n.changeID(), nil
		if n.parent != nil {
			c.Parent = rendered(b, n.parent, store).(*types.VirtualDiskSparseVer2BackingInfo)
		}
		return &c
	case *types.VirtualDiskSeSparseBackingInfo:
		c := *b
		c.VirtualDeviceFileBackingInfo, c.ChangeId, c.Parent = file, n.changeID(), nil
		if n.parent != nil {
			c.Parent = rendered(b, n.parent, store).(*types.VirtualDiskSeSparseBackingInfo)
		}
		return &c
	case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
		c := *b
		c.VirtualDeviceFileBackingInfo, c.ChangeId, c.Parent = file, n.changeID(), nil
		if n.parent != nil {
			c.Parent = rendered(b, n.parent, store).(*types.VirtualDiskRawDiskMappingVer1BackingInfo)
		}
		return &c
	case *types.VirtualDiskRawDiskVer2BackingInfo:
		c := *b
		c.DescriptorFileName, c.ChangeId = n.name(), n.changeID()
		return &c
	case *types.VirtualDiskLocalPMemBackingInfo:
		c := *b
		c.VirtualDeviceFileBackingInfo = file
		return &c
	}
	panic(fmt.Sprintf("vspheretest: unexpected backing %T", b))
}

// inSnapshots reports whether a disk is part of snapshots.
func inSnapshots(d *types.VirtualDisk) bool {
	mode := ""
	switch b := d.Backing.(type) {
	case *types.VirtualDiskFlatVer2BackingInfo:
		mode = b.DiskMode
	case *types.VirtualDiskSparseVer2BackingInfo:
		mode = b.DiskMode
	case *types.VirtualDiskSeSparseBackingInfo:
		mode = b.DiskMode
	case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
		if b.CompatibilityMode == string(types.VirtualDiskCompatibilityModePhysicalMode) {
			return false
		}
		mode = b.DiskMode
	default:
		return false
	}
	return !strings.HasPrefix(mode, "independent")
}

// sharesDisks reports whether a disk that is part of snapshots is shared with other VMs.
func sharesDisks(devices []types.BaseVirtualDevice) bool {
	shared := map[int32]bool{} // controllers with a shared bus
	for _, d := range devices {
		if c, ok := d.(types.BaseVirtualSCSIController); ok {
			c := c.GetVirtualSCSIController()
			shared[c.Key] = c.SharedBus != types.VirtualSCSISharingNoSharing
		}
	}
	for _, d := range disksOf(devices) {
		sharing := ""
		switch b := d.Backing.(type) {
		case *types.VirtualDiskFlatVer2BackingInfo:
			sharing = b.Sharing
		case *types.VirtualDiskRawDiskMappingVer1BackingInfo:
			sharing = b.Sharing
		}
		if inSnapshots(d) && (shared[d.ControllerKey] || sharing == string(types.VirtualDiskSharingSharingMultiWriter)) {
			return true
		}
	}
	return false
}

func hasChangeID(b types.BaseVirtualDeviceBackingInfo) bool {
	_, pmem := b.(*types.VirtualDiskLocalPMemBackingInfo)
	return !pmem
}

// disksOf returns the disks in a list of devices.
func disksOf(devices []types.BaseVirtualDevice) []*types.VirtualDisk {
	var list []*types.VirtualDisk
	for _, d := range devices {
		if disk, ok := d.(*types.VirtualDisk); ok {
			list = append(list, disk)
		}
	}
	return list
}

// withFiles returns devices in which each disk has the files that nodes name. It copies the disks:
// answers of the server that are being encoded may refer to the old ones. With only, disks that
// nodes do not name are left out.
func (s *Server) withFiles(m *machine, devices []types.BaseVirtualDevice, nodes map[int32]*node, only bool) []types.BaseVirtualDevice {
	var list []types.BaseVirtualDevice
	for _, device := range devices {
		d, ok := device.(*types.VirtualDisk)
		if !ok {
			list = append(list, device)
			continue
		}
		n := nodes[d.Key]
		if n == nil {
			if !only {
				list = append(list, d)
			}
			continue
		}
		c := *d
		c.Backing = rendered(d.Backing, n, func(store string) *types.ManagedObjectReference {
			ref := s.datastore(m, store).Self
			return &ref
		})
		list = append(list, &c)
	}
	return list
}

// show merges files that are not needed, and sets the disks and the files that clients and the
// stand-in library see of a VM.
func (s *Server) show(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
	s.merge(m)
	s.must(s.link(m))
	ctx.Update(vm, []types.PropertyChange{{Name: "config.hardware.device", Val: s.withFiles(m, vm.Config.Hardware.Device, m.current, false)}})
	for ref, nodes := range m.frozen {
		if snapshot, ok := ctx.Map.Get(ref).(*simulator.VirtualMachineSnapshot); ok {
			ctx.WithLock(snapshot, func() {
				ctx.Update(snapshot, []types.PropertyChange{{Name: "config.hardware.device",
					Val: s.withFiles(m, snapshot.Config.Hardware.Device, nodes, true)}})
			})
		}
	}
	s.layout(vm, m)
	s.useDatastores(ctx, vm, m)
}

// nodes returns all files of a VM.
func (m *machine) nodes() []*node {
	seen := map[*node]bool{}
	var list []*node
	add := func(nodes map[int32]*node) {
		for _, n := range nodes {
			for ; n != nil && !seen[n]; n = n.parent {
				seen[n] = true
				list = append(list, n)
			}
		}
	}
	add(m.current)
	for _, nodes := range m.frozen {
		add(nodes)
	}
	for _, nodes := range m.waiting {
		add(nodes)
	}
	slices.SortFunc(list, func(a, b *node) int { return strings.Compare(a.name(), b.name()) })
	return list
}

// layout sets the list of a VM's files.
func (s *Server) layout(vm *simulator.VirtualMachine, m *machine) {
	ex := &types.VirtualMachineFileLayoutEx{Timestamp: now()}
	add := func(name, kind string, size int64) {
		ex.File = append(ex.File, types.VirtualMachineFileLayoutExFileInfo{Key: int32(len(ex.File)), Name: name, Type: kind, Size: size, UniqueSize: size, Accessible: types.NewBool(true)})
	}
	if vm.Config != nil {
		add(vm.Config.Files.VmPathName, "config", 2048)
	}
	for _, n := range m.nodes() {
		base := strings.TrimSuffix(n.name(), ".vmdk")
		extent := "-flat.vmdk"
		if n.parent != nil {
			extent = "-delta.vmdk"
		}
		add(n.name(), "diskDescriptor", 512)
		add(base+extent, "diskExtent", imageSize(n.image))
	}
	vm.LayoutEx = ex
}

var deltaName = regexp.MustCompile(`-[0-9]{6}\.vmdk$`)

// newDelta returns a file for the changes that are made after a snapshot which keeps parent.
func (m *machine) newDelta(parent *node) *node {
	base := strings.TrimSuffix(deltaName.ReplaceAllString(parent.path, ".vmdk"), ".vmdk")
	used := map[string]bool{}
	for _, n := range m.nodes() {
		used[n.name()] = true
	}
	for i := 1; ; i++ {
		n := &node{store: parent.store, path: fmt.Sprintf("%s-%06d.vmdk", base, i), parent: parent, facts: parent.facts, image: parent.image, tracked: parent.tracked, round: parent.round + 1}
		if !used[n.name()] {
			return n
		}
	}
}
