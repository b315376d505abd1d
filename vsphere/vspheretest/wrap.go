package vspheretest

import (
	"slices"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// handler is called before each call. It puts objects with methods of our own into the registry of
// the caller's session, where the simulator searches first. Replacing the simulator's objects in
// its main registry would not work, because it asserts their types in many places.
func (s *Server) handler(ctx *simulator.Context, m *simulator.Method) (mo.Reference, types.BaseMethodFault) {
	if ctx.Session == nil {
		return nil, nil
	}
	if fault := s.denied(m); fault != nil {
		return nil, fault
	}
	var wrapper mo.Reference
	switch o := ctx.Map.Get(m.This).(type) {
	case *simulator.VirtualMachine:
		wrapper = &virtualMachine{o, s}
	case *simulator.VirtualMachineSnapshot:
		wrapper = &virtualMachineSnapshot{o, s}
	case *simulator.AuthorizationManager:
		wrapper = &authorizationManager{o, s}
	case *simulator.SearchIndex:
		wrapper = &searchIndex{o, s}
	case *simulator.ServiceInstance:
		wrapper = &serviceInstance{o, s}
	default:
		return nil, nil
	}
	session := ctx.Session.Registry
	s.mu.Lock()
	have := slices.Contains(s.wrapped[m.This], session)
	if !have {
		s.wrapped[m.This] = append(s.wrapped[m.This], session)
	}
	s.mu.Unlock()
	if !have {
		session.Put(wrapper)
	}
	return nil, nil
}

// watcher takes the wrappers of removed objects out of the sessions. They would answer for ever.
type watcher struct{ s *Server }

func (w *watcher) Reference() types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "vspheretest", Value: "watcher"}
}
func (w *watcher) PutObject(*simulator.Context, mo.Reference)                            {}
func (w *watcher) UpdateObject(*simulator.Context, mo.Reference, []types.PropertyChange) {}
func (w *watcher) RemoveObject(ctx *simulator.Context, ref types.ManagedObjectReference) {
	w.s.mu.Lock()
	sessions := w.s.wrapped[ref]
	delete(w.s.wrapped, ref)
	w.s.mu.Unlock()
	for _, session := range sessions {
		session.Remove(ctx, ref)
	}
}

// work is what a task does. It must lock the objects that it changes.
type work func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault)

// startTask starts a task for an object that the caller has locked. The simulator's own tasks keep
// the object locked until they end, so that nobody could read the properties of a VM whose task
// hangs.
func (s *Server) startTask(ctx *simulator.Context, entity types.ManagedObjectReference, name string, do work) types.ManagedObjectReference {
	task := simulator.CreateTask(entity, name, nil)
	if e, ok := ctx.Map.Get(entity).(mo.Entity); ok {
		task.Info.EntityName = e.Entity().Name
	}
	if ctx.Session != nil {
		task.Info.Reason = &types.TaskReasonUser{UserName: ctx.Session.UserName}
	}
	ctx.Map.Put(task)
	ctx.Map.AtomicUpdate(ctx, task, []types.PropertyChange{
		{Name: "info.key", Val: task.Self.Value},
		{Name: "info.task", Val: task.Self},
		{Name: "info.startTime", Val: now()},
		{Name: "info.state", Val: types.TaskInfoStateRunning},
	})
	end := s.begin(1)
	go func() {
		defer end()
		ctx := s.context()
		result, fault := do(ctx)
		changes := []types.PropertyChange{
			{Name: "info.completeTime", Val: now()},
			{Name: "info.state", Val: types.TaskInfoStateSuccess},
			{Name: "info.result", Val: result},
		}
		if fault != nil {
			changes[1].Val = types.TaskInfoStateError
			changes[2] = types.PropertyChange{Name: "info.error", Val: types.LocalizedMethodFault{Fault: fault, LocalizedMessage: messageOf(fault)}}
		}
		ctx.Map.AtomicUpdate(ctx, task, changes)
	}()
	return task.Self
}

