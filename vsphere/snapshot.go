package vsphere

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vmware/govmomi/fault"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/internal/printable"
	"github.com/vddkcp/vddkcp/internal/retry"
	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// maxSnapshotCalls is how often Snapshot asks for a snapshot whose answer is lost each time.
const maxSnapshotCalls = 3

// Snapshot makes a snapshot without the memory of the guest. If the VM already has a snapshot with
// the name that r asks for, Snapshot returns that one, since the answer of an earlier call may have
// been lost. If the VM has another snapshot of vddkcp, the error is an *inventory.BusyError.
//
// If Snapshot fails, the snapshot may exist nevertheless, or may come into existence later. Remove
// takes care of it.
func (v *VM) Snapshot(ctx context.Context, r inventory.Request) (*inventory.Snapshot, error) {
	if !inventory.OurName(r.Name) {
		return nil, fmt.Errorf("vddkcp does not make snapshots with the name %q", r.Name)
	}
	ctx, cancel := v.session.withTaskTimeout(ctx)
	defer cancel()
	m := &making{VM: v, request: r, quiesce: r.Quiesce != inventory.NoQuiesce, attempts: v.session.Retry.Start(retry.NewProgress())}
	node, err := m.run(ctx)
	if busy := (*inventory.BusyError)(nil); errors.As(err, &busy) {
		return nil, busy
	}
	if err != nil {
		return nil, v.explain("make a snapshot of", err)
	}
	return v.describeSnapshot(ctx, node)
}

// Find returns the snapshot with the given name. If the VM has no such snapshot, the error wraps
// inventory.ErrSnapshotGone.
func (v *VM) Find(ctx context.Context, name string) (*inventory.Snapshot, error) {
	ctx, cancel := v.session.withTaskTimeout(ctx)
	defer cancel()
	_, node, err := v.settled(ctx, name)
	if err == nil && node == nil {
		err = inventory.ErrSnapshotGone
	}
	if err != nil {
		return nil, v.explain("find the snapshot "+name+" of", err)
	}
	return v.describeSnapshot(ctx, node)
}

// FindMoref returns the snapshot with the given managed object reference, such as "snapshot-17". It
// need not be one that vddkcp has made. If the VM has no such snapshot, the error wraps
// inventory.ErrSnapshotGone.
func (v *VM) FindMoref(ctx context.Context, snapshot string) (*inventory.Snapshot, error) {
	operation := "find the snapshot " + printable.Name(snapshot) + " of"
	st, err := v.snapshotState(ctx)
	if err != nil {
		return nil, v.explain(operation, err)
	}
	for i := range st.nodes {
		if n := &st.nodes[i]; n.Moref == snapshot {
			return v.describeSnapshot(ctx, n)
		}
	}
	return nil, v.explain(operation, inventory.ErrSnapshotGone)
}

// describeSnapshot returns a snapshot with the disks of its own configuration.
func (v *VM) describeSnapshot(ctx context.Context, node *snapshotNode) (*inventory.Snapshot, error) {
	s := v.session
	content, err := s.retrieve(ctx, objectSpecs(snapshotReference(node.Moref)), []types.PropertySpec{
		{Type: "VirtualMachineSnapshot", PathSet: []string{"config.hardware.device"}},
	})
	if err == nil && len(content) == 0 {
		err = inventory.ErrSnapshotGone
	}
	if err != nil {
		return nil, v.explain("read a snapshot of", err)
	}
	devices := property[types.ArrayOfVirtualDevice](properties(content[0]), "config.hardware.device").VirtualDevice
	known := newTables()
	if err := known.complete(ctx, s, storesOf(devices)); err != nil {
		return nil, v.explain("read a snapshot of", err)
	}
	return &inventory.Snapshot{Name: node.Name, Moref: node.Moref, Quiesced: node.quiesced, Disks: snapshotDisks(devices, known)}, nil
}

