package vsphere

import (
	"context"
	"fmt"
	"sync"

	"github.com/vmware/govmomi/vim25/types"

	"github.com/vddkcp/vddkcp/vsphere/inventory"
)

// VM is a virtual machine on a server. It implements machine.Machine. Its methods are safe for
// concurrent use.
type VM struct {
	session *Session
	moref   string
	name    string // when the VM was found; for messages

	mu sync.Mutex // for the following fields
	// uncertain has the names of the snapshots that may come into existence although the VM does
	// not have them, because it is unknown whether the server has got the request.
	uncertain map[string]bool
	// unconsolidated says by the name of a snapshot whether the disks needed consolidation before it
	// was made.
	unconsolidated map[string]bool
}

// Moref returns the managed object reference of the VM, such as "vm-16".
func (v *VM) Moref() string { return v.moref }

// Name returns the name that the VM had when it was found.
func (v *VM) Name() string { return v.name }

func (v *VM) reference() types.ManagedObjectReference {
	return types.ManagedObjectReference{Type: "VirtualMachine", Value: v.moref}
}

// Describe asks the server for the present description of the VM. If the VM is not there any more,
// the error wraps inventory.ErrVMGone.
func (v *VM) Describe(ctx context.Context) (*inventory.VM, error) {
	s := v.session
	content, err := s.retrieveUpwards(ctx, []types.ManagedObjectReference{v.reference()}, []types.PropertySpec{{Type: "VirtualMachine", PathSet: vmProperties}})
	if err != nil {
		return nil, v.explain("describe", err)
	}
	known := newTables()
	known.addAll(content, s.client.ServiceContent.RootFolder)
	vms, err := s.describeAll(ctx, content, known)
	if err != nil {
		return nil, v.explain("describe", err)
	}
	if len(vms) == 0 {
		return nil, v.explain("describe", inventory.ErrVMGone)
	}
	return vms[0], nil
}

// The method explain adds the operation, such as "describe", and the name of the VM to an error.
func (v *VM) explain(operation string, err error) error {
	return explain(fmt.Sprintf("cannot %s the VM %q", operation, v.name), err)
}

// recordConsolidation records whether the disks of the VM needed consolidation before the snapshot
// with the given name was made. Only the first record counts.
func (v *VM) recordConsolidation(snapshot string, needed bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if _, known := v.unconsolidated[snapshot]; known {
		return
	}
	if v.unconsolidated == nil {
		v.unconsolidated = make(map[string]bool)
	}
	v.unconsolidated[snapshot] = needed
}

// neededConsolidation returns what recordConsolidation has recorded.
func (v *VM) neededConsolidation(snapshot string) (needed, known bool) {
	v.mu.Lock()
	defer v.mu.Unlock()
	needed, known = v.unconsolidated[snapshot]
	return needed, known
}