// exclusive starts a task of a VM that no other exclusive task may run beside. It obeys the rule
// that the call has met.
func (s *Server) exclusive(ctx *simulator.Context, vm types.ManagedObjectReference, method, name string, do work) (types.ManagedObjectReference, *soap.Fault) {
	rule := s.takeRule(vm, method)
	s.mu.Lock()
	other, busy := s.busy[vm]
	s.mu.Unlock()
	if busy {
		return types.ManagedObjectReference{}, simulator.Fault("", &types.TaskInProgress{Task: other})
	}
	started := make(chan struct{})
	var task *simulator.Task
	ref := s.startTask(ctx, vm, name, func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		<-started
		defer func() {
			s.mu.Lock()
			delete(s.busy, vm)
			s.mu.Unlock()
		}()
		if rule != nil {
			ctx.Map.AtomicUpdate(ctx, task, []types.PropertyChange{{Name: "info.progress", Val: int32(50)}})
			if rule.HangTask && !rule.await(s.closed) {
				return nil, &types.RequestCanceled{}
			}
			if rule.Task != nil {
				return nil, rule.Task
			}
		}
		return do(ctx)
	})
	task = ctx.Map.Get(ref).(*simulator.Task)
	s.mu.Lock()
	s.busy[vm] = ref
	s.mu.Unlock()
	close(started)
	return ref, nil
}

// locked returns work that runs while the VM is locked. If the VM was removed, the work fails. If
// the work panics, the VM is unlocked first: other tests go on with the server.
func (s *Server) locked(ref types.ManagedObjectReference, do func(*simulator.Context, *simulator.VirtualMachine, *machine) (types.AnyType, types.BaseMethodFault)) work {
	return func(ctx *simulator.Context) (result types.AnyType, fault types.BaseMethodFault) {
		vm, ok := ctx.Map.Get(ref).(*simulator.VirtualMachine)
		if !ok {
			return nil, &types.ManagedObjectNotFound{Obj: ref}
		}
		var reason any
		ctx.WithLock(vm, func() {
			defer func() { reason = recover() }()
			s.mu.Lock()
			m := s.machines[ref]
			s.mu.Unlock()
			result, fault = do(ctx, vm, m)
		})
		if reason != nil {
			panic(reason)
		}
		return result, fault
	}
}

// virtualMachine is a VM in the registry of a session.
type virtualMachine struct {
	*simulator.VirtualMachine
	s *Server
}

func (v *virtualMachine) CreateSnapshotTask(ctx *simulator.Context, req *types.CreateSnapshot_Task) soap.HasFault {
	ref, fault := v.createSnapshot(ctx, "CreateSnapshot_Task", snapshotSpec{req.Name, req.Description, req.Memory, req.Quiesce})
	body := &methods.CreateSnapshot_TaskBody{Fault_: fault}
	if fault == nil {
		body.Res = &types.CreateSnapshot_TaskResponse{Returnval: ref}
	}
	return body
}

func (v *virtualMachine) CreateSnapshotExTask(ctx *simulator.Context, req *types.CreateSnapshotEx_Task) soap.HasFault {
	ref, fault := v.createSnapshot(ctx, "CreateSnapshotEx_Task", snapshotSpec{req.Name, req.Description, req.Memory, req.QuiesceSpec != nil})
	body := &methods.CreateSnapshotEx_TaskBody{Fault_: fault}
	if fault == nil {
		body.Res = &types.CreateSnapshotEx_TaskResponse{Returnval: ref}
	}
	return body
}

func (v *virtualMachine) createSnapshot(ctx *simulator.Context, method string, spec snapshotSpec) (types.ManagedObjectReference, *soap.Fault) {
	if v.Config == nil || v.Config.Template || v.Runtime.ConnectionState != types.VirtualMachineConnectionStateConnected {
		return types.ManagedObjectReference{}, simulator.Fault("", &types.InvalidState{})
	}
	return v.s.exclusive(ctx, v.Self, method, "createSnapshot", v.s.locked(v.Self,
		func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
			if fault := v.s.refusal(ctx, vm, m, spec); fault != nil {
				return nil, fault
			}
			return v.s.makeSnapshot(ctx, vm, m, spec), nil
		}))
}

// refusal returns the fault of a task that makes a snapshot; nil: it can be made.
func (s *Server) refusal(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine, spec snapshotSpec) types.BaseMethodFault {
	if spec.quiesce && m.quiesce != nil {
		return m.quiesce
	}
	if vm.Snapshot != nil && vm.Snapshot.CurrentSnapshot != nil {
		depth := 1
		for p := vm.Snapshot.CurrentSnapshot; p != nil; p = parentOf(vm.Snapshot.RootSnapshotList, *p) {
			depth++
		}
		if depth > 32 {
			return &types.TooManySnapshotLevels{}
		}
	}
	if vm.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff && sharesDisks(vm.Config.Hardware.Device) {
		return &types.SnapshotIncompatibleDeviceInVm{Fault: types.LocalizedMethodFault{Fault: &types.NotSupported{}}}
	}
	for _, ref := range vm.Datastore {
		if ds := ctx.Map.Get(ref).(*simulator.Datastore); ds.Summary.FreeSpace < 1<<20 {
			return &types.NoDiskSpace{Datastore: ds.Name}
		}
	}
	return nil
}

