package vsphere

import (
	"fmt"
	"strings"
	"testing"

	"github.com/vddkcp/vddkcp/transfer/machine"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
	"github.com/vddkcp/vddkcp/vsphere/vspheretest"
)

var _ machine.Machine = (*VM)(nil)

// The verdicts of VMs and disks that cannot be copied, or not while they run.
func TestListOddVMs(t *testing.T) {
	server := vspheretest.New(t,
		vspheretest.Host{Name: "esx1.test"}, vspheretest.Host{Name: "down.test", Disconnected: true},
		vspheretest.Datastore{Name: "pmem/1", Type: "PMEM"},
		vspheretest.VM{Name: "noconfig", NoConfig: true},
		vspheretest.VM{Name: "ft", FaultTolerant: true},
		vspheretest.VM{Name: "lost", Host: "down.test"},
		vspheretest.VM{Name: "gone", Connection: "inaccessible"},
		vspheretest.VM{Name: "template", Template: true, Disks: []vspheretest.Disk{{Mode: "independent_persistent"}}},
		vspheretest.VM{Name: "odd", Disks: []vspheretest.Disk{
			{Backing: "sesparse", Controller: "nvme"}, {Mode: "independent_persistent"}, {Backing: "rdm-physical", LUN: "lun 1"}, {Backing: "rdm-virtual", Controller: "sata"},
			{KeyID: "key"}, {Backing: "pmem", Datastore: "pmem/1"}, {Sharing: "sharingMultiWriter", File: "shared.vmdk"},
		}},
		vspheretest.VM{Name: "Partner %2f \"ü\"", Datastore: "ds1", Disks: []vspheretest.Disk{{Sharing: "sharingMultiWriter", File: "shared.vmdk"}}},
	)
	s := openSession(t, server)
	for pattern, want := range map[string]string{
		"": `
/DC0/vm/Partner %252f "ü": running ""
  1 off "shared with odd: all must be off"
/DC0/vm/ft: never "fault tolerance is configured for the VM"
/DC0/vm/gone: never "the VM's files are inaccessible to its host"
/DC0/vm/lost: never "the server has no connection to the VM's host"
/DC0/vm/noconfig: never "the VM's files are inaccessible to its host"
/DC0/vm/odd: running ""
  1 running ""
  2 off "an independent disk is in no snapshot: power the VM off, or make it dependent"
  3 never "a LUN of the array (lun 1): copy it there"
  4 running ""
  5 running "over nbdssl only; https would give ciphertext"
  6 never "no snapshot and no export for it"
  7 off "shared with Partner %2f \"ü\": all must be off"
/DC0/vm/template: off "a template"
  1 off "a template"
`,
		"P*": `
/DC0/vm/Partner %252f "ü": running ""
  1 off "shared with other VMs: all must be off"
`,
	} {
		vms, err := s.List(t.Context(), pattern)
		if err != nil {
			t.Fatal(err)
		}
		var b strings.Builder
		for _, vm := range vms {
			fmt.Fprintf(&b, "\n%s: %s %q", vm.Path, vm.Verdict, vm.Reason)
			for _, d := range vm.Disks {
				fmt.Fprintf(&b, "\n  %d %s %q", d.N, d.Verdict, d.Reason)
			}
		}
		if got := b.String() + "\n"; got != want {
			t.Errorf("List(%q) = %s\nwant %s", pattern, got, want)
		}
	}
}

func TestFindOddNames(t *testing.T) {
	names := []string{"a/b", `a\b`, "%2f", "100%", " blank ", `"quoted" 'x'`, "[x] *?", "ümläut", "日本", "-rf", "#1"}
	var options []vspheretest.Option
	for _, name := range names {
		options = append(options, vspheretest.VM{Name: name, Folder: "prod"})
	}
	server := vspheretest.New(t, append(options,
		vspheretest.VM{Name: "twin", Folder: "a%2fb/c"}, vspheretest.VM{Name: "twin", Folder: "prod"}, vspheretest.VM{Name: "twin", Datacenter: "DC1"})...)
	s := openSession(t, server)
	for _, name := range names {
		vm, err := s.Find(t.Context(), name)
		if err != nil {
			t.Errorf("Find(%q): %v", name, err)
			continue
		}
		d, err := vm.Describe(t.Context())
		if err != nil || d.Name != name || d.Folder != "prod" {
			t.Errorf("Describe of %q: %+v, %v", name, d, err)
			continue
		}
		for _, text := range []string{d.Path, "prod/" + encodeName(name), "moref=" + d.Moref} {
			if vm, err := s.Find(t.Context(), text); err != nil || vm.Moref() != d.Moref {
				t.Errorf("Find(%q): %v", text, err)
			}
		}
	}
	for text, path := range map[string]string{
		"a%2fb/c/twin": "/DC0/vm/a%2fb/c/twin", "/DC1/vm/twin": "/DC1/vm/twin", "prod/twin": "/DC0/vm/prod/twin",
		"/dc1/vm/TWIN": "/DC1/vm/twin",
	} {
		if vms, err := s.List(t.Context(), text); err != nil || len(vms) != 1 || vms[0].Path != path || vms[0].Power != inventory.On {
			t.Errorf("List(%q) = %+v, %v", text, vms, err)
		}
	}
	want := `"twin" names 3 VMs: /DC0/vm/a%2fb/c/twin (moref=`
	if _, err := s.Find(t.Context(), "twin"); err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("Find(twin): %v", err)
	}
}
