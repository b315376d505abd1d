package vsphere

import (
	"maps"
	"slices"

	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// vmProperties are the properties of a VM from which the function describe makes its description.
var vmProperties = []string{
	"name", "parent", "parentVApp", "datastore", "network", "snapshot", "guest.toolsRunningStatus",
	"capability.changeTrackingSupported",
	"config.uuid", "config.instanceUuid", "config.template", "config.version", "config.guestId", "config.firmware",
	"config.hardware.device", "config.changeTrackingEnabled", "config.changeVersion", "config.files",
	"runtime.powerState", "runtime.host", "runtime.connectionState", "runtime.consolidationNeeded", "runtime.question",
	"runtime.faultToleranceState",
}

// tables have the objects that the descriptions of VMs refer to. An object that is in no table is
// described by an empty text, because the user may not be allowed to see it.
type tables struct {
	folders  map[types.ManagedObjectReference]folder
	hosts    map[types.ManagedObjectReference]host
	stores   map[types.ManagedObjectReference]inventory.Store
	networks map[string]string                     // names, by moref and, of opaque networks, by ID
	asked    map[types.ManagedObjectReference]bool // objects that the server was asked for
}

// folder is an object of the inventory that can contain VMs: a folder, a datacenter or a vApp.
type folder struct {
	name   string // decoded
	parent *types.ManagedObjectReference
	center bool // a datacenter
}

type host struct {
	name    string
	version string
}

func newTables() *tables {
	return &tables{
		folders:  make(map[types.ManagedObjectReference]folder),
		hosts:    make(map[types.ManagedObjectReference]host),
		stores:   make(map[types.ManagedObjectReference]inventory.Store),
		networks: make(map[string]string),
		asked:    make(map[types.ManagedObjectReference]bool),
	}
}

// store returns the datastore that has the given file. The reference may be nil. If the tables do
// not have the datastore, only its name is set.
func (t *tables) store(ref *types.ManagedObjectReference, file string) inventory.Store {
	if ref != nil {
		if s, ok := t.stores[*ref]; ok {
			return s
		}
	}
	name, _, _ := splitFile(file, t.storeNames()...)
	for _, s := range t.stores {
		if s.Name == name {
			return s
		}
	}
	return inventory.Store{Name: name, Free: -1}
}

func (t *tables) storeNames() []string {
	var names []string
	for _, s := range t.stores {
		names = append(names, s.Name)
	}
	slices.SortFunc(names, func(a, b string) int { return len(b) - len(a) }) // "a] b" before "a"
	return names
}

// place returns the place of a VM of the given name in the inventory.
func (t *tables) place(name string, parent, vApp *types.ManagedObjectReference) *place {
	p := &place{name: decodeName(name), center: -1}
	p.path = []string{p.name}
	if vApp != nil {
		parent = vApp
	}
	for depth := 0; parent != nil && depth < 100; depth++ { // more levels would be a loop
		f, ok := t.folders[*parent]
		if !ok {
			break // the root of the inventory, or a folder that the user may not see
		}
		p.path = append(p.path, f.name)
		if f.center {
			p.center = len(p.path) - 1
		}
		parent = f.parent
	}
	slices.Reverse(p.path)
	if p.center >= 0 {
		p.center = len(p.path) - 1 - p.center
	}
	return p
}

// describe returns the description of a VM of which the server has returned vmProperties. All of
// them may be missing: the server leaves out those that it does not know.
func describe(m *mo.VirtualMachine, known *tables) *inventory.VM {
	p := known.place(m.Name, m.Parent, m.ParentVApp)
	vm := &inventory.VM{
		Name:      p.name,
		Path:      p.String(),
		Moref:     m.Self.Value,
		Power:     describePower(m.Runtime.PowerState),
		Snapshots: describeSnapshots(m.Snapshot),
		Tracking:  inventory.Tracking{Supported: m.Capability.ChangeTrackingSupported},
		NICs:      []inventory.NIC{},
		Disks:     []inventory.Disk{},
	}
	vm.Folder = p.folder()
	vm.NoConfig = m.Config == nil
	vm.FaultTolerance = string(m.Runtime.FaultToleranceState)
	vm.Connection = string(m.Runtime.ConnectionState)
	vm.ConsolidationNeeded = m.Runtime.ConsolidationNeeded
	if q := m.Runtime.Question; q != nil {
		vm.Question = q.Text
	}
	if ref := m.Runtime.Host; ref != nil {
		vm.HostMoref = ref.Value
		vm.Host, vm.HostVersion = known.hosts[*ref].name, known.hosts[*ref].version
	}
	if m.Guest != nil {
		vm.Tools = m.Guest.ToolsRunningStatus
	}
	if m.Config != nil {
		describeConfig(vm, m.Config, known)
	}
	vm.Stores = describeStores(vm, m, known)
	vm.Judge()
	return vm
}

func describeConfig(vm *inventory.VM, c *types.VirtualMachineConfigInfo, known *tables) {
	vm.InstanceUUID, vm.BIOSUUID = c.InstanceUuid, c.Uuid
	vm.Template = c.Template
	vm.Guest, vm.Version, vm.Firmware = c.GuestId, c.Version, c.Firmware
	vm.ChangeVersion = c.ChangeVersion
	if c.ChangeTrackingEnabled != nil {
		vm.Tracking.Enabled = *c.ChangeTrackingEnabled
	}
	vm.Disks = describeDisks(c.Hardware.Device, known)
	vm.NICs = describeNICs(c.Hardware.Device, known)
}

func describePower(state types.VirtualMachinePowerState) inventory.Power {
	switch state {
	case types.VirtualMachinePowerStatePoweredOn:
		return inventory.On
	case types.VirtualMachinePowerStatePoweredOff:
		return inventory.Off
	case types.VirtualMachinePowerStateSuspended:
		return inventory.Suspended
	}
	return inventory.Power(state)
}

// describeStores returns the datastores that hold the configuration, the snapshots and the disks of
// the VM. The server's list also has datastores of which the VM only uses images of CDs; they do not
// matter for a snapshot.
func describeStores(vm *inventory.VM, m *mo.VirtualMachine, known *tables) []inventory.Store {
	used := make(map[string]bool)
	for _, d := range vm.Disks {
		used[d.Datastore] = true
	}
	if m.Config != nil {
		for _, file := range []string{m.Config.Files.VmPathName, m.Config.Files.SnapshotDirectory} {
			if name, _, ok := splitFile(file, known.storeNames()...); ok {
				used[name] = true
			}
		}
	}
	byName := make(map[string]inventory.Store)
	for _, ref := range m.Datastore {
		if s, ok := known.stores[ref]; ok && used[s.Name] {
			byName[s.Name] = s
		}
	}
	return slices.SortedFunc(maps.Values(byName), func(a, b inventory.Store) int {
		if a.Name < b.Name {
			return -1
		}
		return 1
	})
}

// describeSnapshots returns the snapshots of a VM, parents before children.
func describeSnapshots(info *types.VirtualMachineSnapshotInfo) []inventory.Node {
	nodes := []inventory.Node{}
	if info != nil {
		eachSnapshot(info.RootSnapshotList, "", func(n inventory.Node, _ *types.VirtualMachineSnapshotTree) { nodes = append(nodes, n) })
	}
	return nodes
}

// eachSnapshot calls f for each snapshot in a tree, parents before children. The parameter parent is
// the managed object reference of the snapshot above the tree.
func eachSnapshot(tree []types.VirtualMachineSnapshotTree, parent string, f func(n inventory.Node, tree *types.VirtualMachineSnapshotTree)) {
	for i := range tree {
		s := &tree[i]
		n := inventory.Node{Name: decodeName(s.Name), Moref: s.Snapshot.Value, Parent: parent, Created: s.CreateTime}
		n.Mark = inventory.ParseMark(n.Name, s.Description)
		n.Ours = n.Mark != nil
		f(n, s)
		eachSnapshot(s.ChildSnapshotList, n.Moref, f)
	}
}