func (v *virtualMachine) ConsolidateVMDisksTask(ctx *simulator.Context, req *types.ConsolidateVMDisks_Task) soap.HasFault {
	ref, fault := v.s.exclusive(ctx, v.Self, "ConsolidateVMDisks_Task", "consolidateDisks", v.s.locked(v.Self,
		func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
			v.s.consolidate(ctx, vm, m)
			return nil, nil
		}))
	body := &methods.ConsolidateVMDisks_TaskBody{Fault_: fault}
	if fault == nil {
		body.Res = &types.ConsolidateVMDisks_TaskResponse{Returnval: ref}
	}
	return body
}

func (v *virtualMachine) RemoveAllSnapshotsTask(ctx *simulator.Context, req *types.RemoveAllSnapshots_Task) soap.HasFault {
	ref, fault := v.s.exclusive(ctx, v.Self, "RemoveAllSnapshots_Task", "removeAllSnapshots", v.s.locked(v.Self,
		func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
			v.s.dropAll(ctx, vm, m)
			return nil, nil
		}))
	body := &methods.RemoveAllSnapshots_TaskBody{Fault_: fault}
	if fault == nil {
		body.Res = &types.RemoveAllSnapshots_TaskResponse{Returnval: ref}
	}
	return body
}

// dropAll removes all snapshots of a VM.
func (s *Server) dropAll(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
	for vm.Snapshot != nil {
		s.dropSnapshot(ctx, vm, m, vm.Snapshot.RootSnapshotList[0].Snapshot, true)
	}
}

func (v *virtualMachine) PowerOnVMTask(ctx *simulator.Context, req *types.PowerOnVM_Task) soap.HasFault {
	ref, fault := v.power(ctx, "PowerOnVM_Task", "powerOn", types.VirtualMachinePowerStatePoweredOn)
	body := &methods.PowerOnVM_TaskBody{Fault_: fault}
	if fault == nil {
		body.Res = &types.PowerOnVM_TaskResponse{Returnval: ref}
	}
	return body
}

func (v *virtualMachine) PowerOffVMTask(ctx *simulator.Context, req *types.PowerOffVM_Task) soap.HasFault {
	ref, fault := v.power(ctx, "PowerOffVM_Task", "powerOff", types.VirtualMachinePowerStatePoweredOff)
	body := &methods.PowerOffVM_TaskBody{Fault_: fault}
	if fault == nil {
		body.Res = &types.PowerOffVM_TaskResponse{Returnval: ref}
	}
	return body
}

func (v *virtualMachine) power(ctx *simulator.Context, method, name string, state types.VirtualMachinePowerState) (types.ManagedObjectReference, *soap.Fault) {
	return v.s.exclusive(ctx, v.Self, method, name, v.s.locked(v.Self,
		func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
			if vm.Runtime.PowerState == state {
				return nil, &types.InvalidPowerState{RequestedState: state, ExistingState: state}
			}
			v.s.setPower(ctx, vm, state)
			return nil, nil
		}))
}

func (s *Server) setPower(ctx *simulator.Context, vm *simulator.VirtualMachine, state types.VirtualMachinePowerState) {
	tools, status := "guestToolsNotRunning", "notRunning"
	if state == types.VirtualMachinePowerStatePoweredOn {
		tools, status = "guestToolsRunning", "running"
	}
	ctx.Update(vm, []types.PropertyChange{
		{Name: "runtime.powerState", Val: state},
		{Name: "summary.runtime.powerState", Val: state},
		{Name: "guest.toolsRunningStatus", Val: tools},
		{Name: "guest.guestState", Val: status},
	})
	s.changed(ctx, vm)
}

func (v *virtualMachine) ShutdownGuest(ctx *simulator.Context, req *types.ShutdownGuest) soap.HasFault {
	if v.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOn {
		return &methods.ShutdownGuestBody{Fault_: simulator.Fault("", &types.InvalidPowerState{
			RequestedState: types.VirtualMachinePowerStatePoweredOn, ExistingState: v.Runtime.PowerState})}
	}
	if v.Guest.ToolsRunningStatus != "guestToolsRunning" {
		return &methods.ShutdownGuestBody{Fault_: simulator.Fault("", &types.ToolsUnavailable{})}
	}
	v.s.startTask(ctx, v.Self, "shutdownGuest", v.s.locked(v.Self,
		func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
			v.s.setPower(ctx, vm, types.VirtualMachinePowerStatePoweredOff)
			return nil, nil
		}))
	return &methods.ShutdownGuestBody{Res: new(types.ShutdownGuestResponse)}
}