// snapshotDisks returns the disks of a snapshot with the given devices. The configuration of a
// snapshot also has the disks that are not in the snapshot. They are left out.
func snapshotDisks(devices []types.BaseVirtualDevice, known *tables) []inventory.Disk {
	vm := &inventory.VM{Disks: describeDisks(devices, known)}
	vm.Judge()
	return slices.DeleteFunc(vm.Disks, func(d inventory.Disk) bool {
		return strings.HasPrefix(d.Mode, "independent") || d.Backing == inventory.RDMPhysical || d.Backing == inventory.PMem
	})
}

func snapshotReference(moref string) types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "VirtualMachineSnapshot", Value: moref}
}

// storesOf returns the datastores of disks.
func storesOf(devices []types.BaseVirtualDevice) []types.ManagedObjectReference {
	var refs []types.ManagedObjectReference
	for _, device := range devices {
		file, ok := device.GetVirtualDevice().Backing.(types.BaseVirtualDeviceFileBackingInfo)
		if !ok {
			continue
		}
		if ref := file.GetVirtualDeviceFileBackingInfo().Datastore; ref != nil && !slices.Contains(refs, *ref) {
			refs = append(refs, *ref)
		}
	}
	return refs
}

// settled returns the state of the VM, and the snapshot with the given name or nil. If there is none
// and the server is making a snapshot of the VM, settled first waits until the server has made it,
// because it may have the name.
func (v *VM) settled(ctx context.Context, name string) (*snapshotState, *snapshotNode, error) {
	for {
		st, err := v.snapshotState(ctx)
		if err != nil {
			return nil, nil, err
		}
		if node := st.find(name); node != nil {
			v.setUncertain(name, false)
			return st, node, nil
		}
		task := st.creating()
		if task == nil {
			return st, nil, nil
		}
		if err := v.awaitOthers(ctx, []types.TaskInfo{*task}); err != nil {
			return nil, nil, err
		}
	}
}

// search looks for a snapshot whose creation has been asked for, while it is unknown whether the
// server has got the request. The server may begin with it some time later. The result is nil if
// there is no such snapshot after that time.
func (v *VM) search(ctx context.Context, name string) (*snapshotNode, error) {
	begun := time.Time{} // when the server answered for the first time
	for p := (poller{s: v.session}); ; {
		_, node, err := v.settled(ctx, name)
		if err != nil || node != nil {
			return node, err
		}
		if begun.IsZero() {
			begun = time.Now()
		}
		if time.Since(begun) >= searchTime*v.session.Poll {
			v.setUncertain(name, false)
			return nil, nil
		}
		if err := p.pause(ctx); err != nil {
			return nil, err
		}
	}
}

// setUncertain records whether a snapshot with the given name may come into existence although the
// VM does not have it.
func (v *VM) setUncertain(name string, uncertain bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if uncertain {
		if v.uncertain == nil {
			v.uncertain = make(map[string]bool)
		}
		v.uncertain[name] = true
	} else {
		delete(v.uncertain, name)
	}
}

func (v *VM) isUncertain(name string) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.uncertain[name]
}

// making is one call of Snapshot.
type making struct {
	*VM
	request  inventory.Request
	quiesce  bool
	attempts retry.Attempts
	calls    int // whose answers were lost
}

// run makes the snapshot, unless it is there already.
func (m *making) run(ctx context.Context) (*snapshotNode, error) {
	for {
		st, node, err := m.settled(ctx, m.request.Name)
		if err != nil || node != nil {
			return node, err
		}
		for _, n := range st.nodes {
			if n.Mark != nil {
				return nil, &inventory.BusyError{VM: m.name, Name: n.Name, Mark: n.Mark}
			}
		}
		if err := m.removable(ctx); err != nil {
			return nil, err
		}
		unconsolidated := st.needsConsolidation && !m.request.Consolidate
		m.recordConsolidation(m.request.Name, unconsolidated)
		m.request.Mark.Unconsolidated = unconsolidated
		err = m.create(ctx)
		if err == nil {
			if _, node, err = m.settled(ctx, m.request.Name); err == nil && node == nil {
				err = inventory.ErrSnapshotGone
			}
			return node, err
		}
		if node, err := m.failed(ctx, err); err != nil || node != nil {
			return node, err
		}
	}
}

