package vspheretest

import (
	"fmt"
	"os"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/mo"
	"github.com/vmware/govmomi/vim25/types"
)

// nameOf returns the name of a VM as users see it; "": there is none.
func (s *Server) nameOf(ref types.ManagedObjectReference) string {
	vm, ok := s.model.Map().Get(ref).(*simulator.VirtualMachine)
	if !ok {
		return ""
	}
	var name string
	s.context().WithLock(vm, func() { name = decode(vm.Name) })
	return name
}

// Find returns the reference of the VM with the given name or path, such as "web01" or
// "/DC0/vm/prod/web01", or with the given managed object reference, such as "vm-16".
func (s *Server) Find(name string) types.ManagedObjectReference {
	var found []types.ManagedObjectReference
	for _, e := range s.model.Map().All("VirtualMachine") {
		if ref := e.Reference(); ref.Value == name || s.nameOf(ref) == name || s.pathOf(ref) == name {
			found = append(found, ref)
		}
	}
	if len(found) != 1 {
		panic(fmt.Sprintf("vspheretest: %d VMs are called %q, want one", len(found), name))
	}
	return found[0]
}

// pathOf returns the path of an entity in the inventory.
func (s *Server) pathOf(ref types.ManagedObjectReference) string {
	r := s.model.Map()
	var parts []string
	for at := &ref; at != nil; {
		e, ok := r.Get(*at).(mo.Entity)
		if !ok {
			break
		}
		var name string
		s.context().WithLock(e, func() { name, at = e.Entity().Name, e.Entity().Parent })
		if at != nil { // the root has no part of its own
			parts = append([]string{name}, parts...)
		}
	}
	return "/" + strings.Join(parts, "/")
}

// with calls f for a VM while the VM is locked.
func (s *Server) with(name string, f func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine)) {
	s.locked(s.Find(name), func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
		f(ctx, vm, m)
		return nil, nil
	})(s.context())
}

// AddSnapshot makes a snapshot of a VM, as somebody else would do it, and returns its reference.
func (s *Server) AddSnapshot(vm, name, description string) types.ManagedObjectReference {
	var ref types.ManagedObjectReference
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
		ref = s.makeSnapshot(ctx, vm, m, snapshotSpec{name: name, description: description})
	})
	return ref
}

// Snapshot is a snapshot in the tree of a VM.
type Snapshot struct {
	Name, Description string
	Ref               types.ManagedObjectReference
	Depth             int // 0: a root
}

// Snapshots returns the snapshots of a VM, parents before children.
func (s *Server) Snapshots(vm string) []Snapshot {
	var list []Snapshot
	var walk func(tree []types.VirtualMachineSnapshotTree, depth int)
	walk = func(tree []types.VirtualMachineSnapshotTree, depth int) {
		for _, e := range tree {
			list = append(list, Snapshot{decode(e.Name), e.Description, e.Snapshot, depth})
			walk(e.ChildSnapshotList, depth+1)
		}
	}
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
		if vm.Snapshot != nil {
			walk(vm.Snapshot.RootSnapshotList, 0)
		}
	})
	return list
}

// SnapshotNames returns the names of the snapshots of a VM, parents before children.
func (s *Server) SnapshotNames(vm string) []string {
	var names []string
	for _, e := range s.Snapshots(vm) {
		names = append(names, e.Name)
	}
	return names
}

// RemoveSnapshotBehindBack removes the snapshots of a VM that have the given name; "": all.
func (s *Server) RemoveSnapshotBehindBack(vm, name string) {
	list := s.Snapshots(vm)
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
		for _, e := range list {
			if name == "" || e.Name == name {
				s.dropSnapshot(ctx, vm, m, e.Ref, false)
			}
		}
	})
}

// Revert reverts a VM to its snapshot with the given name.
func (s *Server) Revert(vm, name string) {
	list := s.Snapshots(vm)
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
		for _, e := range list {
			if e.Name == name {
				s.revert(ctx, vm, m, e.Ref)
			}
		}
	})
}

// KeepFiles makes the next removal of a snapshot of the VM leave the snapshot's files. The VM then
// needs consolidation.
func (s *Server) KeepFiles(vm string) {
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) { m.keeps = true })
}

