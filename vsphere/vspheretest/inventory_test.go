package vspheretest_test

import (
	"fmt"
	"testing"

	"github.com/vmware/govmomi/find"
	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/view"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

func TestInventory(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t,
		vspheretest.Datastore{Name: "nfs [1] ü", Type: "NFS"},
		vspheretest.Host{Name: "esx1"}, vspheretest.Host{Name: "esx2", Disconnected: true},
		vspheretest.VM{Name: `a/b\c%d "q" 'ö' [x]`, Folder: "prod/web%2f1", Disks: []vspheretest.Disk{
			{Datastore: "nfs [1] ü"},
			{Backing: "sparse", Controller: "sata"},
			{Backing: "sesparse", UUID: vspheretest.NoUUID},
			{Backing: "rdm-virtual", LUN: "naa.1"},
			{Backing: "rdm-physical", Bus: "physicalSharing"},
			{Backing: "rdm-raw"},
			{Backing: "pmem", Controller: "nvme"},
			{Sharing: "sharingMultiWriter", UUID: "same"},
			{Mode: "independent_nonpersistent", UUID: "same"},
			{KeyID: "key-1"},
		}},
		vspheretest.VM{Name: "twin", Folder: "prod"}, vspheretest.VM{Name: "twin", Datacenter: "Zürich"},
		vspheretest.VM{Name: "template", Template: true},
		vspheretest.VM{Name: "lost", NoConfig: true},
		vspheretest.VM{Name: "apart", Host: "esx2"},
		vspheretest.VM{Name: "ft", FaultTolerant: true, Power: "suspended"},
	)
	c := connect(t, s)
	const name = `/DC0/vm/prod/web%2f1/a%2fb%5cc%25d "q" 'ö' [x]`
	ref, err := object.NewSearchIndex(c.Client).FindByInventoryPath(t.Context(), name)
	if err != nil || ref == nil || ref.Reference() != s.Find(`a/b\c%d "q" 'ö' [x]`) || ref.Reference() != s.Find(name) {
		t.Fatalf("%s: found %v, %v", name, ref, err)
	}
	var vm mo.VirtualMachine
	if err := c.RetrieveOne(t.Context(), ref.Reference(), nil, &vm); err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, d := range vm.Config.Hardware.Device {
		if d, ok := d.(*types.VirtualDisk); ok {
			got = append(got, fmt.Sprintf("%d %d:%d %T", d.Key, d.ControllerKey, *d.UnitNumber, d.Backing))
		}
	}
	const dir = "[ds1] a_b_c_d \"q\" 'ö' [x]/a_b_c_d \"q\" 'ö' [x]"
	equal(t, "disks", got, []string{
		"2000 1000:0 *types.VirtualDiskFlatVer2BackingInfo",
		"16000 15000:0 *types.VirtualDiskSparseVer2BackingInfo",
		"2001 1000:1 *types.VirtualDiskSeSparseBackingInfo",
		"2002 1000:2 *types.VirtualDiskRawDiskMappingVer1BackingInfo",
		"2016 1001:0 *types.VirtualDiskRawDiskMappingVer1BackingInfo",
		"2003 1000:3 *types.VirtualDiskRawDiskVer2BackingInfo",
		"32000 31000:0 *types.VirtualDiskLocalPMemBackingInfo",
		"2004 1000:4 *types.VirtualDiskFlatVer2BackingInfo",
		"2005 1000:5 *types.VirtualDiskFlatVer2BackingInfo",
		"2006 1000:6 *types.VirtualDiskFlatVer2BackingInfo",
	})
	equal(t, "first file", s.Files(name)[0], "[nfs [1] ü] "+dir[6:]+".vmdk")
	equal(t, "second file", s.Files(name)[1], dir+"_1.vmdk")
	equal(t, "datastores", len(vm.Datastore), 2)
	equal(t, "files", len(vm.LayoutEx.File), 1+2*len(got))

	// Disks that snapshots leave out keep their files.
	snapshot := s.AddSnapshot(name, "one", "")
	var config mo.VirtualMachineSnapshot
	if err := c.RetrieveOne(t.Context(), snapshot, nil, &config); err != nil {
		t.Fatal(err)
	}
	got = nil
	for _, d := range config.Config.Hardware.Device {
		if d, ok := d.(*types.VirtualDisk); ok {
			got = append(got, fmt.Sprint(d.Key))
		}
	}
	equal(t, "disks in the snapshot", got, []string{"2000", "16000", "2001", "2002", "2004", "2006"})
	equal(t, "file of an independent disk", s.Files(name)[8], dir+"_8.vmdk")

	list, err := find.NewFinder(c.Client).VirtualMachineList(t.Context(), "/...")
	if err != nil || len(list) != 7 {
		t.Errorf("%d VMs: %v, %v", len(list), list, err)
	}
	for name, want := range map[string]string{
		"/DC0/vm/prod/twin": "poweredOn connected notConfigured", "/Zürich/vm/twin": "poweredOn connected notConfigured",
		"template": "poweredOff connected notConfigured", "lost": "poweredOn inaccessible notConfigured",
		"apart": "poweredOn disconnected notConfigured", "ft": "suspended connected running",
	} {
		_, vm := machine(t, c, s, name)
		equal(t, name, fmt.Sprint(vm.Runtime.PowerState, " ", vm.Runtime.ConnectionState, " ", vm.Runtime.FaultToleranceState), want)
		if (vm.Config == nil) != (name == "lost") {
			t.Errorf("%s: configuration %v", name, vm.Config)
		}
	}
	// Searches by UUID pass over a VM without a configuration.
	_, twin := machine(t, c, s, "/Zürich/vm/twin")
	found, err := object.NewSearchIndex(c.Client).FindByUuid(t.Context(), nil, twin.Config.InstanceUuid, true, types.NewBool(true))
	if err != nil || found == nil || found.Reference() != twin.Self {
		t.Errorf("by UUID: %v, %v", found, err)
	}
	found, err = object.NewSearchIndex(c.Client).FindByUuid(t.Context(), nil, "nobody", true, nil)
	if err != nil || found != nil {
		t.Errorf("by an unknown UUID: %v, %v", found, err)
	}
}

