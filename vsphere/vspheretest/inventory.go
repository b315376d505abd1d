package vspheretest

import (
	"context"
	"crypto/sha1"
	"fmt"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// build makes the inventory that the options describe. It runs before the server has clients.
func (s *Server) build() error {
	o := &s.options
	if len(o.Datacenters) == 0 {
		o.Datacenters = []string{"DC0"}
	}
	add := func(list *[]string, name string) {
		if name != "" && !slices.Contains(*list, name) {
			*list = append(*list, name)
		}
	}
	for _, v := range o.VMs {
		add(&o.Datacenters, v.Datacenter)
	}
	for _, h := range o.Hosts {
		add(&o.Datacenters, h.Datacenter)
	}
	for _, d := range o.Datastores {
		add(&o.Datacenters, d.Datacenter)
	}
	client, err := vim25.NewClient(context.Background(), s.model.Service)
	if err != nil {
		return err
	}
	for i, name := range o.Datacenters {
		if err := s.buildDatacenter(client, name, i == 0); err != nil {
			return fmt.Errorf("datacenter %q: %w", name, err)
		}
	}
	for i := range o.VMs {
		if err := s.buildVM(o.VMs[i]); err != nil {
			return fmt.Errorf("VM %q: %w", o.VMs[i].Name, err)
		}
	}
	return nil
}

// buildDatacenter makes a datacenter with a cluster of its hosts and with its datastores.
func (s *Server) buildDatacenter(client *vim25.Client, name string, first bool) error {
	ctx := context.Background()
	here := func(datacenter string) bool { return datacenter == name || datacenter == "" && first }
	dc, err := object.NewRootFolder(client).CreateDatacenter(ctx, name)
	if err != nil {
		return err
	}
	folders, err := dc.Folders(ctx)
	if err != nil {
		return err
	}
	cluster, err := folders.HostFolder.CreateCluster(ctx, "cluster", types.ClusterConfigSpecEx{})
	if err != nil {
		return err
	}
	var hosts []Host
	for _, h := range s.options.Hosts {
		if here(h.Datacenter) {
			hosts = append(hosts, h)
		}
	}
	if len(hosts) == 0 {
		hosts = []Host{{Name: "esx1.test"}, {Name: "esx2.test"}}
	}
	for _, h := range hosts {
		task, err := cluster.AddHost(ctx, types.HostConnectSpec{HostName: h.Name}, !h.Disconnected, nil, nil)
		if err != nil {
			return err
		}
		info, err := task.WaitForResult(ctx, nil)
		if err != nil {
			return err
		}
		if h.Disconnected {
			host := s.model.Map().Get(info.Result.(types.ManagedObjectReference)).(*simulator.HostSystem)
			host.Runtime.ConnectionState = types.HostSystemConnectionStateDisconnected
			host.Summary.Runtime = &host.Runtime
		}
	}
	stores := []Datastore{}
	for _, d := range s.options.Datastores {
		if here(d.Datacenter) {
			stores = append(stores, d)
		}
	}
	add := func(store string) {
		if store != "" && !slices.ContainsFunc(stores, func(d Datastore) bool { return d.Name == store }) {
			stores = append(stores, Datastore{Name: store})
		}
	}
	add("ds1")
	for _, v := range s.options.VMs {
		if here(v.Datacenter) {
			add(v.Datastore)
			for _, d := range v.Disks {
				add(d.Datastore)
			}
		}
	}
	for i, d := range stores {
		if err := s.buildDatastore(ctx, client, cluster, i, d, name); err != nil {
			return fmt.Errorf("datastore %q: %w", d.Name, err)
		}
	}
	return nil
}

func (s *Server) buildDatastore(ctx context.Context, client *vim25.Client, cluster *object.ClusterComputeResource, n int, d Datastore, datacenter string) error {
	home := s.model.Map().OptionManager()
	var dir string
	for _, setting := range home.Setting {
		if v := setting.GetOptionValue(); v.Key == "vcsim.home" {
			dir = filepath.Join(v.Value.(string), fmt.Sprintf("%x-%d", sha1.Sum([]byte(datacenter)), n))
		}
	}
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	hosts, err := cluster.Hosts(ctx)
	if err != nil {
		return err
	}
	var made *object.Datastore
	for _, h := range hosts {
		system, err := h.ConfigManager().DatastoreSystem(ctx)
		if err != nil {
			return err
		}
		ds, err := system.CreateLocalDatastore(ctx, encode(d.Name), dir)
		if err != nil {
			return err
		}
		if made == nil { // for another host, the simulator returns a reference to nothing
			made = ds
		}
	}
	ds := s.model.Map().Get(made.Reference()).(*simulator.Datastore)
	ds.Summary.Type = "VMFS"
	if d.Type != "" {
		ds.Summary.Type = d.Type
	}
	ds.Summary.Capacity = 2 << 40
	free := d.Free
	if free == 0 {
		free = 1 << 40
	}
	setFree(ds, free)
	return nil
}

func setFree(ds *simulator.Datastore, free int64) {
	ds.Summary.FreeSpace = free
	ds.Info.GetDatastoreInfo().FreeSpace = free
}

// encode returns a name as the server writes it.
func encode(name string) string {
	return strings.NewReplacer("%", "%25", "/", "%2f", `\`, "%5c").Replace(name)
}

// decode returns a name as users see it.
func decode(name string) string {
	if plain, err := url.PathUnescape(name); err == nil {
		return plain
	}
	return name
}

// uuidOf returns a UUID that depends on a text alone.
func uuidOf(text string) string {
	h := sha1.Sum([]byte(text))
	return fmt.Sprintf("%x-%x-%x-%x-%x", h[:4], h[4:6], h[6:8], h[8:10], h[10:16])
}

// A place is where a VM is put.
type place struct {
	datacenter *simulator.Datacenter
	folder     *simulator.Folder
	host       *simulator.HostSystem
	cluster    *simulator.ClusterComputeResource
}

func (s *Server) place(v VM) (place, error) {
	var p place
	r := s.model.Map()
	name := v.Datacenter
	if name == "" {
		name = s.options.Datacenters[0]
	}
	for _, e := range r.All("Datacenter") {
		if e.Entity().Name == name {
			p.datacenter = e.(*simulator.Datacenter)
		}
	}
	p.folder = r.Get(p.datacenter.VmFolder).(*simulator.Folder)
	ctx := s.context()
	for part := range strings.SplitSeq(v.Folder, "/") {
		if part == "" {
			continue
		}
		next, _ := r.FindByName(part, p.folder.ChildEntity).(*simulator.Folder)
		if next == nil {
			next = &simulator.Folder{}
			next.Name, next.ChildType = part, p.folder.ChildType
			s.adopt(ctx, p.folder, next)
		}
		p.folder = next
	}
	hostFolder := r.Get(p.datacenter.HostFolder).(*simulator.Folder)
	p.cluster = r.Get(hostFolder.ChildEntity[0]).(*simulator.ClusterComputeResource)
	for i, ref := range p.cluster.Host {
		if h := r.Get(ref).(*simulator.HostSystem); h.Name == v.Host || v.Host == "" && i == 0 {
			p.host = h
		}
	}
	if p.host == nil {
		return p, fmt.Errorf("there is no host %q in the datacenter %q", v.Host, name)
	}
	return p, nil
}

// adopt adds an object to a folder.
func (s *Server) adopt(ctx *simulator.Context, parent *simulator.Folder, child mo.Entity) {
	ctx.Map.PutEntity(parent, child)
	parent.ChildEntity = append(parent.ChildEntity, child.Reference())
}

// buildVM makes a VM directly, without the simulator's CreateVM_Task: that one makes files, knows
// only datastores whose names have no brackets, and would need seconds for a thousand VMs.
func (s *Server) buildVM(v VM) error {
	p, err := s.place(v)
	if err != nil {
		return err
	}
	if v.Datastore == "" {
		v.Datastore = "ds1"
	}
	if v.Version == "" {
		v.Version = "vmx-19"
	}
	if v.Guest == "" {
		v.Guest = "debian11_64Guest"
	}
	r := s.model.Map()
	ctx := s.context()
	vm := &simulator.VirtualMachine{DataSets: map[string]*simulator.DataSet{}}
	vm.Name = encode(v.Name)
	if r.FindByName(vm.Name, p.folder.ChildEntity) != nil {
		return fmt.Errorf("the folder %q has it already", v.Folder)
	}
	dir := s.newDir(v)
	file := fmt.Sprintf("[%s] %s/%s.vmx", encode(v.Datastore), dir, path.Base(dir))
	seed := v.Datacenter + "/" + v.Folder + "/" + v.Name
	vm.Config = &types.VirtualMachineConfigInfo{
		ChangeVersion: now().Format("2006-01-02T15:04:05.000000Z"), Modified: now(), Name: vm.Name, GuestFullName: v.Guest, GuestId: v.Guest,
		Version: v.Version, Uuid: uuidOf("bios " + seed), InstanceUuid: uuidOf("instance " + seed), Template: v.Template,
		Files:       types.VirtualMachineFileInfo{VmPathName: file, SnapshotDirectory: path.Dir(file), SuspendDirectory: path.Dir(file), LogDirectory: path.Dir(file)},
		Firmware:    "bios",
		BootOptions: &types.VirtualMachineBootOptions{},
		Hardware:    types.VirtualHardware{NumCPU: 2, NumCoresPerSocket: new(int32), MemoryMB: 2048},

		ChangeTrackingEnabled: types.NewBool(v.ChangeTracking),
	}
	vm.Layout = &types.VirtualMachineFileLayout{}
	vm.LayoutEx = &types.VirtualMachineFileLayoutEx{Timestamp: now()}
	vm.Storage = &types.VirtualMachineStorageInfo{Timestamp: now()}
	vm.Capability.ChangeTrackingSupported = !v.NoTracking
	vm.Capability.SnapshotOperationsSupported = true
	vm.EnvironmentBrowser = *p.cluster.EnvironmentBrowser
	if !v.Template {
		vm.ResourcePool = p.cluster.ResourcePool
	}
	vm.Runtime = runtimeOf(v, p.host)
	vm.Guest = &types.GuestInfo{ToolsStatus: types.VirtualMachineToolsStatusToolsOk, ToolsRunningStatus: "guestToolsRunning", GuestState: "running"}
	if v.ToolsStopped || vm.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOn {
		vm.Guest.ToolsStatus, vm.Guest.ToolsRunningStatus, vm.Guest.GuestState = types.VirtualMachineToolsStatusToolsNotRunning, "guestToolsNotRunning", "notRunning"
	}
	vm.Summary = types.VirtualMachineSummary{
		Runtime: vm.Runtime, Guest: &types.VirtualMachineGuestSummary{ToolsStatus: vm.Guest.ToolsStatus}, Storage: &types.VirtualMachineStorageSummary{Timestamp: now()},
		Config: types.VirtualMachineConfigSummary{Name: vm.Name, Template: v.Template, VmPathName: file, Uuid: vm.Config.Uuid, InstanceUuid: vm.Config.InstanceUuid, GuestId: v.Guest},
	}
	s.adopt(ctx, p.folder, vm)
	vm.Summary.Vm = &vm.Self
	p.host.Vm = append(p.host.Vm, vm.Self)
	m := &machine{ref: vm.Self, dir: dir, links: map[string]string{}, current: map[int32]*node{}, frozen: map[types.ManagedObjectReference]map[int32]*node{}, datacenter: p.datacenter}
	s.machines[vm.Self] = m
	if err := s.buildDisks(vm, m, v, p); err != nil {
		return err
	}
	s.useDatastores(ctx, vm, m)
	for _, name := range v.Snapshots {
		s.makeSnapshot(ctx, vm, m, snapshotSpec{name: name})
	}
	if v.Edit != nil {
		v.Edit(&vm.VirtualMachine)
	}
	if v.NoConfig {
		vm.Config = nil
		vm.Runtime.ConnectionState = types.VirtualMachineConnectionStateInaccessible
	}
	return nil
}

func runtimeOf(v VM, host *simulator.HostSystem) types.VirtualMachineRuntimeInfo {
	r := types.VirtualMachineRuntimeInfo{
		Host: &host.Self, ConnectionState: types.VirtualMachineConnectionState(v.Connection), PowerState: types.VirtualMachinePowerStatePoweredOn,
		FaultToleranceState: types.VirtualMachineFaultToleranceStateNotConfigured,
		RecordReplayState:   types.VirtualMachineRecordReplayStateInactive,
	}
	if v.Connection == "" {
		r.ConnectionState = types.VirtualMachineConnectionState(host.Runtime.ConnectionState)
	}
	switch {
	case v.Power == "off" || v.Power == "" && v.Template:
		r.PowerState = types.VirtualMachinePowerStatePoweredOff
	case v.Power == "suspended":
		r.PowerState = types.VirtualMachinePowerStateSuspended
	}
	if v.FaultTolerant {
		r.FaultToleranceState = types.VirtualMachineFaultToleranceStateRunning
	}
	return r
}

// newDir returns a new name for the folder of a VM on its datastore.
func (s *Server) newDir(v VM) string {
	base := strings.NewReplacer("/", "_", `\`, "_", "%", "_").Replace(v.Name)
	for n := 0; ; n++ {
		dir := base
		if n > 0 {
			dir = fmt.Sprintf("%s_%d", base, n)
		}
		if !s.dirs[dir] {
			s.dirs[dir] = true
			return dir
		}
	}
}

// useDatastores sets the datastores of a VM.
func (s *Server) useDatastores(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
	var refs []types.ManagedObjectReference
	use := func(name string) {
		ref := s.datastore(m, name).Self
		if !slices.Contains(refs, ref) {
			refs = append(refs, ref)
		}
	}
	store, _ := splitPath(vm.Config.Files.VmPathName)
	use(store)
	for _, n := range m.current {
		if n.store != "" {
			use(n.store)
		}
	}
	slices.SortFunc(refs, func(a, b types.ManagedObjectReference) int { return strings.Compare(a.Value, b.Value) })
	for _, ref := range vm.Datastore {
		ds := ctx.Map.Get(ref).(*simulator.Datastore)
		ctx.Map.RemoveReference(ctx, ds, &ds.Vm, vm.Self)
	}
	for _, ref := range refs {
		ds := ctx.Map.Get(ref).(*simulator.Datastore)
		ctx.Map.AddReference(ctx, ds, &ds.Vm, vm.Self)
	}
	ctx.Update(vm, []types.PropertyChange{{Name: "datastore", Val: refs}})
}

// datastore returns a datastore of a VM's datacenter. The name is as the server writes it.
func (s *Server) datastore(m *machine, name string) *simulator.Datastore {
	r := s.model.Map()
	dc := m.datacenter
	if ds, ok := r.FindByName(name, dc.Datastore).(*simulator.Datastore); ok {
		return ds
	}
	panic(fmt.Sprintf("vspheretest: there is no datastore %q in the datacenter %q", name, dc.Name))
}

// splitPath splits "[DATASTORE] PATH". The name of a datastore may have brackets: "] " ends it.
func splitPath(file string) (store, rest string) {
	store, rest, _ = strings.Cut(strings.TrimPrefix(file, "["), "] ")
	return store, rest
}
