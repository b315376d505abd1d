package vsphere

import (
	"cmp"
	"context"
	"slices"
	"time"

	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// Marked is a snapshot that vddkcp has made. Its field Mark is not nil.
type Marked struct {
	inventory.Node
	VM   *VM
	Path string        // of the VM, as in inventory.VM
	Age  time.Duration // by the server's clock; never negative
}

// Marked returns the snapshots that vddkcp has made of the VMs that the pattern names, as List
// describes. They are sorted by the path of the VM, parents before children. The result vms is the
// number of VMs that the pattern names.
func (s *Session) Marked(ctx context.Context, pattern string) (marked []Marked, vms int, err error) {
	found, err := s.locateAll(ctx, pattern)
	if err != nil {
		return nil, 0, err
	}
	now, err := methods.GetCurrentTime(ctx, s.client)
	if err != nil {
		return nil, 0, explain("cannot search for snapshots", err)
	}
	index := make(map[types.ManagedObjectReference]int)
	for _, i := range found.chosen {
		index[found.refs[i]] = i
	}
	marked = []Marked{}
	err = s.eachPage(ctx, found, []string{"snapshot"}, func(_ context.Context, content []types.ObjectContent) error {
		for _, object := range content {
			info, ok := properties(object)["snapshot"].(types.VirtualMachineSnapshotInfo)
			if !ok {
				continue
			}
			p := found.places[index[object.Obj]]
			vm := &VM{session: s, moref: object.Obj.Value, name: p.name}
			for _, n := range describeSnapshots(&info) {
				if n.Mark != nil {
					marked = append(marked, Marked{Node: n, VM: vm, Path: p.String(), Age: max(0, now.Sub(n.Created))})
				}
			}
		}
		return nil
	})
	if err != nil {
		return nil, 0, explain("cannot search for snapshots", err)
	}
	slices.SortStableFunc(marked, func(a, b Marked) int {
		return cmp.Or(cmp.Compare(a.Path, b.Path), cmp.Compare(a.VM.moref, b.VM.moref))
	})
	return marked, len(found.chosen), nil
}