func (v *virtualMachine) ReconfigVMTask(ctx *simulator.Context, req *types.ReconfigVM_Task) soap.HasFault {
	ref, fault := v.s.exclusive(ctx, v.Self, "ReconfigVM_Task", "reconfigVm", v.s.locked(v.Self,
		func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
			if on := req.Spec.ChangeTrackingEnabled; on != nil {
				v.s.track(ctx, vm, m, *on)
				return nil, nil
			}
			return nil, &types.NotSupported{} // nothing else is simulated
		}))
	body := &methods.ReconfigVM_TaskBody{Fault_: fault}
	if fault == nil {
		body.Res = &types.ReconfigVM_TaskResponse{Returnval: ref}
	}
	return body
}

func (v *virtualMachine) DestroyTask(ctx *simulator.Context, req *types.Destroy_Task) soap.HasFault {
	ref, fault := v.s.exclusive(ctx, v.Self, "Destroy_Task", "destroy", func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
		v.s.remove(ctx, v.Self)
		return nil, nil
	})
	body := &methods.Destroy_TaskBody{Fault_: fault}
	if fault == nil {
		body.Res = &types.Destroy_TaskResponse{Returnval: ref}
	}
	return body
}

// virtualMachineSnapshot is a snapshot in the registry of a session.
type virtualMachineSnapshot struct {
	*simulator.VirtualMachineSnapshot
	s *Server
}

func (v *virtualMachineSnapshot) RemoveSnapshotTask(ctx *simulator.Context, req *types.RemoveSnapshot_Task) soap.HasFault {
	self := v.Self
	body := &methods.RemoveSnapshot_TaskBody{}
	ctx.WithLock(v.Vm, func() {
		var ref types.ManagedObjectReference
		ref, body.Fault_ = v.s.exclusive(ctx, v.Vm, "RemoveSnapshot_Task", "removeSnapshot", v.s.locked(v.Vm,
			func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
				v.s.dropSnapshot(ctx, vm, m, self, req.RemoveChildren)
				return nil, nil
			}))
		if body.Fault_ == nil {
			body.Res = &types.RemoveSnapshot_TaskResponse{Returnval: ref}
		}
	})
	return body
}

func (v *virtualMachineSnapshot) RevertToSnapshotTask(ctx *simulator.Context, req *types.RevertToSnapshot_Task) soap.HasFault {
	self := v.Self
	body := &methods.RevertToSnapshot_TaskBody{}
	ctx.WithLock(v.Vm, func() {
		var ref types.ManagedObjectReference
		ref, body.Fault_ = v.s.exclusive(ctx, v.Vm, "RevertToSnapshot_Task", "revertToSnapshot", v.s.locked(v.Vm,
			func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
				if m.frozen[self] == nil {
					return nil, &types.ManagedObjectNotFound{Obj: self}
				}
				v.s.revert(ctx, vm, m, self)
				return nil, nil
			}))
		if body.Fault_ == nil {
			body.Res = &types.RevertToSnapshot_TaskResponse{Returnval: ref}
		}
	})
	return body
}

// searchIndex is the SearchIndex in the registry of a session. The simulator's own searches panic
// if a VM has no configuration.
type searchIndex struct {
	*simulator.SearchIndex
	s *Server
}

func (x *searchIndex) FindByUuid(ctx *simulator.Context, req *types.FindByUuid) soap.HasFault {
	all := x.FindAllByUuid(ctx, &types.FindAllByUuid{Uuid: req.Uuid, VmSearch: req.VmSearch, InstanceUuid: req.InstanceUuid})
	res := &types.FindByUuidResponse{}
	if found := all.(*methods.FindAllByUuidBody).Res.Returnval; len(found) > 0 {
		res.Returnval = &found[0]
	}
	return &methods.FindByUuidBody{Res: res}
}

func (x *searchIndex) FindAllByUuid(ctx *simulator.Context, req *types.FindAllByUuid) soap.HasFault {
	res := &types.FindAllByUuidResponse{}
	if req.VmSearch {
		for _, e := range ctx.Map.All("VirtualMachine") {
			vm := e.(*simulator.VirtualMachine)
			ctx.WithLock(vm, func() {
				if vm.Config == nil {
					return
				}
				id := vm.Config.Uuid
				if req.InstanceUuid != nil && *req.InstanceUuid {
					id = vm.Config.InstanceUuid
				}
				if id == req.Uuid {
					res.Returnval = append(res.Returnval, vm.Self)
				}
			})
		}
	}
	return &methods.FindAllByUuidBody{Res: res}
}