// NeedConsolidation says of a VM that its disks need consolidation.
func (s *Server) NeedConsolidation(vm string) {
	s.update(vm, types.PropertyChange{Name: "runtime.consolidationNeeded", Val: true})
}

// NeedsConsolidation reports whether the disks of a VM need consolidation.
func (s *Server) NeedsConsolidation(vm string) (needed bool) {
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
		needed = vm.Runtime.ConsolidationNeeded
	})
	return needed
}

// QuiesceFails makes the tasks of quiesced snapshots of a VM fail; nil: they succeed again.
func (s *Server) QuiesceFails(vm string, fault types.BaseMethodFault) {
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) { m.quiesce = fault })
}

// StartTask starts a task of a VM that no other task may run beside, such as somebody's backup. It
// ends when the function that StartTask returns is called.
func (s *Server) StartTask(vm, name string) (end func()) {
	r := s.On(name, Fault{}) // no method has this name: the rule is for Command alone
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
		ref := s.startTask(ctx, vm.Self, name, func(ctx *simulator.Context) (types.AnyType, types.BaseMethodFault) {
			r.await(s.closed)
			s.mu.Lock()
			delete(s.busy, vm.Self)
			s.mu.Unlock()
			return nil, nil
		})
		s.mu.Lock()
		s.busy[vm.Self] = ref
		s.mu.Unlock()
	})
	return r.Release
}

// update changes properties of a VM.
func (s *Server) update(vm string, changes ...types.PropertyChange) {
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
		ctx.Update(vm, changes)
		s.changed(ctx, vm)
	})
}

// PowerOff switches a VM off.
func (s *Server) PowerOff(vm string) { s.setPowerOf(vm, types.VirtualMachinePowerStatePoweredOff) }

// PowerOn switches a VM on.
func (s *Server) PowerOn(vm string) { s.setPowerOf(vm, types.VirtualMachinePowerStatePoweredOn) }

// Suspend suspends a VM.
func (s *Server) Suspend(vm string) { s.setPowerOf(vm, types.VirtualMachinePowerStateSuspended) }

func (s *Server) setPowerOf(vm string, state types.VirtualMachinePowerState) {
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) { s.setPower(ctx, vm, state) })
}

// Rename gives a VM another name. Its files keep theirs.
func (s *Server) Rename(vm, name string) {
	s.update(vm, types.PropertyChange{Name: "name", Val: encode(name)}, types.PropertyChange{Name: "config.name", Val: encode(name)})
}

// Question makes a VM wait for an answer; "": it no longer does.
func (s *Server) Question(vm, text string) {
	var q *types.VirtualMachineQuestionInfo
	if text != "" {
		q = &types.VirtualMachineQuestionInfo{Id: "1", Text: text, Choice: types.ChoiceOption{ChoiceInfo: []types.BaseElementDescription{
			&types.ElementDescription{Description: types.Description{Label: "Cancel", Summary: "Cancel"}, Key: "0"}}}}
	}
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) { vm.Runtime.Question = q })
}

// MoveHost moves a VM to another host (vMotion).
func (s *Server) MoveHost(vm, host string) {
	for _, e := range s.model.Map().All("HostSystem") {
		if h := e.(*simulator.HostSystem); h.Name == host {
			ref := h.Self
			s.update(vm, types.PropertyChange{Name: "runtime.host", Val: &ref}, types.PropertyChange{Name: "summary.runtime.host", Val: &ref})
			return
		}
	}
	panic(fmt.Sprintf("vspheretest: there is no host %q", host))
}

// MoveDatastore moves all disks of a VM to another datastore (Storage vMotion).
func (s *Server) MoveDatastore(vm, datastore string) {
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
		s.datastore(m, encode(datastore)) // panics if there is none
		for _, n := range m.nodes() {
			n.store = encode(datastore)
		}
		s.show(ctx, vm, m)
		s.changed(ctx, vm)
	})
}

// Destroy removes a VM with its files.
func (s *Server) Destroy(vm string) { s.remove(s.context(), s.Find(vm)) }

