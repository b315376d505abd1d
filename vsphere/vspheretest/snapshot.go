package vspheretest

import (
	"fmt"
	"slices"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/types"
)

// snapshotSpec says what snapshot to make.
type snapshotSpec struct {
	name, description string
	memory, quiesce   bool
}

// makeSnapshot makes a snapshot of a VM: the files that the VM wrote so far become the snapshot's,
// and the VM gets new ones. The caller has locked the VM.
func (s *Server) makeSnapshot(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine, spec snapshotSpec) types.ManagedObjectReference {
	snapshot := &simulator.VirtualMachineSnapshot{}
	snapshot.Vm = vm.Self
	snapshot.Config = *vm.Config
	frozen := map[int32]*node{}
	for _, d := range disksOf(vm.Config.Hardware.Device) {
		if n := m.current[d.Key]; n != nil && inSnapshots(d) {
			frozen[d.Key] = n
		}
	}
	var devices []types.BaseVirtualDevice
	for _, d := range vm.Config.Hardware.Device {
		if disk, ok := d.(*types.VirtualDisk); !ok || inSnapshots(disk) {
			devices = append(devices, d)
		}
	}
	snapshot.Config.Hardware.Device = s.withFiles(m, devices, frozen, true)
	ctx.Map.Put(snapshot)
	m.frozen[snapshot.Self] = frozen
	for key, n := range frozen {
		m.current[key] = m.newDelta(n)
	}

	state := types.VirtualMachinePowerStatePoweredOff // also of a VM that runs, if the snapshot has no memory
	if spec.memory {
		state = vm.Runtime.PowerState
	}
	s.mu.Lock()
	s.snapshotID++
	id := s.snapshotID
	s.mu.Unlock()
	entry := types.VirtualMachineSnapshotTree{
		Snapshot: snapshot.Self, Vm: vm.Self, Name: encode(spec.name), Description: spec.description, Id: id, CreateTime: now(),
		State: state, Quiesced: spec.quiesce, ReplaySupported: types.NewBool(false),
	}
	tree := types.VirtualMachineSnapshotInfo{CurrentSnapshot: &snapshot.Self}
	if vm.Snapshot != nil {
		tree.RootSnapshotList = copyTree(vm.Snapshot.RootSnapshotList)
	}
	var parent *types.VirtualMachineSnapshotTree
	if vm.Snapshot != nil && vm.Snapshot.CurrentSnapshot != nil {
		parent = find(tree.RootSnapshotList, *vm.Snapshot.CurrentSnapshot)
	}
	if parent == nil {
		tree.RootSnapshotList = append(tree.RootSnapshotList, entry)
	} else {
		parent.ChildSnapshotList = append(parent.ChildSnapshotList, entry)
	}
	s.setTree(ctx, vm, &tree)
	s.show(ctx, vm, m)
	s.changed(ctx, vm)
	return snapshot.Self
}

// setTree sets the tree of a VM's snapshots.
func (s *Server) setTree(ctx *simulator.Context, vm *simulator.VirtualMachine, tree *types.VirtualMachineSnapshotInfo) {
	var roots []types.ManagedObjectReference
	if tree != nil {
		for _, e := range tree.RootSnapshotList {
			roots = append(roots, e.Snapshot)
		}
	}
	if len(roots) == 0 {
		ctx.Update(vm, []types.PropertyChange{{Name: "snapshot", Val: nil}, {Name: "rootSnapshot", Val: nil}})
		return
	}
	ctx.Update(vm, []types.PropertyChange{{Name: "snapshot", Val: tree}, {Name: "rootSnapshot", Val: roots}})
	for _, e := range flat(tree.RootSnapshotList) {
		if snapshot, ok := ctx.Map.Get(e.Snapshot).(*simulator.VirtualMachineSnapshot); ok {
			var children []types.ManagedObjectReference
			for _, c := range e.ChildSnapshotList {
				children = append(children, c.Snapshot)
			}
			ctx.WithLock(snapshot, func() {
				ctx.Update(snapshot, []types.PropertyChange{{Name: "childSnapshot", Val: children}})
			})
		}
	}
}

func copyTree(tree []types.VirtualMachineSnapshotTree) []types.VirtualMachineSnapshotTree {
	list := slices.Clone(tree)
	for i := range list {
		list[i].ChildSnapshotList = copyTree(list[i].ChildSnapshotList)
	}
	return list
}

// find returns the entry of a snapshot in a tree.
func find(tree []types.VirtualMachineSnapshotTree, ref types.ManagedObjectReference) *types.VirtualMachineSnapshotTree {
	for i := range tree {
		if tree[i].Snapshot == ref {
			return &tree[i]
		}
		if e := find(tree[i].ChildSnapshotList, ref); e != nil {
			return e
		}
	}
	return nil
}

// flat returns the entries of a tree, parents before children.
func flat(tree []types.VirtualMachineSnapshotTree) []types.VirtualMachineSnapshotTree {
	var list []types.VirtualMachineSnapshotTree
	for _, e := range tree {
		list = append(append(list, e), flat(e.ChildSnapshotList)...)
	}
	return list
}

