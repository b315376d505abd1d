package vsphere

import (
	"context"
	"fmt"
	"slices"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// pageSize is the greatest number of VMs whose properties one call asks for. The answer for 100 VMs
// has about 1 MB.
const pageSize = 100

// parallelPages is how many pages are asked for at the same time. While the server makes a page,
// others are on their way or are decoded.
const parallelPages = 4

// retrieve asks for the properties of objects. Objects that do not exist are left out of the result.
func (s *Session) retrieve(ctx context.Context, objects []types.ObjectSpec, properties []types.PropertySpec) ([]types.ObjectContent, error) {
	var content []types.ObjectContent
	err := s.together(ctx, func(ctx context.Context) (err error) {
		content, err = s.retrieveParts(ctx, objects, properties, true)
		return err
	})
	return content, err
}

// retrieveAll asks for the properties of all objects of the given types in the inventory.
func (s *Session) retrieveAll(ctx context.Context, properties []types.PropertySpec) ([]types.ObjectContent, error) {
	var kinds []string
	for _, p := range properties {
		kinds = append(kinds, p.Type)
	}
	skip := true
	var content []types.ObjectContent
	err := s.together(ctx, func(ctx context.Context) error {
		view, err := methods.CreateContainerView(ctx, s.client, &types.CreateContainerView{
			This:      *s.client.ServiceContent.ViewManager,
			Container: s.client.ServiceContent.RootFolder,
			Type:      kinds,
			Recursive: true,
		})
		if err != nil {
			return err
		}
		object := types.ObjectSpec{Obj: view.Returnval, Skip: &skip, SelectSet: []types.BaseSelectionSpec{
			&types.TraversalSpec{Type: "ContainerView", Path: "view"},
		}}
		if content, err = s.retrieveParts(ctx, []types.ObjectSpec{object}, properties, false); err != nil {
			return err
		}
		// A view that is not destroyed ends with the session, so that an error does not matter.
		methods.DestroyView(ctx, s.client, &types.DestroyView{This: view.Returnval})
		return nil
	})
	return content, err
}

// retrieveParts asks for the properties of objects. The server may answer in several parts. If
// skipGone is true, objects that do not exist are left out of the result. Otherwise they are an
// error. The function Session.together must call retrieveParts, because the parts of an answer
// belong to the server's session.
func (s *Session) retrieveParts(ctx context.Context, objects []types.ObjectSpec, properties []types.PropertySpec, skipGone bool) ([]types.ObjectContent, error) {
	collector := s.client.ServiceContent.PropertyCollector
	answer, err := methods.RetrievePropertiesEx(ctx, s.client, &types.RetrievePropertiesEx{
		This: collector,
		SpecSet: []types.PropertyFilterSpec{{
			ObjectSet:                     objects,
			PropSet:                       properties,
			ReportMissingObjectsInResults: &skipGone,
		}},
	})
	if err != nil || answer.Returnval == nil {
		return nil, err
	}
	content, token := answer.Returnval.Objects, answer.Returnval.Token
	for token != "" {
		more, err := methods.ContinueRetrievePropertiesEx(ctx, s.client, &types.ContinueRetrievePropertiesEx{This: collector, Token: token})
		if err != nil {
			return nil, err
		}
		content, token = append(content, more.Returnval.Objects...), more.Returnval.Token
	}
	return content, nil
}

// retrieveUpwards asks for the properties of VMs and of the folders that contain them. VMs that do not
// exist are left out of the result.
func (s *Session) retrieveUpwards(ctx context.Context, vms []types.ManagedObjectReference, properties []types.PropertySpec) ([]types.ObjectContent, error) {
	reference := func(name string) types.BaseSelectionSpec { return &types.SelectionSpec{Name: name} }
	step := func(kind, path string, next ...types.BaseSelectionSpec) types.BaseSelectionSpec {
		return &types.TraversalSpec{SelectionSpec: types.SelectionSpec{Name: kind + "." + path}, Type: kind, Path: path, SelectSet: next}
	}
	fromFolder := reference("ManagedEntity.parent")
	fromVApp := []types.BaseSelectionSpec{reference("VirtualApp.parentFolder"), reference("VirtualApp.parentVApp")}
	objects := objectSpecs(vms...)
	for i := range objects {
		objects[i].SelectSet = []types.BaseSelectionSpec{
			step("VirtualMachine", "parentVApp", fromVApp...),
			step("VirtualApp", "parentFolder", fromFolder),
			step("VirtualApp", "parentVApp", fromVApp...),
			step("ManagedEntity", "parent", fromFolder),
		}
	}
	return s.retrieve(ctx, objects, append(slices.Clone(folderProperties), properties...))
}

// objectSpecs returns a specification of each of the given objects.
func objectSpecs(refs ...types.ManagedObjectReference) []types.ObjectSpec {
	var specs []types.ObjectSpec
	for _, ref := range refs {
		specs = append(specs, types.ObjectSpec{Obj: ref})
	}
	return specs
}

// properties returns the properties that the server has returned of an object, by name. The server
// leaves out those that have no value and those that the user may not read.
func properties(content types.ObjectContent) map[string]any {
	values := make(map[string]any, len(content.PropSet))
	for _, p := range content.PropSet {
		values[p.Name] = p.Val
	}
	return values
}

// property returns a property of an object, or the zero value of T if the server has not returned
// it.
func property[T any](values map[string]any, name string) T {
	value, _ := values[name].(T)
	return value
}

// reference returns a property that is a reference, or nil if the server has not returned it.
func reference(values map[string]any, name string) *types.ManagedObjectReference {
	if ref, ok := values[name].(types.ManagedObjectReference); ok {
		return &ref
	}
	return nil
}

// loadVM converts the answer of the server. Properties that the user may not read are left out.
func loadVM(content types.ObjectContent) (*mo.VirtualMachine, error) {
	content.MissingSet = nil
	object, err := mo.ObjectContentToType(content, true)
	if err != nil {
		return nil, err
	}
	vm, ok := object.(*mo.VirtualMachine)
	if !ok {
		return nil, fmt.Errorf("the server returned a %s in place of a VM", content.Obj.Type)
	}
	return vm, nil
}

// folderProperties are the properties of the objects in which VMs lie, from which the paths of VMs
// are made.
var folderProperties = []types.PropertySpec{
	{Type: "Folder", PathSet: []string{"name", "parent"}},
	{Type: "Datacenter", PathSet: []string{"name", "parent"}},
	{Type: "VirtualApp", PathSet: []string{"name", "parentFolder", "parentVApp"}},
}

// otherProperties are the properties of the other objects that the descriptions of VMs refer to.
var otherProperties = []types.PropertySpec{
	{Type: "HostSystem", PathSet: []string{"name", "summary.config.product"}},
	{Type: "Datastore", PathSet: []string{"name", "summary"}},
	{Type: "Network", PathSet: []string{"name"}},
	{Type: "DistributedVirtualPortgroup", PathSet: []string{"name"}},
	{Type: "OpaqueNetwork", PathSet: []string{"name", "summary"}},
}

// addAll adds objects to the tables. The root of the inventory is left out, because it is not a part
// of paths.
func (t *tables) addAll(content []types.ObjectContent, root types.ManagedObjectReference) {
	for _, object := range content {
		if object.Obj != root {
			t.add(object)
		}
	}
}

// add adds an object to the tables. Objects of other types than those of folderProperties and
// otherProperties are ignored.
func (t *tables) add(content types.ObjectContent) {
	ref, values := content.Obj, properties(content)
	name := decodeName(property[string](values, "name"))
	switch ref.Type {
	case "Folder", "Datacenter":
		t.folders[ref] = folder{name: name, parent: reference(values, "parent"), center: ref.Type == "Datacenter"}
	case "VirtualApp":
		parent := reference(values, "parentVApp")
		if parent == nil {
			parent = reference(values, "parentFolder")
		}
		t.folders[ref] = folder{name: name, parent: parent}
	case "HostSystem":
		t.hosts[ref] = host{name: name, version: property[types.AboutInfo](values, "summary.config.product").Version}
	case "Datastore":
		summary := property[types.DatastoreSummary](values, "summary")
		store := inventory.Store{Name: name, Moref: ref.Value, Type: summary.Type, Free: summary.FreeSpace}
		if !summary.Accessible {
			store.Free = -1
		}
		t.stores[ref] = store
	case "Network", "DistributedVirtualPortgroup", "OpaqueNetwork":
		t.networks[ref.Value] = name
		if summary, ok := values["summary"].(types.OpaqueNetworkSummary); ok {
			t.networks[summary.OpaqueNetworkId] = name
		}
	}
}

// complete asks for those of the given objects that the tables do not have.
func (t *tables) complete(ctx context.Context, s *Session, refs []types.ManagedObjectReference) error {
	var missing []types.ManagedObjectReference
	for _, ref := range refs {
		if !t.asked[ref] {
			t.asked[ref] = true
			missing = append(missing, ref)
		}
	}
	if len(missing) == 0 {
		return nil
	}
	content, err := s.retrieve(ctx, objectSpecs(missing...), otherProperties)
	if err != nil {
		return err
	}
	t.addAll(content, s.client.ServiceContent.RootFolder)
	return nil
}

// othersOf returns the objects other than folders that the description of a VM refers to.
func othersOf(vm *mo.VirtualMachine) []types.ManagedObjectReference {
	refs := slices.Concat(vm.Datastore, vm.Network)
	if vm.Runtime.Host != nil {
		refs = append(refs, *vm.Runtime.Host)
	}
	return refs
}
