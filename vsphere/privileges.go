package vsphere

import (
	"cmp"
	"context"
	"errors"
	"maps"
	"slices"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/hinted"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// Missing returns the privileges that the user of the session lacks for the given uses, on the VM, on
// its datastores and on the root of the inventory. If vm is nil, the privileges for VMs and
// datastores are looked for at the root, from which other objects inherit them.
func (s *Session) Missing(ctx context.Context, vm *inventory.VM, uses ...inventory.Use) ([]inventory.Lacking, error) {
	missing := []inventory.Lacking{}
	for _, scope := range []inventory.Scope{inventory.OnVM, inventory.OnDatastore, inventory.OnRoot} {
		wanted := slices.DeleteFunc(inventory.Privileges(uses...), func(p inventory.Privilege) bool { return p.On != scope })
		if len(wanted) == 0 {
			continue
		}
		names := s.entities(vm, scope)
		refs := slices.SortedFunc(maps.Keys(names), func(a, b types.ManagedObjectReference) int { return cmp.Compare(names[a], names[b]) })
		if len(refs) == 0 { // the VM has no datastore
			continue
		}
		lacks, err := s.lacking(ctx, refs, wanted)
		if err != nil {
			return nil, explain("cannot check the privileges", err)
		}
		for _, ref := range refs {
			for _, p := range wanted {
				if lacks(ref, p.ID) {
					missing = append(missing, inventory.Lacking{Privilege: p, Object: names[ref]})
				}
			}
		}
	}
	return missing, nil
}

// removable returns an error if the user of the session may make snapshots of the VM and may not remove
// them. If the server does not tell the privileges, that is no reason to make no snapshot.
func (v *VM) removable(ctx context.Context) error {
	missing, err := v.session.Missing(ctx, &inventory.VM{Moref: v.moref, Name: v.name}, inventory.UseSnapshot)
	if err != nil {
		v.session.Log.Debug("vsphere: the privileges are unknown", "vm", v.name, "error", err)
		return context.Cause(ctx)
	}
	for _, m := range missing {
		if m.ID == "VirtualMachine.State.RemoveSnapshot" {
			return retry.Permanent(hinted.Error(errors.New("the user lacks the privilege "+m.ID+", so the snapshot could not be removed again"), hintPrivileges))
		}
	}
	return nil
}

// entities returns the objects of a scope, with their names.
func (s *Session) entities(vm *inventory.VM, scope inventory.Scope) map[types.ManagedObjectReference]string {
	names := make(map[types.ManagedObjectReference]string)
	switch {
	case scope == inventory.OnRoot || vm == nil:
		names[s.client.ServiceContent.RootFolder] = ""
	case scope == inventory.OnVM:
		names[types.ManagedObjectReference{Type: "VirtualMachine", Value: vm.Moref}] = vm.Name
	case scope == inventory.OnDatastore:
		for _, store := range vm.Stores {
			names[types.ManagedObjectReference{Type: "Datastore", Value: store.Moref}] = store.Name
		}
	}
	return names
}

// lacking returns a function that reports whether the user of the session lacks a privilege on one of
// the given objects. A privilege that the server does not know is never lacking.
func (s *Session) lacking(ctx context.Context, refs []types.ManagedObjectReference, wanted []inventory.Privilege) (func(ref types.ManagedObjectReference, id string) bool, error) {
	var ids []string
	for _, p := range wanted {
		ids = append(ids, p.ID)
	}
	var answer *types.HasPrivilegeOnEntitiesResponse
	// The key of the session is one of the session in which the privileges are asked for.
	err := s.together(ctx, func(ctx context.Context) error {
		user, err := s.activeSession(ctx)
		if err != nil {
			return err
		}
		answer, err = s.hasPrivileges(ctx, user.Key, refs, ids)
		return err
	})
	if err != nil {
		return nil, err
	}
	answers := make(map[types.ManagedObjectReference][]types.PrivilegeAvailability)
	for _, entity := range answer.Returnval {
		answers[entity.Entity] = entity.PrivAvailability
	}
	return func(ref types.ManagedObjectReference, id string) bool {
		for _, p := range answers[ref] {
			if p.PrivId == id {
				return !p.IsGranted
			}
		}
		return answers[ref] == nil // the server has not answered for this object
	}, nil
}

// hasPrivileges asks the server for privileges. A server that does not know one of them, because it
// is too old, refuses the call. Then the call is repeated with the privileges that the server knows.
func (s *Session) hasPrivileges(ctx context.Context, key string, refs []types.ManagedObjectReference, ids []string) (*types.HasPrivilegeOnEntitiesResponse, error) {
	request := &types.HasPrivilegeOnEntities{This: *s.client.ServiceContent.AuthorizationManager, Entity: refs, SessionId: key, PrivId: ids}
	answer, err := methods.HasPrivilegeOnEntities(ctx, s.client, request)
	if !fault.Is(err, &types.InvalidArgument{}) {
		return answer, err
	}
	content, listErr := s.retrieveParts(ctx, objectSpecs(request.This), []types.PropertySpec{{Type: "AuthorizationManager", PathSet: []string{"privilegeList"}}}, true)
	if listErr != nil || len(content) == 0 {
		return nil, err
	}
	known := property[types.ArrayOfAuthorizationPrivilege](properties(content[0]), "privilegeList").AuthorizationPrivilege
	request.PrivId = slices.DeleteFunc(slices.Clone(ids), func(id string) bool {
		return !slices.ContainsFunc(known, func(p types.AuthorizationPrivilege) bool { return p.PrivId == id })
	})
	if len(request.PrivId) == len(ids) || len(request.PrivId) == 0 {
		return nil, err
	}
	return methods.HasPrivilegeOnEntities(ctx, s.client, request)
}