// cut removes the entry of a snapshot from a tree. Its children take its place.
func cut(tree []types.VirtualMachineSnapshotTree, ref types.ManagedObjectReference) []types.VirtualMachineSnapshotTree {
	var list []types.VirtualMachineSnapshotTree
	for _, e := range tree {
		if e.Snapshot == ref {
			list = append(list, e.ChildSnapshotList...)
			continue
		}
		e.ChildSnapshotList = cut(e.ChildSnapshotList, ref)
		list = append(list, e)
	}
	return list
}

// parentOf returns the snapshot below which ref lies; nil: a root.
func parentOf(tree []types.VirtualMachineSnapshotTree, ref types.ManagedObjectReference) *types.ManagedObjectReference {
	for i := range tree {
		for _, c := range tree[i].ChildSnapshotList {
			if c.Snapshot == ref {
				return &tree[i].Snapshot
			}
		}
		if p := parentOf(tree[i].ChildSnapshotList, ref); p != nil {
			return p
		}
	}
	return nil
}

// dropSnapshot removes a snapshot, and the snapshots below it if children is true. The caller has
// locked the VM.
func (s *Server) dropSnapshot(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine, ref types.ManagedObjectReference, children bool) {
	if vm.Snapshot == nil {
		return
	}
	entry := find(vm.Snapshot.RootSnapshotList, ref)
	if entry == nil {
		return
	}
	if children {
		for _, c := range slices.Backward(flat(entry.ChildSnapshotList)) {
			s.dropSnapshot(ctx, vm, m, c.Snapshot, false)
		}
	}
	tree := *vm.Snapshot
	if tree.CurrentSnapshot != nil && *tree.CurrentSnapshot == ref {
		tree.CurrentSnapshot = parentOf(tree.RootSnapshotList, ref)
	}
	tree.RootSnapshotList = cut(tree.RootSnapshotList, ref)
	files := m.frozen[ref]
	delete(m.frozen, ref)
	s.setTree(ctx, vm, &tree)
	ctx.Map.Remove(ctx, ref)
	if m.keeps {
		m.keeps = false
		m.waiting = append(m.waiting, files)
		ctx.Update(vm, []types.PropertyChange{{Name: "runtime.consolidationNeeded", Val: true}})
	}
	s.show(ctx, vm, m)
	s.changed(ctx, vm)
}

// merge merges the files that neither the VM writes nor a snapshot keeps: the file above each of
// them, if there is one alone, takes its name and its parent. The files that a removed snapshot has
// left stay until the VM is consolidated.
func (s *Server) merge(m *machine) {
	left := map[*node]bool{}
	for _, files := range m.waiting {
		for _, n := range files {
			left[n] = true
		}
	}
	for again := true; again; {
		again = false
		all := m.nodes()
		for _, n := range all {
			if m.kept(n) || left[n] {
				continue
			}
			var above []*node
			for _, c := range all {
				if c.parent == n {
					above = append(above, c)
				}
			}
			if len(above) == 1 {
				c := above[0]
				c.store, c.path, c.parent = n.store, n.path, n.parent
				c.written = append(slices.Clone(n.written), c.written...)
				again = true
				break
			}
		}
	}
}

// kept reports whether a VM writes n or a snapshot keeps it.
func (m *machine) kept(n *node) bool {
	if m.writes(n) {
		return true
	}
	for _, nodes := range m.frozen {
		for _, c := range nodes {
			if c == n {
				return true
			}
		}
	}
	return false
}

// consolidate merges the files that removed snapshots have left.
func (s *Server) consolidate(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine) {
	m.waiting = nil
	ctx.Update(vm, []types.PropertyChange{{Name: "runtime.consolidationNeeded", Val: false}})
	s.show(ctx, vm, m)
	s.changed(ctx, vm)
}

// revert makes a VM continue from a snapshot. The data that it has written since then is lost.
func (s *Server) revert(ctx *simulator.Context, vm *simulator.VirtualMachine, m *machine, ref types.ManagedObjectReference) {
	for key, n := range m.frozen[ref] {
		m.current[key] = m.newDelta(n)
	}
	ctx.Update(vm, []types.PropertyChange{{Name: "snapshot.currentSnapshot", Val: ref}})
	s.show(ctx, vm, m)
	s.changed(ctx, vm)
}

// changed gives the configuration of a VM a new version.
func (s *Server) changed(ctx *simulator.Context, vm *simulator.VirtualMachine) {
	s.mu.Lock()
	s.changes++
	version := fmt.Sprintf("%s-%d", now().Format("2006-01-02T15:04:05.000000Z"), s.changes)
	s.mu.Unlock()
	ctx.Update(vm, []types.PropertyChange{{Name: "config.changeVersion", Val: version}})
}

// must ends the test process if the stand-in library's folder cannot be changed. The error may
// occur while the server answers a call, where no test can be failed.
func (s *Server) must(err error) {
	if err != nil {
		panic(fmt.Sprintf("vspheretest: %v", err))
	}
}
