package vsphere

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/secret"
	"github.com/vddkcp/vddkcp/transfer/report"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// calls is a RoundTripper that counts calls, and that a test can watch.
type calls struct {
	next   soap.RoundTripper
	before func(ctx context.Context, method string) // called before each call; may be nil

	mu    sync.Mutex
	names []string
}

func (c *calls) RoundTrip(ctx context.Context, req, res soap.HasFault) error {
	method := strings.TrimSuffix(strings.TrimPrefix(fmt.Sprintf("%T", req), "*methods."), "Body")
	c.mu.Lock()
	c.names = append(c.names, method)
	c.mu.Unlock()
	if c.before != nil {
		c.before(ctx, method)
	}
	return c.next.RoundTrip(ctx, req, res)
}

// count returns the number of calls of a method, or of all calls if the method is "".
func (c *calls) count(method string) int {
	c.mu.Lock()
	defer c.mu.Unlock()
	n := 0
	for _, name := range c.names {
		if method == "" || name == method {
			n++
		}
	}
	return n
}

// simulated returns a session on a simulated vCenter server or ESXi host. Its calls are counted.
func simulated(t testing.TB, model *simulator.Model) (*Session, *calls) {
	t.Helper()
	if err := model.Create(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(model.Remove)
	model.Service.TLS = new(tls.Config)
	model.Service.Listen = &url.URL{User: url.UserPassword("backup", "right")}
	server := model.Service.NewServer()
	t.Cleanup(server.Close)
	port, err := strconv.Atoi(server.URL.Port())
	if err != nil {
		t.Fatal(err)
	}
	s, err := Connect(t.Context(), Options{
		Server: server.URL.Hostname(), Port: uint32(port), User: "backup", Password: secret.New("right"),
		Thumbprint: server.CertificateInfo().ThumbprintSHA256,
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	c := &calls{next: s.client.RoundTripper}
	s.client.RoundTripper = c
	return s, c
}

// rename gives a VM another name, which is encoded as in the API.
func rename(t *testing.T, s *Session, moref, name string) {
	t.Helper()
	task, err := object.NewCommon(s.client, types.ManagedObjectReference{Type: "VirtualMachine", Value: moref}).Rename(t.Context(), name)
	if err == nil {
		err = task.Wait(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
}

func TestList(t *testing.T) {
	model := simulator.VPX()
	model.Datacenter, model.Folder, model.App = 2, 1, 1
	s, _ := simulated(t, model)
	ctx := t.Context()
	list := func(pattern string) []string {
		t.Helper()
		vms, err := s.List(ctx, pattern)
		if err != nil {
			t.Fatalf("List(%q): %v", pattern, err)
		}
		var paths []string
		for _, vm := range vms {
			paths = append(paths, vm.Path)
		}
		return paths
	}
	all := list("")
	if len(all) != 12 || !slices.IsSorted(all) {
		t.Fatalf("List finds %d VMs: %q", len(all), all)
	}
	for _, path := range all {
		if got := list(path); len(got) != 1 || got[0] != path {
			t.Errorf("List(%q) = %q", path, got)
		}
	}
	first, err := s.List(ctx, all[0])
	if err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"moref=" + first[0].Moref, "uuid=" + first[0].InstanceUUID, "uuid=" + strings.ToUpper(first[0].BIOSUUID)} {
		if got := list(pattern); len(got) != 1 || got[0] != all[0] {
			t.Errorf("List(%q) = %q, want %q", pattern, got, all[0])
		}
	}
	if got := list("nothing*"); len(got) != 0 {
		t.Errorf("a pattern that matches nothing: %q", got)
	}
	for _, pattern := range []string{"nothing", "moref=vm-nothing", "uuid=nothing", "[", "nothing/x"} {
		if vms, err := s.List(ctx, pattern); err == nil || report.Of(err).Exit != 2 {
			t.Errorf("List(%q) = %v, %v; want a usage error", pattern, vms, err)
		}
	}
}

func TestFind(t *testing.T) {
	s, _ := simulated(t, simulator.VPX())
	ctx := t.Context()
	vms, err := s.List(ctx, "")
	if err != nil || len(vms) != 4 {
		t.Fatal(vms, err)
	}
	rename(t, s, vms[0].Moref, "a%2fb 100%25 'ü' [x]")
	rename(t, s, vms[1].Moref, "twin")
	rename(t, s, vms[2].Moref, "TWIN")
	for name, want := range map[string]*inventory.VM{
		"a/b 100% 'ü' [x]":               vms[0],
		"A%2fb 100%25 'ü' [x]":           vms[0],
		"/DC0/vm/a%2Fb 100% 'ü' [x]":     vms[0],
		"/DC0/vm/a%2fb 100%25 'ü' [x]":   vms[0],
		"twin":                           vms[1],
		"TWIN":                           vms[2],
		"moref=" + vms[3].Moref:          vms[3],
		"/" + strings.ToLower("vm/TWIN"): vms[1],
	} {
		vm, err := s.Find(ctx, name)
		if err != nil {
			t.Errorf("Find(%q): %v", name, err)
			continue
		}
		d, err := vm.Describe(ctx)
		if err != nil || vm.Moref() != want.Moref || d.Moref != want.Moref || vm.Name() != d.Name {
			t.Errorf("Find(%q) = %s (%s), described as %+v, error %v; want %s", name, vm.Moref(), vm.Name(), d, err, want.Moref)
		}
	}
	list := fmt.Sprintf("/DC0/vm/TWIN (moref=%s), /DC0/vm/twin (moref=%s)", vms[2].Moref, vms[1].Moref)
	last := vms[3].Name
	for name, want := range map[string]struct{ err, hint string }{
		"Twin":           {`"Twin" names 2 VMs: ` + list, "name the VM by its path or by its moref"},
		"twi":            {`no VM on the server ` + s.address() + ` is named "twi"`, "did you mean twin?"},
		"prod/twi":       {`no VM on the server ` + s.address() + ` is named "prod/twi"`, "did you mean /DC0/vm/twin?"},
		last + "x":       {`no VM on the server ` + s.address() + ` is named "` + last + `x"`, "did you mean " + last + "?"},
		"quite other":    {`no VM on the server ` + s.address() + ` is named "quite other"`, "list the VMs with: vddkcp ls"},
		"tw*":            {`no VM on the server ` + s.address() + ` is named "tw*"`, "this command needs the name of one VM; list the VMs with: vddkcp ls 'tw*'"},
		"moref=vm-0":     {`no VM on the server ` + s.address() + ` has the moref "vm-0"`, "list the VMs with: vddkcp ls"},
		"uuid=0123":      {`no VM on the server ` + s.address() + ` has the UUID "0123"`, "list the VMs with: vddkcp ls"},
		"moref=group-d1": {`no VM on the server ` + s.address() + ` has the moref "group-d1"`, "list the VMs with: vddkcp ls"},
		"":               {"the name of the VM is empty", ""},
	} {
		if _, err := s.Find(ctx, name); err == nil || err.Error() != want.err || hinted.Of(err) != want.hint || report.Of(err).Exit != 2 {
			t.Errorf("Find(%q): error %v, hint %q; want %s, %q", name, err, hinted.Of(err), want.err, want.hint)
		}
	}
}

// A host itself has no folders, and another version of the API.
func TestFindOnHost(t *testing.T) {
	s, _ := simulated(t, simulator.ESX())
	ctx := t.Context()
	vms, err := s.List(ctx, "")
	if err != nil || len(vms) == 0 || !strings.HasPrefix(vms[0].Path, "/ha-datacenter/vm/") || vms[0].Host == "" {
		t.Fatalf("List = %+v, %v", vms, err)
	}
	if vm, err := s.Find(ctx, "vm/"+vms[0].Name); err != nil || vm.Moref() != vms[0].Moref {
		t.Errorf("Find = %v, %v", vm, err)
	}
}

func TestDescribeIsTheSameAsList(t *testing.T) {
	model := simulator.VPX()
	model.App, model.Folder = 1, 1
	s, c := simulated(t, model)
	ctx := t.Context()
	vms, err := s.List(ctx, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range vms {
		before := c.count("")
		got, err := (&VM{session: s, moref: want.Moref}).Describe(ctx)
		if err != nil || fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
			t.Errorf("Describe = %+v, %v\nList gives %+v", got, err, want)
		}
		if n := c.count("") - before; n > 2 {
			t.Errorf("Describe needs %d calls", n)
		}
		if got.Host == "" || got.HostVersion == "" || len(got.Stores) != 1 || got.Stores[0].Free <= 0 || len(got.Disks) != 1 || got.Disks[0].DatastoreType == "" ||
			len(got.NICs) != 1 || got.NICs[0].Network == "" || strings.HasPrefix(got.NICs[0].Network, "dvportgroup-") {
			t.Errorf("incomplete description %+v", got)
		}
	}
	if _, err := (&VM{session: s, moref: "vm-gone", name: "web01"}).Describe(ctx); !errors.Is(err, inventory.ErrVMGone) || !strings.Contains(err.Error(), `"web01"`) {
		t.Errorf("error of a VM that is gone: %v", err)
	}
}

// A view ends with the session of the server. The retrieval begins again after the new login.
func TestListAfterEndOfSession(t *testing.T) {
	s, c := simulated(t, simulator.VPX())
	ended := 0
	c.before = func(ctx context.Context, method string) {
		if method == "RetrievePropertiesEx" && ended < 2 {
			ended++
			// The session of the simulator ends between two calls of the same List.
			if _, err := methods.Logout(ctx, c.next, &types.Logout{This: *s.client.ServiceContent.SessionManager}); err != nil {
				t.Error(err)
			}
		}
	}
	if vms, err := s.List(t.Context(), ""); err != nil || len(vms) != 4 || ended != 2 || c.count("CreateContainerView") != 3 {
		t.Errorf("List finds %d VMs, error %v, calls %q", len(vms), err, c.names)
	}
}

func TestListOf1000VMs(t *testing.T) {
	model := simulator.VPX()
	model.Machine, model.Host = 1, 0
	s, c := simulated(t, model)
	copyVMs(model, 1000)
	vms, err := s.List(t.Context(), "")
	if err != nil || len(vms) != 1000 || len(vms[0].Disks) != 4 || vms[0].Host == "" {
		t.Fatalf("List finds %d VMs, error %v", len(vms), err)
	}
	if n := c.count(""); n > 20 {
		t.Errorf("List makes %d calls: %q", n, c.names)
	}
}

// copyVMs adds copies of the only VM of the model to the inventory, until there are n VMs. Each has
// four disks. To create so many VMs by calls would take a minute.
func copyVMs(model *simulator.Model, n int) {
	ctx := model.Service.Context
	first := model.Map().Any("VirtualMachine").(*simulator.VirtualMachine)
	folder := model.Map().Get(*first.Parent).(*simulator.Folder)
	for _, device := range slices.Clone(first.Config.Hardware.Device) {
		if disk, ok := device.(*types.VirtualDisk); ok {
			for range 3 {
				another := *disk
				first.Config.Hardware.Device = append(first.Config.Hardware.Device, &another)
			}
		}
	}
	for i := 1; i < n; i++ {
		vm := &simulator.VirtualMachine{VirtualMachine: first.VirtualMachine}
		vm.Self.Value = fmt.Sprintf("vm-copy-%d", i)
		vm.Name = fmt.Sprintf("copy%d", i)
		folder.ChildEntity = append(folder.ChildEntity, ctx.Map.Put(vm).Reference())
	}
}