// remove removes a VM with its snapshots and files.
func (s *Server) remove(ctx *simulator.Context, ref types.ManagedObjectReference) {
	s.locked(ref, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) (types.AnyType, types.BaseMethodFault) {
		s.dropAll(ctx, vm, m)
		m.current, m.waiting = nil, nil
		s.must(s.link(m))
		for _, store := range vm.Datastore {
			ds := ctx.Map.Get(store).(*simulator.Datastore)
			ctx.Map.RemoveReference(ctx, ds, &ds.Vm, ref)
		}
		host := ctx.Map.Get(*vm.Runtime.Host).(*simulator.HostSystem)
		ctx.Map.RemoveReference(ctx, host, &host.Vm, ref)
		return nil, nil
	})(ctx)
	vm := ctx.Map.Get(ref).(*simulator.VirtualMachine)
	folder := ctx.Map.Get(*vm.Parent).(*simulator.Folder)
	ctx.Map.Remove(ctx, ref)
	ctx.Map.RemoveReference(ctx, folder, &folder.ChildEntity, ref)
	s.mu.Lock()
	delete(s.machines, ref)
	s.mu.Unlock()
}

// FillDatastore sets the free space of a datastore, in bytes. Snapshots of VMs on a datastore with
// less than 1 MiB fail with NoDiskSpace.
func (s *Server) FillDatastore(name string, free int64) {
	found := false
	ctx := s.context()
	for _, e := range ctx.Map.All("Datastore") {
		if ds := e.(*simulator.Datastore); ds.Name == encode(name) {
			found = true
			ctx.WithLock(ds, func() { setFree(ds, free) })
		}
	}
	if !found {
		panic(fmt.Sprintf("vspheretest: there is no datastore %q", name))
	}
}

// track switches change tracking of a VM on or off.
func (s *Server) track(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine, on bool) {
	vm.Config.ChangeTrackingEnabled = types.NewBool(on)
	for key, n := range m.current {
		if !on {
			n.tracked = ""
		} else if n.tracked == "" {
			n.tracked, n.round = trackingID(fmt.Sprintf("%s %d %d", m.dir, key, s.newImage())), 1
			n.written = nil
		}
	}
	s.show(ctx, vm, m)
	s.changed(ctx, vm)
}

// OpenHandles returns the number of handles that are open in the stand-in library. Those of workers
// that were killed count for ever. A test may ask when a call arrives:
//
//	s.On("RemoveSnapshot_Task", vspheretest.Fault{Do: func() { open = s.OpenHandles() }})
func (s *Server) OpenHandles() int64 {
	return s.Library.Figures()["handles"] - s.Library.Calls()["Close"]
}

// Files returns the files of a VM's disks, as "[DATASTORE] PATH", in the order of the VM's disks.
func (s *Server) Files(vm string) []string {
	var list []string
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
		for _, d := range disksOf(vm.Config.Hardware.Device) {
			list = append(list, m.current[d.Key].name())
		}
	})
	return list
}

// disk returns the file that disk n of a VM, from 1, writes.
func disk(vm *simulator.VirtualMachine, m *machine, n int) *node {
	list := disksOf(vm.Config.Hardware.Device)
	if n < 1 || n > len(list) {
		panic(fmt.Sprintf("vspheretest: the VM has %d disks, not a disk %d", len(list), n))
	}
	return m.current[list[n-1].Key]
}

// Image returns the path of the raw image with the present content of a disk of a VM. Disks are
// numbered from 1. A snapshot that is made later keeps this file unchanged.
func (s *Server) Image(vm string, n int) string {
	var path string
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) { path = disk(vm, m, n).image })
	return path
}

// Write does what a guest does that writes p to a disk of its VM at an offset. Snapshots keep what
// was there.
func (s *Server) Write(vm string, n int, p []byte, off int64) {
	s.with(vm, func(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
		d := disk(vm, m, n)
		s.must(s.own(m, d))
		f, err := os.OpenFile(d.image, os.O_WRONLY, 0)
		s.must(err)
		_, err = f.WriteAt(p, off)
		s.must(err)
		s.must(f.Close())
		d.written = append(d.written, span{off, off + int64(len(p)), d.round})
	})
}