func TestThousandVMs(t *testing.T) {
	t.Parallel()
	var options []vspheretest.Option
	for i := range 1000 {
		options = append(options, vspheretest.VM{Name: fmt.Sprintf("vm%d", i), Folder: fmt.Sprintf("f%d", i%20), Disks: make([]vspheretest.Disk, 4)})
	}
	s := vspheretest.New(t, options...)
	c := connect(t, s)
	v, err := view.NewManager(c.Client).CreateContainerView(t.Context(), c.ServiceContent.RootFolder, []string{"VirtualMachine"}, true)
	if err != nil {
		t.Fatal(err)
	}
	var vms, some []mo.VirtualMachine
	if err := v.Retrieve(t.Context(), []string{"VirtualMachine"}, []string{"name"}, &vms); err != nil {
		t.Fatal(err)
	}
	var refs []types.ManagedObjectReference
	for _, vm := range vms[:100] { // XML with all properties of a thousand VMs takes seconds
		refs = append(refs, vm.Self)
	}
	if err := c.Retrieve(t.Context(), refs, []string{"config.hardware"}, &some); err != nil {
		t.Fatal(err)
	}
	disks := 0
	for _, vm := range some {
		for _, d := range vm.Config.Hardware.Device {
			if _, ok := d.(*types.VirtualDisk); ok {
				disks++
			}
		}
	}
	if len(vms) != 1000 || disks != 400 {
		t.Errorf("%d VMs, %d disks of 100 of them", len(vms), disks)
	}
}

func TestHosts(t *testing.T) {
	t.Parallel()
	s := vspheretest.New(t, vspheretest.Configure(func(o *vspheretest.Options) { o.ESXi, o.Version, o.ManagedBy = true, "7.0.3", "vc.test" }))
	c := connect(t, s)
	about := c.ServiceContent.About
	equal(t, "server", about.ApiType+" "+about.Version+" "+about.FullName, "HostAgent 7.0.3 VMware vCenter Server 7.0.3 build-5973321")
	list, err := find.NewFinder(c.Client).HostSystemList(t.Context(), "/...")
	if err != nil || len(list) != 2 {
		t.Fatalf("hosts %v, %v", list, err)
	}
	var host mo.HostSystem
	if err := c.RetrieveOne(t.Context(), list[0].Reference(), nil, &host); err != nil {
		t.Fatal(err)
	}
	equal(t, "host", host.Name+" "+host.Summary.Config.Product.Version+" "+host.Summary.ManagementServerIp, "esx1.test 7.0.3 vc.test")
}
