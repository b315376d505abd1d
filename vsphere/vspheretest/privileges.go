package vspheretest

import (
	"slices"

	"github.com/vmware/govmomi/object"
	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// needed are the privileges that methods need. A method without an entry needs none.
var needed = map[string]string{
	"CreateSnapshot_Task":     "VirtualMachine.State.CreateSnapshot",
	"CreateSnapshotEx_Task":   "VirtualMachine.State.CreateSnapshot",
	"RemoveSnapshot_Task":     "VirtualMachine.State.RemoveSnapshot",
	"RemoveAllSnapshots_Task": "VirtualMachine.State.RemoveSnapshot",
	"ConsolidateVMDisks_Task": "VirtualMachine.State.RemoveSnapshot",
	"RevertToSnapshot_Task":   "VirtualMachine.State.RevertToSnapshot",
	"PowerOnVM_Task":          "VirtualMachine.Interact.PowerOn",
	"PowerOffVM_Task":         "VirtualMachine.Interact.PowerOff",
	"ShutdownGuest":           "VirtualMachine.Interact.PowerOff",
	"ReconfigVM_Task":         "VirtualMachine.Config.ChangeTracking",
	"QueryChangedDiskAreas":   "VirtualMachine.Provisioning.DiskRandomRead",
	"Destroy_Task":            "VirtualMachine.Inventory.Delete",
	"NfcGetVmFiles":           "VirtualMachine.Provisioning.GetVmFiles",
}

// RevokePrivilege takes a privilege, such as "VirtualMachine.State.CreateSnapshot", from all users.
func (s *Server) RevokePrivilege(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.revoked[id] = true
}

// GrantPrivilege gives a revoked privilege back.
func (s *Server) GrantPrivilege(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.revoked, id)
}

func (s *Server) granted(id string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return !s.revoked[id]
}

// denied returns the fault of a call for which the privilege was revoked.
func (s *Server) denied(m *simulator.Method) types.BaseMethodFault {
	if id := needed[m.Name]; id != "" && !s.granted(id) {
		object := m.This
		if req, ok := m.Body.(*nfcGetVmFiles); ok {
			object = req.Vm
		}
		return &types.NoPermission{Object: &object, PrivilegeId: id}
	}
	return nil
}

// authorizationManager is the AuthorizationManager in the registry of a session. The simulator's own
// one grants everything, whatever the names of the privileges are.
type authorizationManager struct {
	*simulator.AuthorizationManager
	s *Server
}

// HasPrivilegeOnEntities answers for open sessions and privileges that exist.
func (a *authorizationManager) HasPrivilegeOnEntities(ctx *simulator.Context, req *types.HasPrivilegeOnEntities) soap.HasFault {
	body := &methods.HasPrivilegeOnEntitiesBody{}
	open := slices.ContainsFunc(a.s.sessions(), func(u types.UserSession) bool { return u.Key == req.SessionId })
	known := object.AuthorizationRoleList(a.RoleList).ByName("Admin").Privilege
	if !open {
		body.Fault_ = simulator.Fault("", &types.InvalidArgument{InvalidProperty: "sessionId"})
		return body
	}
	for _, id := range req.PrivId {
		if !slices.Contains(known, id) {
			body.Fault_ = simulator.Fault("", &types.InvalidArgument{InvalidProperty: "privId"})
			return body
		}
	}
	body.Res = &types.HasPrivilegeOnEntitiesResponse{}
	for _, e := range req.Entity {
		if ctx.Map.Get(e) == nil {
			return &methods.HasPrivilegeOnEntitiesBody{Fault_: simulator.Fault("", &types.ManagedObjectNotFound{Obj: e})}
		}
		p := types.EntityPrivilege{Entity: e}
		for _, id := range req.PrivId {
			p.PrivAvailability = append(p.PrivAvailability, types.PrivilegeAvailability{PrivId: id, IsGranted: a.s.granted(id)})
		}
		body.Res.Returnval = append(body.Res.Returnval, p)
	}
	return body
}
