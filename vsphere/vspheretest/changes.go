package vspheretest

import (
	"cmp"
	"slices"
	"strconv"
	"strings"

	"github.com/vmware/govmomi/simulator"
	"github.com/vmware/govmomi/vim25/methods"
	"github.com/vmware/govmomi/vim25/soap"
	"github.com/vmware/govmomi/vim25/types"
)

// Changed areas are widened to grains, and an answer has at most maxAreas of them.
const (
	grain    = 64 << 10
	maxAreas = 2000
)

// QueryChangedDiskAreas returns what the guest has written with Server.Write since a change ID.
func (v *virtualMachine) QueryChangedDiskAreas(ctx *simulator.Context, req *types.QueryChangedDiskAreas) soap.HasFault {
	body := &methods.QueryChangedDiskAreasBody{}
	s := v.s
	s.mu.Lock()
	m := s.machines[v.Self]
	s.mu.Unlock()
	nodes := m.current
	if req.Snapshot != nil {
		if nodes = m.frozen[*req.Snapshot]; nodes == nil {
			body.Fault_ = simulator.Fault("", &types.ManagedObjectNotFound{Obj: *req.Snapshot})
			return body
		}
	} else if v.Runtime.PowerState != types.VirtualMachinePowerStatePoweredOff {
		body.Fault_ = simulator.Fault("", &types.InvalidPowerState{RequestedState: types.VirtualMachinePowerStatePoweredOff, ExistingState: v.Runtime.PowerState})
		return body
	}
	n := nodes[req.DeviceKey]
	var capacity int64
	for _, d := range disksOf(v.Config.Hardware.Device) {
		if d.Key == req.DeviceKey {
			capacity = d.CapacityInBytes
		}
	}
	uuid, round, _ := strings.Cut(req.ChangeId, "/")
	since, err := strconv.Atoi(round)
	wrong := ""
	switch {
	case n == nil:
		wrong = "deviceKey"
	case req.StartOffset < 0 || req.StartOffset >= capacity:
		wrong = "startOffset"
	case req.ChangeId != "*" && (n.tracked == "" || uuid != n.tracked || err != nil || since > n.round):
		wrong = "changeId"
	}
	if wrong != "" {
		body.Fault_ = simulator.Fault("A specified parameter was not correct: "+wrong, &types.InvalidArgument{InvalidProperty: wrong})
		return body
	}
	areas := []span{{from: 0, to: capacity}}
	if req.ChangeId != "*" {
		areas = n.since(since, capacity)
	}
	body.Res = &types.QueryChangedDiskAreasResponse{Returnval: page(areas, req.StartOffset, capacity)}
	return body
}

// since returns the areas that were written after a round, as an ascending union.
func (n *node) since(round int, capacity int64) []span {
	var list []span
	for ; n != nil; n = n.parent {
		for _, w := range n.written {
			if w.round > round {
				list = append(list, span{from: w.from / grain * grain, to: min((w.to+grain-1)/grain*grain, capacity)})
			}
		}
	}
	slices.SortFunc(list, func(a, b span) int { return cmp.Compare(a.from, b.from) })
	var union []span
	for _, w := range list {
		if last := len(union) - 1; last >= 0 && w.from <= union[last].to {
			union[last].to = max(union[last].to, w.to)
		} else {
			union = append(union, w)
		}
	}
	return union
}

// page returns the areas from an offset on, as many as an answer has.
func page(areas []span, start, capacity int64) types.DiskChangeInfo {
	info := types.DiskChangeInfo{StartOffset: start, Length: capacity - start}
	for _, a := range areas {
		if a.to <= start {
			continue
		}
		if len(info.ChangedArea) == maxAreas {
			info.Length = a.from - start
			break
		}
		from := max(a.from, start)
		info.ChangedArea = append(info.ChangedArea, types.DiskChangeExtent{Start: from, Length: a.to - from})
	}
	return info
}