// create asks for the snapshot and waits for it. If ctx ends, create waits a little longer, so that
// the snapshot is there when the caller removes it.
func (m *making) create(ctx context.Context) error {
	longer, cancel := lingering(ctx, graceTime*m.session.Poll)
	defer cancel()
	m.session.Log.Debug("vsphere: making a snapshot", "vm", m.name, "snapshot", m.request.Name, "quiesce", m.quiesce)
	m.setUncertain(m.request.Name, true)
	answer, err := methods.CreateSnapshot_Task(longer, m.session.client, &types.CreateSnapshot_Task{
		This:        m.reference(),
		Name:        m.request.Name, // the server encodes a "/" by itself
		Description: m.request.Mark.String(),
		Memory:      false,
		Quiesce:     m.quiesce,
	})
	unknown := (*UncertainError)(nil)
	decided := !errors.As(err, &unknown) || unknown.Denied
	if err == nil {
		_, err = m.session.await(longer, answer.Returnval, "make a snapshot", nil)
		decided = err == nil || errors.As(err, new(*taskError))
	}
	if decided {
		m.setUncertain(m.request.Name, false)
	}
	return err
}

// failed decides what happens after the snapshot was not made. It returns nil and nil if the snapshot
// is to be asked for again. It returns the snapshot if that is there nevertheless.
func (m *making) failed(ctx context.Context, err error) (*snapshotNode, error) {
	log := m.session.Log.With("vm", m.name, "snapshot", m.request.Name)
	if ctx.Err() != nil {
		return nil, err
	}
	if m.isUncertain(m.request.Name) {
		if m.calls++; m.calls >= maxSnapshotCalls {
			return nil, err
		}
		log.Warn("it is unknown whether the server makes the snapshot; looking for it", "error", err)
		return m.search(ctx, m.request.Name)
	}
	switch unknown := (*UncertainError)(nil); {
	case errors.As(err, &unknown): // the server has said that the session had ended
		if m.calls++; m.calls >= maxSnapshotCalls {
			return nil, err
		}
		return nil, nil
	case fault.Is(err, &types.ManagedObjectNotFound{}):
		if _, err := m.snapshotState(ctx); err != nil { // the VM is gone
			return nil, err
		}
		return nil, err
	case isTaskInProgress(err):
		st, err := m.snapshotState(ctx)
		if err != nil {
			return nil, err
		}
		if err := m.awaitOthers(ctx, st.tasks); err != nil {
			return nil, err
		}
		return nil, sleep(ctx, m.session.Poll)
	case m.quiesce && m.request.Quiesce == inventory.TryQuiesce && mayBeQuiescing(err):
		log.Warn("the guest could not be quiesced; making a snapshot without that", "error", err)
		m.quiesce = false
		return nil, nil
	case !isTemporary(err):
		return nil, err
	}
	wait, gaveUp := m.attempts.Failed(err)
	if gaveUp != nil {
		return nil, gaveUp
	}
	log.Warn("the snapshot could not be made; trying again", "error", err)
	return nil, sleep(ctx, wait)
}

// mayBeQuiescing reports whether a quiesced snapshot may have failed because the guest could not be
// quiesced. Servers report this with many different faults.
func mayBeQuiescing(err error) bool {
	for _, other := range []types.BaseMethodFault{
		&types.NoPermission{}, &types.RestrictedVersion{}, &types.NoDiskSpace{}, &types.ManagedObjectNotFound{},
		&types.TooManySnapshotLevels{}, &types.MultipleSnapshotsNotSupported{}, &types.SnapshotDisabled{}, &types.MethodDisabled{},
		&types.SnapshotIncompatibleDeviceInVm{}, &types.HostNotConnected{}, &types.RequestCanceled{},
	} {
		if fault.Is(err, other) {
			return false
		}
	}
	f := faultOf(err)
	if _, noResources := f.(types.BaseInsufficientResourcesFault); noResources {
		return false
	}
	_, unreachable := f.(types.BaseHostCommunication)
	return !unreachable
}
